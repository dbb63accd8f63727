"""The timing protocol: all contenders in one process, interleaved, so that drift of the machine hits all alike.

In every round each contender gets one window, in a random order; a window lasts a minimum time and holds a minimum
number of calls. Only the calls are timed; the calls that bring a contender's code and weights back into the caches are
not recorded. A contender's ratio to its baseline is taken within rounds, and its interval over rounds.

Goes into device bundles as it is: standard library and NumPy only.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

Run = Callable[[np.ndarray], object]
"""Classifies uint8 pixels `[B, H, W, 3]`."""
Meter = Callable[[], float | None]
"""Joules used so far; None where the machine does not tell."""

STEADY = 0.05  # largest difference of a ratio between the two halves of a steady run, as a share


@dataclass(frozen=True)
class Protocol:
    threads: int
    warmup_runs: int
    """Of each contender, before the first round."""
    windows: int
    """Rounds: one window of each contender in each."""
    window_seconds: float
    """Shortest duration of a window."""
    seed: int
    """Of the order, the pixels and the bootstrap."""
    batch: int = 1
    """Images in each call."""
    minimum_runs: int = 5
    """Recorded calls in each window, however long they take."""
    unrecorded_runs: int = 2
    """At the start of each window: the caches hold another contender's weights then."""
    confidence: float = 0.95
    resamples: int = 2000


@dataclass(frozen=True)
class Contender:
    variant: str
    runtime: str
    run: Run
    pixels: np.ndarray
    """What each call gets."""
    baseline: int
    """The contender that its time is compared with, by its place in the list."""


@dataclass(frozen=True)
class Window:
    contender: int
    round: int
    order: int
    """Place within the round, from 0."""
    times_ns: np.ndarray
    """int64, one entry for each call."""
    joules: float | None = None
    """Used by the whole processor during the recorded calls."""

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.times_ns)) / 1e6


@dataclass(frozen=True)
class Latency:
    """One contender's calls over all windows. A call is one batch."""

    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_p99: float
    latency_ms_min: float
    throughput_per_s: float
    """Images, mean, calls only."""
    latency_ratio: float
    """Baseline's time over this one's: the median over rounds of the ratio of the windows' medians."""
    latency_ratio_low: float
    latency_ratio_high: float
    """Percentile bootstrap over rounds."""
    unsteady: bool
    """The ratio of the first half of the rounds and that of the second differ by more than `STEADY`."""
    energy_mj_per_image: float | None
    """Of the whole processor, other programs' share included; None where the machine does not tell."""
    runs: int


def random_pixels(batch: int, image_size: int, seed: int) -> np.ndarray:
    """Uniform noise, uint8 `[batch, H, W, 3]`: no operator in use takes longer for some values than others."""
    return np.random.default_rng(seed).integers(0, 256, (batch, image_size, image_size, 3), np.uint8)


def time_window(run: Run, pixels: np.ndarray, seconds: float, minimum_runs: int, meter: Meter) -> tuple:
    """Call `run` on `pixels` for at least `seconds` and at least `minimum_runs` times.

    Returns:
        Each call's time in ns, int64 `[calls]`; and the joules used meanwhile, or None.
    """
    clock: Callable[[], int] = time.perf_counter_ns
    times: list[int] = []
    joules = meter()
    end = clock() + int(seconds * 1e9)
    while True:
        before = clock()
        run(pixels)
        after = clock()
        times.append(after - before)
        if after >= end and len(times) >= minimum_runs:
            break
    return np.array(times, np.int64), None if joules is None else meter() - joules


def measure(contenders: Sequence[Contender], protocol: Protocol, meter: Meter = lambda: None) -> list[Window]:
    """Time every contender by the protocol.

    Returns:
        `windows * len(contenders)` windows in the order in which they ran.
    """
    for contender in contenders:
        for _ in range(protocol.warmup_runs):
            contender.run(contender.pixels)
    generator = np.random.default_rng(protocol.seed)
    windows = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # for all rounds: a collection takes as long as a window where torch is loaded
    try:
        for number in range(protocol.windows):
            for order, index in enumerate(generator.permutation(len(contenders))):
                run, pixels = contenders[index].run, contenders[index].pixels
                for _ in range(protocol.unrecorded_runs):
                    run(pixels)
                timed = time_window(run, pixels, protocol.window_seconds, protocol.minimum_runs, meter)
                windows.append(Window(int(index), number, order, *timed))
    finally:
        if collecting:
            gc.enable()
    return windows


