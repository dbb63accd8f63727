"""The timing protocol: one process times all contenders interleaved, so that a drift of the machine affects all alike.

Each round gives each contender one window, in a random order. A window lasts a minimum time and holds a minimum number
of calls. Only these calls are recorded; the calls before them, which bring the contender's code and weights back into
the caches, are not. The ratio of a contender to its baseline is computed within rounds, and its interval over rounds.

Device bundles contain this file unchanged, so it needs the standard library and NumPy only.
"""

import gc
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Classify = Callable[[np.ndarray], np.ndarray]  # uint8 pixels `[B, H, W, C]` to float32 logits `[B, classes]`
Log = Callable[[str], None]  # receives lines of progress
Meter = Callable[[], float | None]  # joules used so far; None where the machine has no counter

STEADY = 0.05  # the ratios of the two halves of a steady run differ by at most this fraction


@dataclass(frozen=True)
class Protocol:
    threads: int
    warmup_runs: int  # calls of each contender before the first round
    windows: int  # number of rounds, and so the number of windows for each contender
    window_seconds: float  # minimum duration of a window
    seed: int  # seed of the order, the pixels and the bootstrap
    batch: int = 1  # images in each call
    minimum_runs: int = 5  # minimum number of recorded calls in a window, however long they take
    unrecorded_runs: int = 2  # calls at the start of each window, when the caches hold another contender's weights
    confidence: float = 0.95
    resamples: int = 2000
    start_up_runs: int = 3  # new processes for the median start-up time and memory
    quiet_seconds: int = 10  # maximum time to wait before the run for a second in which no other program works


@dataclass(frozen=True)
class Contender:
    variant: str
    runtime: str
    run: Classify
    pixels: np.ndarray  # input of each call
    baseline: int  # index of the contender to compare with


@dataclass(frozen=True)
class Window:
    contender: int
    round: int
    order: int  # position within the round, from 0
    times_ns: np.ndarray  # duration of each call, int64
    joules: float | None = None  # energy that the whole processor used during the recorded calls

    @property
    def p50_ms(self) -> float:
        return float(np.median(self.times_ns)) / 1e6


def random_pixels(batch: int, image_shape: Sequence[int], seed: int) -> np.ndarray:
    """Uniform noise, uint8 `[batch, H, W, C]`. The values do not matter: no operator in use depends on them in time."""
    return np.random.default_rng(seed).integers(0, 256, (batch, *image_shape), np.uint8)


def time_window(run: Classify, pixels: np.ndarray, seconds: float, minimum_runs: int, meter: Meter) -> tuple:
    """Call `run` for at least `seconds` and `minimum_runs` times; returns the times in ns, int64, and the joules."""
    clock, times, joules = time.perf_counter_ns, [], meter()
    after, end = 0, clock() + int(seconds * 1e9)
    while after < end or len(times) < minimum_runs:
        before = clock()
        run(pixels)
        after = clock()
        times.append(after - before)
    now = meter()
    return np.array(times, np.int64), None if joules is None or now is None else now - joules


def measure(contenders: Sequence[Contender], protocol: Protocol, meter: Meter = lambda: None) -> list[Window]:
    """Time every contender; returns `windows * len(contenders)` windows in the order in which they ran."""
    for contender in contenders:
        for _ in range(protocol.warmup_runs):
            contender.run(contender.pixels)
    generator = np.random.default_rng(protocol.seed)
    windows = []
    gc.collect()
    gc.disable()  # for all rounds: with torch loaded, a collection takes as long as a window
    try:
        for number in range(protocol.windows):
            for order, index in enumerate(generator.permutation(len(contenders))):
                run, pixels = contenders[index].run, contenders[index].pixels
                for _ in range(protocol.unrecorded_runs):
                    run(pixels)
                timed = time_window(run, pixels, protocol.window_seconds, protocol.minimum_runs, meter)
                windows.append(Window(int(index), number, order, *timed))
    finally:
        gc.enable()
    return windows


