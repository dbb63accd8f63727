import numpy as np
import pytest

from stages.edge.drift import drift_of, memory_growth, slope_interval

MEGABYTE = 2**20


def windows_of(latency_ms, rss=lambda index: 100 * MEGABYTE, wrong=0):
    """One window every 10 s."""
    return [
        {
            "seconds": 10.0 * (index + 1),
            "runs": 50,
            "latency_ms_p50": float(value),
            "latency_ms_p99": float(2 * value),
            "late": 1,
            "wrong": wrong if index == 3 else 0,
            "rss_bytes": rss(index),
        }
        for index, value in enumerate(latency_ms)
    ]


def noise(n, share=0.01):
    return 1 + share * np.random.default_rng(0).standard_normal(n)


def test_a_steady_soak_is_stable():
    drift = drift_of(windows_of(5 * noise(60)), 0.95)
    assert (drift.verdict, drift.reasons) == ("stable", [])
    assert drift.change_percent_low <= 0 <= drift.change_percent_high
    assert (drift.soak_seconds, drift.soak_runs, drift.late, drift.wrong) == (600, 3000, 60, 0)
    assert drift.latency_ms_p50 == pytest.approx(5, rel=0.01)


def test_a_slope_is_found_with_its_size():
    drift = drift_of(windows_of(5 * np.linspace(1, 1.2, 60) * noise(60)), 0.95)
    assert drift.verdict == "drifts"
    assert drift.reasons[0].startswith("latency changes by +1")
    assert drift.change_percent == pytest.approx(100 * 0.2 / 1.1, abs=1.5)
    assert drift.slope_percent_per_hour == pytest.approx(drift.change_percent * 6, rel=0.01)
    assert drift.change_percent_low < drift.change_percent < drift.change_percent_high


def test_a_slope_that_is_sure_but_small_does_not_matter():
    drift = drift_of(windows_of(5 * np.linspace(1, 1.02, 60) * noise(60, 0.001)), 0.95)
    assert drift.change_percent_low > 0
    assert drift.verdict == "stable"


@pytest.mark.parametrize(("windows", "share"), [(5, 0.2), (60, 0.5)])
def test_a_soak_too_short_or_too_noisy_cannot_tell(windows, share):
    drift = drift_of(windows_of(5 * noise(windows, share)), 0.95)
    assert max(-drift.change_percent_low, drift.change_percent_high) > 5
    assert (drift.verdict, drift.reasons) == ("cannot tell", [])


def test_single_slow_windows_are_no_drift():
    latency = 5 * noise(60)
    latency[[50, 55]] *= 10
    assert drift_of(windows_of(latency), 0.95).verdict == "stable"


def test_memory_that_grows_and_answers_that_change_are_drift():
    leak = drift_of(windows_of(5 * noise(60), rss=lambda index: (100 + index) * MEGABYTE), 0.95)
    assert leak.verdict == "drifts"
    assert leak.rss_growth_bytes == 30 * MEGABYTE
    assert leak.reasons == ["memory grows by 31.5 MB"]
    changed = drift_of(windows_of(5 * noise(60), wrong=2), 0.95)
    assert changed.reasons == ["2 answers changed"]
    assert memory_growth([None] * 8) == (None, 0.0)


def test_the_interval_covers_the_slope_nearly_as_often_as_it_says_where_neighbours_depend_on_each_other():
    generator, covered = np.random.default_rng(1), 0
    times = np.arange(80.0)
    for _ in range(200):
        values = np.zeros(80)
        for index in range(1, 80):
            values[index] = 0.4 * values[index - 1] + generator.standard_normal()
        low, _, high = slope_interval(times, values + 0.1 * times, 0.9)
        covered += low <= 0.1 <= high
    assert covered / 200 > 0.8  # 0.73 were they taken to be independent


def test_long_soaks_are_averaged_down_to_few_points():
    values = np.linspace(0, 1, 20_000)
    assert slope_interval(np.arange(20_000.0), values, 0.95) == pytest.approx((1 / 19_999,) * 3, rel=1e-6)
