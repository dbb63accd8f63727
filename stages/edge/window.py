"""One timed window of calls. Goes into device bundles as it is: standard library and NumPy only."""

import time
from collections.abc import Callable

import numpy as np


def time_window(
    run: Callable[[np.ndarray], object], pixels: np.ndarray, seconds: float, minimum_runs: int, unrecorded_runs: int
) -> np.ndarray:
    """Call `run` on `pixels` for at least `seconds` and at least `minimum_runs` times.

    Args:
        unrecorded_runs: calls before, which bring code and weights back into the caches.

    Returns:
        Each call's time in ns, int64 `[calls]`.
    """
    clock: Callable[[], int] = time.perf_counter_ns
    for _ in range(unrecorded_runs):
        run(pixels)
    times: list[int] = []
    end = clock() + int(seconds * 1e9)
    while True:
        before = clock()
        run(pixels)
        after = clock()
        times.append(after - before)
        if after >= end and len(times) >= minimum_runs:
            return np.array(times, np.int64)