def summarize(windows: Sequence[Window], contender: int, baseline: int, protocol: Protocol) -> dict[str, object]:
    """Latency of `contender` over all its calls (one call is one batch), and its ratio to `baseline`.

    `throughput_per_s` counts images and the time of the calls only. `latency_ratio` is the median over rounds of the
    baseline's window median over this one's, with a percentile bootstrap interval over rounds. A contender is
    `unsteady` if the ratios of the two halves of the run differ by more than `STEADY`. `energy_mj_per_image` is that of
    the whole processor, other programs included; None where the machine has no counter.
    """
    own = [window for window in windows if window.contender == contender]
    times = np.concatenate([window.times_ns for window in own])
    p50 = {window.round: window.p50_ms for window in own}
    base = {window.round: window.p50_ms for window in windows if window.contender == baseline}
    ratios = np.array([base[number] / p50[number] for number in sorted(p50)])
    low, high = bootstrap_median(ratios, protocol.confidence, protocol.resamples, protocol.seed)
    halves = [float(np.median(half)) for half in np.array_split(ratios, 2) if len(half)]
    images = len(times) * protocol.batch
    joules = [window.joules for window in own if window.joules is not None]
    percentiles = zip(("p50", "p95", "p99", "min"), (np.percentile(times, [50, 95, 99, 0]) / 1e6).tolist(), strict=True)
    return {
        **{f"latency_ms_{name}": value for name, value in percentiles},
        "throughput_per_s": images / (float(times.sum()) / 1e9),
        "latency_ratio": float(np.median(ratios)),
        "latency_ratio_low": low,
        "latency_ratio_high": high,
        "unsteady": max(halves) > (1 + STEADY) * min(halves),
        "energy_mj_per_image": 1e3 * sum(joules) / images if len(joules) == len(own) else None,
        "runs": len(times),
    }


def timed_rows(contenders: Sequence[Contender], windows: Sequence[Window], protocol: Protocol) -> list[dict]:
    """One flat row for each contender, in their order."""
    rows = []
    for index, own in enumerate(contenders):
        base = contenders[own.baseline]
        names = {"variant": own.variant, "runtime": own.runtime}
        names |= {"baseline": base.variant, "baseline_runtime": base.runtime}
        rows.append(names | summarize(windows, index, own.baseline, protocol))
    return rows


def window_rows(contenders: Sequence[Contender], windows: Sequence[Window]) -> list[dict]:
    """One flat row for each window, in the order in which they ran."""
    rows = []
    for window in windows:
        own, times_ms = contenders[window.contender], window.times_ns / 1e6
        names = {"variant": own.variant, "runtime": own.runtime, "round": window.round, "order": window.order}
        figures = {"runs": len(times_ms), "p50_ms": window.p50_ms, "p95_ms": float(np.percentile(times_ms, 95))}
        rows.append(names | figures | {"min_ms": float(times_ms.min())})
    return rows


def timed_run(
    contenders: Sequence[Contender], starts: Sequence[dict], protocol: Protocol, watch: Any, meter: Meter, log: Log
) -> tuple[dict, dict, list[dict]]:
    """Time every contender while a `RunWatch` watches the machine (its module needs psutil, this one does not).

    Returns:
        The marks, `protocol`, `overhead_ns` and `rows`, to which `starts` adds its figures; the state of the machine;
        one row for each window.
    """
    seconds = len(contenders) * protocol.windows * protocol.window_seconds
    log(f"timing {len(contenders)} contenders, {protocol.windows} rounds, at least {seconds:.0f} s")
    windows = measure(contenders, protocol, meter)
    marks, state = watch.finish()
    rows = [row | start for row, start in zip(timed_rows(contenders, windows, protocol), starts, strict=True)]
    result = {**marks, "protocol": asdict(protocol), "overhead_ns": overhead_ns(), "rows": rows}
    return result, state, window_rows(contenders, windows)


def start_up(run: Classify, pixels: np.ndarray, import_ms: float, load_ms: float) -> dict[str, float]:
    """The start-up cost of a process that has imported its runtime and loaded its model, but not classified yet."""
    started = time.perf_counter_ns()
    run(pixels)
    first_ms = (time.perf_counter_ns() - started) / 1e6
    times = {"import_ms": import_ms, "load_ms": load_ms, "first_inference_ms": first_ms}
    return times | {"peak_rss_bytes": peak_rss_bytes()}


def median_start(name: str, command: Sequence[str], runs: int) -> dict[str, float]:
    """The median over `runs` new processes of the figures that `command` prints; a `ValueError` if one fails."""
    import subprocess  # here, because the new processes measure their own memory

    results = []
    for _ in range(runs):
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ValueError(f"{name} does not run in a new process: {reason.removeprefix('error: ')}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    median = {key: float(np.median([result[key] for result in results])) for key in results[0]}
    return median | {"peak_rss_bytes": int(median["peak_rss_bytes"])}


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since its start, Python and NumPy included (psutil does not have it).

    On Linux, /proc counts from the exec on, but `ru_maxrss` also covers the process that this one was forked from.
    """
    status = Path("/proc/self/status")
    if found := re.search(r"VmHWM:\s*(\d+)", status.read_text(errors="replace") if status.exists() else ""):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def overhead_ns() -> float:
    """The time that the protocol measures for an empty call; each latency includes it."""
    times, _ = time_window(lambda pixels: pixels, np.empty(0, np.uint8), 0.01, 1000, lambda: None)
    return float(np.median(times))


def bootstrap_median(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the median of `values` `[N]` (Efron and Tibshirani 1993, chapter 13)."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
