import gc
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from stages.edge.protocol import (
    Contender,
    Protocol,
    Window,
    bootstrap_median,
    measure,
    overhead_ns,
    peak_rss_bytes,
    random_pixels,
    summarize,
    timed_rows,
    window_rows,
)

QUICK = Protocol(threads=1, warmup_runs=3, windows=4, window_seconds=0.01, seed=0)


def windows_of(times_ms, **settings):
    """For each contender a list of windows, each a list of call times in ms."""
    return [
        Window(contender, number, contender, np.array([t * 1_000_000 for t in window], np.int64), **settings)
        for contender, windows in enumerate(times_ms)
        for number, window in enumerate(windows)
    ]


def contenders_of(*runs):
    return [Contender(f"variant{index}", "a runtime", run, None, 0) for index, run in enumerate(runs)]


def sleeper(milliseconds, calls=None):
    def run(pixels):
        if calls is not None:
            calls.append(gc.isenabled())
        time.sleep(milliseconds / 1000)
        return pixels

    return run


def test_every_round_has_one_window_of_each_contender_in_a_seeded_random_order():
    contenders, quicker = contenders_of(*[sleeper(0)] * 5), replace(QUICK, window_seconds=0.001)
    first, second, other = (measure(contenders, replace(quicker, seed=seed)) for seed in (0, 0, 1))
    rounds = [[w.contender for w in first if w.round == number] for number in range(4)]
    assert all(sorted(order) == list(range(5)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert [w.contender for w in second] == [w.contender for w in first]
    assert [w.order for w in first] == [*range(5)] * 4
    assert [w.contender for w in other] != [w.contender for w in first]


def test_a_window_has_its_minimum_duration_and_number_of_calls():
    windows = measure(contenders_of(sleeper(1), sleeper(20)), Protocol(1, 0, 1, 0.05, 0, minimum_runs=5))
    short, long = (w.times_ns for w in sorted(windows, key=lambda w: w.contender))
    assert len(short) > 5
    assert short.sum() > 0.03e9
    assert len(long) == 5  # 50 ms hold two or three of them
    assert long.min() >= 20e6


def test_warm_up_calls_are_not_recorded_and_the_garbage_collector_is_off_during_windows():
    calls = []
    windows = measure(contenders_of(sleeper(0.1, calls)), QUICK)
    recorded = sum(len(w.times_ns) for w in windows)
    assert len(calls) - recorded == QUICK.warmup_runs + QUICK.windows * QUICK.unrecorded_runs
    assert not any(calls[QUICK.warmup_runs :])
    assert gc.isenabled()


def test_the_garbage_collector_is_on_again_after_an_error():
    def fails(pixels):
        raise ValueError("no such input")

    with pytest.raises(ValueError, match="no such input"):
        measure(contenders_of(fails), Protocol(1, 0, 1, 0.01, 0))
    assert gc.isenabled()


def test_the_overhead_of_the_protocol_is_below_one_percent():
    def work(pixels):
        end = time.perf_counter_ns() + 200_000
        while time.perf_counter_ns() < end:
            pass

    best = min(np.median(w.times_ns) for w in measure(contenders_of(work), QUICK))
    assert best < 1.01 * 200_000
    assert 0 < overhead_ns() < 2_000  # 1 % of a fifth of a millisecond


def test_percentiles_and_throughput_are_over_all_calls():
    latency = summarize(windows_of([[[1, 2], [3, 10]]]), 0, 0, QUICK)
    assert (latency["latency_ms_p50"], latency["latency_ms_min"], latency["runs"]) == (2.5, 1, 4)
    assert latency["latency_ms_p95"] == pytest.approx(np.percentile([1, 2, 3, 10], 95))
    assert latency["throughput_per_s"] == pytest.approx(4 / 0.016)
    assert latency["energy_mj_per_image"] is None


def ratio_of(latency):
    return latency["latency_ratio"], latency["latency_ratio_low"], latency["latency_ratio_high"]


def test_the_ratio_is_computed_within_rounds_so_that_drift_cancels():
    drifting = windows_of([[[4], [8], [40]], [[2], [4], [20]]])  # the machine slows down tenfold
    assert ratio_of(summarize(drifting, 1, 0, QUICK)) == (2, 2, 2)
    assert ratio_of(summarize(drifting, 0, 0, QUICK)) == (1, 1, 1)


def test_the_ratio_is_the_median_over_rounds():
    ratio, low, high = ratio_of(summarize(windows_of([[[4], [6], [40]], [[2], [2], [2]]]), 1, 0, QUICK))
    assert ratio == 3
    assert 2 <= low <= 3 <= high <= 20


def test_the_bootstrap_interval_covers_the_median_at_its_level():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_median(generator.normal(5, 1, 15), 0.9, 300, seed)
        covered += low <= 5 <= high
    assert 0.82 <= covered / 200 <= 0.97
    assert bootstrap_median(np.arange(9.0), 0.9, 300, 7) == bootstrap_median(np.arange(9.0), 0.9, 300, 7)


def test_pixels_are_one_seeded_batch_of_uint8_images():
    assert random_pixels(2, (24, 24, 3), 0).shape == (2, 24, 24, 3)
    assert random_pixels(1, (24, 24, 3), 0).dtype == np.uint8
    assert np.array_equal(random_pixels(1, (24, 24, 3), 0), random_pixels(1, (24, 24, 3), 0))
    assert not np.array_equal(random_pixels(1, (24, 24, 3), 0), random_pixels(1, (24, 24, 3), 1))


def test_throughput_and_energy_are_per_image_and_not_per_batch():
    windows = windows_of([[[10] * 5] * 3], joules=2.0)
    latency = summarize(windows, 0, 0, replace(QUICK, batch=4))
    assert latency["throughput_per_s"] == pytest.approx(4 / 0.010)
    assert latency["energy_mj_per_image"] == pytest.approx(1e3 * 6.0 / (15 * 4))


def test_energy_is_that_of_the_recorded_calls_only():
    joules = iter(range(100))
    windows = measure(contenders_of(sleeper(0.1)), QUICK, lambda: float(next(joules)))
    assert [w.joules for w in windows] == [1.0] * QUICK.windows  # read before and after each window
    assert next(joules) == 2 * QUICK.windows


@pytest.mark.parametrize(("second", "unsteady"), [([2, 2.04, 2, 1.98], False), ([2, 2, 2.2, 2.2], True)])
def test_a_run_whose_halves_disagree_is_unsteady(second, unsteady):
    windows = windows_of([[[4]] * 4, [[t] for t in second]])
    assert summarize(windows, 1, 0, QUICK)["unsteady"] is unsteady


def test_rows_name_the_baseline_and_windows_add_up():
    contenders = [
        Contender("dense", "eager", sleeper(2), None, 0),
        Contender("small", "fast", sleeper(1), None, 0),
    ]
    windows = measure(contenders, QUICK)
    dense, small = timed_rows(contenders, windows, QUICK)
    assert (small["variant"], small["baseline"], small["baseline_runtime"]) == ("small", "dense", "eager")
    assert 1.5 < small["latency_ratio"] < 2.5
    assert dense["latency_ratio"] == 1
    assert small["latency_ms_p50"] <= small["latency_ms_p95"] <= small["latency_ms_p99"]
    rows = window_rows(contenders, windows)
    assert sum(row["runs"] for row in rows if row["variant"] == "small") == small["runs"]


def test_peak_memory_counts_what_a_process_touched_but_not_its_parent():
    block = np.ones(300 * 2**20, np.uint8)
    assert peak_rss_bytes() > block.nbytes
    code = "import numpy, stages.edge.protocol as p; a = numpy.ones({} * 2**20, numpy.uint8); print(p.peak_rss_bytes())"
    small, large = (
        int(subprocess.run([sys.executable, "-c", code.format(size)], capture_output=True, check=True).stdout)
        for size in (1, 101)
    )
    assert large - small == pytest.approx(100 * 2**20, rel=0.1)
    assert large < 250 * 2**20
