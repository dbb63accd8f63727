"""The timing protocol: all contenders in one process, interleaved, so that drift of the machine hits all alike.

In every round each contender gets one window, in a random order; a window lasts a minimum time and holds a minimum
number of calls. Only the calls are timed; the calls that bring a contender's code and weights back into the caches are
not recorded. A contender's ratio to its baseline is taken within rounds, and its interval over rounds.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.common.params import EdgeBenchmark
from stages.edge.runtimes import Run
from stages.edge.window import time_window


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
    minimum_runs: int = 5
    """Recorded calls in each window, however long they take."""
    unrecorded_runs: int = 2
    """At the start of each window: the caches hold another contender's weights then."""
    confidence: float = 0.95
    resamples: int = 2000


@dataclass(frozen=True)
class Window:
    contender: int
    round: int
    order: int
    """Place within the round, from 0."""
    times_ns: np.ndarray
    """int64, one entry for each call."""

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.times_ns)) / 1e6


@dataclass(frozen=True)
class Latency:
    """One contender's calls over all windows."""

    latency_ms_p50: float
    latency_ms_p95: float
    latency_ms_min: float
    throughput_per_s: float
    """Mean, calls only."""
    latency_ratio: float
    """Baseline's time over this one's, batch 1: the median over rounds of the ratio of the windows' medians."""
    latency_ratio_low: float
    latency_ratio_high: float
    """Percentile bootstrap over rounds."""
    runs: int


def protocol_of(section: EdgeBenchmark) -> Protocol:
    return Protocol(section.threads, section.warmup_runs, section.windows, section.window_seconds, section.seed)


def random_pixels(image_size: int, seed: int) -> np.ndarray:
    """One image of uniform noise, uint8 `[1, H, W, 3]`: no operator in use takes longer for some values than others."""
    return np.random.default_rng(seed).integers(0, 256, (1, image_size, image_size, 3), np.uint8)


def measure(contenders: Sequence[tuple[Run, np.ndarray]], protocol: Protocol) -> list[Window]:
    """Time every contender (a function and the pixels that it gets) by the protocol.

    Returns:
        `windows * len(contenders)` windows in the order in which they ran.
    """
    for run, pixels in contenders:
        for _ in range(protocol.warmup_runs):
            run(pixels)
    generator = np.random.default_rng(protocol.seed)
    windows = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # for all rounds: a collection takes as long as a window where torch is loaded
    try:
        for number in range(protocol.windows):
            for order, contender in enumerate(generator.permutation(len(contenders))):
                run, pixels = contenders[contender]
                times = time_window(
                    run, pixels, protocol.window_seconds, protocol.minimum_runs, protocol.unrecorded_runs
                )
                windows.append(Window(int(contender), number, order, times))
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
    return Latency(
        latency_ms_p50=float(np.median(times)) / 1e6,
        latency_ms_p95=float(np.percentile(times, 95)) / 1e6,
        latency_ms_min=float(times.min()) / 1e6,
        throughput_per_s=len(times) / (float(times.sum()) / 1e9),
        latency_ratio=float(np.median(ratios)),
        latency_ratio_low=low,
        latency_ratio_high=high,
        runs=len(times),
    )


def bootstrap_median(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` `[N]` (Efron and Tibshirani 1993, chapter 13)."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
