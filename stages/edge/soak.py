"""Soak: run one model for a long time, so that throttling, memory leaks and changed answers show.

The remote benchmark copies this file to the device, so it needs the standard library and NumPy only.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Row = dict[str, float | None]


@dataclass(frozen=True)
class SoakPlan:
    seconds: float
    images_per_second: float  # 0 runs one inference directly after the other
    window_seconds: float


def soak(
    run: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray], plan: SoakPlan, state: Callable[[], Row]
) -> list[Row]:
    """Classify `images` in turn until the time is up, and compare each answer with the first one on the same image.

    Args:
        run: uint8 pixels `[1, H, W, C]`, as each of `images`, to logits `[1, classes]`.
        state: returns memory, temperature and frequency; called at the end of each window, outside the timing.

    Returns:
        One flat row for each window: its end, its calls and their time percentiles, the number of calls that started
        `late` (with a rate), the number of `wrong` answers (another class than the first time), and the state.
    """
    expected = [int(run(image).argmax()) for image in images]
    clock = time.perf_counter_ns
    interval = int(1e9 / plan.images_per_second) if plan.images_per_second else 0
    started = clock()
    due, end = started, started + int(plan.window_seconds * 1e9)
    last = started + int(plan.seconds * 1e9)
    rows: list[Row] = []
    times: list[int] = []
    number = late = wrong = 0
    while True:
        if interval:
            if (wait := due - clock()) > 0:
                time.sleep(wait / 1e9)
            elif wait < -interval:  # a camera would have dropped the frames in between
                late += 1
                due = clock()
            due += interval
        index = number % len(images)
        before = clock()
        logits = run(images[index])
        after = clock()
        times.append(after - before)
        wrong += int(logits.argmax()) != expected[index]
        number += 1
        if after < end:
            continue
        percentiles = zip(("p50", "p95", "p99", "max"), (np.percentile(times, [50, 95, 99, 100]) / 1e6), strict=True)
        row: Row = {"seconds": (after - started) / 1e9, "runs": len(times)}
        row |= {f"latency_ms_{name}": float(value) for name, value in percentiles}
        rows.append(row | {"late": late, "wrong": wrong} | state())
        times, late, wrong = [], 0, 0
        if after >= last:
            return rows
        end = max(end + int(plan.window_seconds * 1e9), clock())