def summarise(windows: Sequence[Window], contender: int, baseline: int, protocol: Protocol) -> Latency:
    """Latency of `contender`, and its ratio to `baseline` in the same rounds."""
    own = [window for window in windows if window.contender == contender]
    times = np.concatenate([window.times_ns for window in own])
    p50 = {window.round: window.p50_ms for window in own}
    base = {window.round: window.p50_ms for window in windows if window.contender == baseline}
    ratios = np.array([base[number] / p50[number] for number in sorted(p50)])
    low, high = bootstrap_median(ratios, protocol.confidence, protocol.resamples, protocol.seed)
    halves = [float(np.median(half)) for half in np.array_split(ratios, 2) if len(half)]
    images = len(times) * protocol.batch
    known = all(window.joules is not None for window in own)
    return Latency(
        latency_ms_p50=float(np.median(times)) / 1e6,
        latency_ms_p95=float(np.percentile(times, 95)) / 1e6,
        latency_ms_p99=float(np.percentile(times, 99)) / 1e6,
        latency_ms_min=float(times.min()) / 1e6,
        throughput_per_s=images / (float(times.sum()) / 1e9),
        latency_ratio=float(np.median(ratios)),
        latency_ratio_low=low,
        latency_ratio_high=high,
        unsteady=max(halves) > (1 + STEADY) * min(halves),
        energy_mj_per_image=1e3 * sum(window.joules for window in own) / images if known else None,
        runs=len(times),
    )


def timed_rows(contenders: Sequence[Contender], windows: Sequence[Window], protocol: Protocol) -> list[dict]:
    """One flat row for each contender, in their order."""
    return [
        {"variant": c.variant, "runtime": c.runtime, "baseline": contenders[c.baseline].variant}
        | {"baseline_runtime": contenders[c.baseline].runtime}
        | asdict(summarise(windows, index, c.baseline, protocol))
        for index, c in enumerate(contenders)
    ]


def window_rows(contenders: Sequence[Contender], windows: Sequence[Window]) -> list[dict]:
    """One flat row for each window, in the order in which they ran."""
    return [
        {
            "variant": contenders[window.contender].variant,
            "runtime": contenders[window.contender].runtime,
            "round": window.round,
            "order": window.order,
            "runs": len(window.times_ns),
            "p50_ms": window.p50_ms,
            "p95_ms": float(np.percentile(window.times_ns, 95)) / 1e6,
            "min_ms": float(window.times_ns.min()) / 1e6,
        }
        for window in windows
    ]


def timed_run(
    contenders: Sequence[Contender],
    starts: Sequence[dict],
    protocol: Protocol,
    start_watch: Callable[[], object],
    meter: Meter,
    say: Callable[[str], None],
) -> tuple[dict, dict, list[dict]]:
    """Time every contender by the protocol, on a machine that is watched meanwhile.

    Args:
        starts: what goes into each contender's row beside its latency.
        start_watch: makes a watch (`RunWatch`) whose `finish` gives the run's marks and the machine's state.
        say: gets a line on the progress.

    Returns:
        The marks, `protocol`, `overhead_ns` and `rows`; the machine's state; a row for each window.
    """
    seconds = len(contenders) * protocol.windows * protocol.window_seconds
    say(f"timing {len(contenders)} contenders, {protocol.windows} rounds, at least {seconds:.0f} s")
    watch = start_watch()
    windows = measure(contenders, protocol, meter)
    marks, state = watch.finish()
    rows = [row | start for row, start in zip(timed_rows(contenders, windows, protocol), starts, strict=True)]
    result = {**marks, "protocol": asdict(protocol), "overhead_ns": overhead_ns(), "rows": rows}
    return result, state, window_rows(contenders, windows)


def median_start(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each figure's median over what new processes told of their start-up."""
    median = {key: float(np.median([result[key] for result in results])) for key in results[0]}
    return median | {"peak_rss_bytes": int(median["peak_rss_bytes"])}


def overhead_ns() -> float:
    """What a call of nothing takes by this protocol: part of every latency."""
    times, _ = time_window(lambda pixels: None, np.empty(0, np.uint8), 0.01, 1000, lambda: None)
    return float(np.median(times))


def bootstrap_median(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` `[N]` (Efron and Tibshirani 1993, chapter 13)."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
