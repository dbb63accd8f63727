import gc
import time

import numpy as np
import pytest

from stages.edge.protocol import (
    Contender,
    Protocol,
    Window,
    bootstrap_median,
    measure,
    overhead_ns,
    random_pixels,
    summarise,
    timed_rows,
    window_rows,
)

QUICK = Protocol(threads=1, warmup_runs=3, windows=4, window_seconds=0.01, seed=0)


def windows_of(times_ms):
    """For each contender a list of windows, each a list of call times in ms."""
    return [
        Window(contender, number, contender, np.array([t * 1_000_000 for t in window], np.int64))
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


def test_every_round_holds_one_window_of_each_contender_in_a_seeded_random_order():
    contenders = contenders_of(*[sleeper(0)] * 5)
    first, second = (measure(contenders, QUICK) for _ in range(2))
    rounds = [[w.contender for w in first if w.round == number] for number in range(4)]
    assert all(sorted(order) == list(range(5)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1
    assert [w.contender for w in second] == [w.contender for w in first]
    assert [w.order for w in first] == [*range(5)] * 4
    other = measure(contenders, Protocol(1, 3, 4, 0.01, seed=1))
    assert [w.contender for w in other] != [w.contender for w in first]


def test_a_window_lasts_its_time_and_holds_its_number_of_calls():
    windows = measure(contenders_of(sleeper(1), sleeper(20)), Protocol(1, 0, 1, 0.05, 0, minimum_runs=5))
    short, long = (w.times_ns for w in sorted(windows, key=lambda w: w.contender))
    assert len(short) > 5
    assert short.sum() > 0.03e9
    assert len(long) == 5  # 50 ms hold two or three of them
    assert long.min() >= 20e6


def test_warm_up_and_unrecorded_calls_are_not_recorded():
    calls = []
    windows = measure(contenders_of(sleeper(0.1, calls)), QUICK)
    recorded = sum(len(w.times_ns) for w in windows)
    assert len(calls) - recorded == QUICK.warmup_runs + QUICK.windows * QUICK.unrecorded_runs


def test_the_garbage_collector_rests_during_windows_and_works_afterwards():
    calls = []
    measure(contenders_of(sleeper(0.1, calls)), Protocol(1, 0, 2, 0.005, 0))
    assert not any(calls)
    assert gc.isenabled()


def test_the_garbage_collector_is_switched_on_again_after_an_error():
    def fails(pixels):
        raise ValueError("no such input")

    with pytest.raises(ValueError, match="no such input"):
        measure(contenders_of(fails), Protocol(1, 0, 1, 0.01, 0))
    assert gc.isenabled()


def test_the_protocol_itself_takes_under_a_hundredth_of_what_it_times():
    def work(pixels):
        end = time.perf_counter_ns() + 200_000
        while time.perf_counter_ns() < end:
            pass

    best = min(np.median(w.times_ns) for w in measure(contenders_of(work), QUICK))
    assert best < 1.01 * 200_000
    assert 0 < overhead_ns() < 2_000  # 1 % of a fifth of a millisecond


def test_percentiles_and_throughput_are_over_all_calls():
    latency = summarise(windows_of([[[1, 2], [3, 10]]]), 0, 0, QUICK)
    assert (latency.latency_ms_p50, latency.latency_ms_min, latency.runs) == (2.5, 1, 4)
    assert latency.latency_ms_p95 == pytest.approx(np.percentile([1, 2, 3, 10], 95))
    assert latency.throughput_per_s == pytest.approx(4 / 0.016)


def test_the_ratio_is_taken_within_rounds_so_that_drift_cancels():
    drifting = windows_of([[[4], [8], [40]], [[2], [4], [20]]])  # the machine slows down tenfold
    latency = summarise(drifting, 1, 0, QUICK)
    assert (latency.latency_ratio, latency.latency_ratio_low, latency.latency_ratio_high) == (2, 2, 2)
    baseline = summarise(drifting, 0, 0, QUICK)
    assert (baseline.latency_ratio, baseline.latency_ratio_low, baseline.latency_ratio_high) == (1, 1, 1)


def test_the_ratio_is_the_median_over_rounds():
    latency = summarise(windows_of([[[4], [6], [40]], [[2], [2], [2]]]), 1, 0, QUICK)
    assert latency.latency_ratio == 3
    assert 2 <= latency.latency_ratio_low <= 3 <= latency.latency_ratio_high <= 20


def test_the_bootstrap_interval_covers_the_median_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_median(generator.normal(5, 1, 15), 0.9, 300, seed)
        covered += low <= 5 <= high
    assert 0.82 <= covered / 200 <= 0.97
    assert bootstrap_median(np.arange(9.0), 0.9, 300, 7) == bootstrap_median(np.arange(9.0), 0.9, 300, 7)


def test_pixels_are_one_seeded_batch_of_uint8_images():
    assert random_pixels(2, 24, 0).shape == (2, 24, 24, 3)
    assert random_pixels(1, 24, 0).dtype == np.uint8
    assert np.array_equal(random_pixels(1, 24, 0), random_pixels(1, 24, 0))
    assert not np.array_equal(random_pixels(1, 24, 0), random_pixels(1, 24, 1))


def test_throughput_and_energy_are_those_of_an_image_not_of_a_batch():
    windows = [Window(0, number, 0, np.full(5, 10_000_000, np.int64), joules=2.0) for number in range(3)]
    latency = summarise(windows, 0, 0, Protocol(1, 0, 3, 0.01, 0, batch=4))
    assert latency.throughput_per_s == pytest.approx(4 / 0.010)
    assert latency.energy_mj_per_image == pytest.approx(1e3 * 6.0 / (15 * 4))
    unknown = [Window(0, 0, 0, np.full(5, 10_000_000, np.int64))]
    assert summarise(unknown, 0, 0, QUICK).energy_mj_per_image is None


def test_energy_is_that_of_the_recorded_calls_alone():
    joules = iter(range(100))
    windows = measure(contenders_of(sleeper(0.1)), QUICK, lambda: float(next(joules)))
    assert [w.joules for w in windows] == [1.0] * QUICK.windows  # asked before and after each window
    assert next(joules) == 2 * QUICK.windows


def test_a_run_whose_halves_disagree_is_unsteady():
    steady = windows_of([[[4], [4], [4], [4]], [[2], [2.04], [2], [1.98]]])
    assert not summarise(steady, 1, 0, QUICK).unsteady
    jumps = windows_of([[[4], [4], [4], [4]], [[2], [2], [2.2], [2.2]]])
    assert summarise(jumps, 1, 0, QUICK).unsteady


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
