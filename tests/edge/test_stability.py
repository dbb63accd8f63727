import copy

import numpy as np
import pytest

from stages.edge.stability import drift_of, repeat_of, slope_interval

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


def noise(n, std=0.01):
    return 1 + std * np.random.default_rng(0).standard_normal(n)


def test_a_steady_soak_is_stable_despite_single_slow_windows():
    latency = 5 * noise(60)
    drift = drift_of(windows_of(latency), 0.95)
    assert (drift["verdict"], drift["reasons"]) == ("stable", [])
    assert drift["change_percent_low"] <= 0 <= drift["change_percent_high"]
    assert (drift["soak_seconds"], drift["soak_runs"], drift["late"], drift["wrong"]) == (600, 3000, 60, 0)
    assert drift["latency_ms_p50"] == pytest.approx(5, rel=0.01)
    latency[[50, 55]] *= 10
    assert drift_of(windows_of(latency), 0.95)["verdict"] == "stable"


def test_a_slope_is_found_with_its_size():
    drift = drift_of(windows_of(5 * np.linspace(1, 1.2, 60) * noise(60)), 0.95)
    assert drift["verdict"] == "drifts"
    assert "latency changes by +1" in drift["reasons"][0]
    assert drift["change_percent"] == pytest.approx(100 * 0.2 / 1.1, abs=1.5)
    assert drift["slope_percent_per_hour"] == pytest.approx(drift["change_percent"] * 6, rel=0.01)
    assert drift["change_percent_low"] < drift["change_percent"] < drift["change_percent_high"]


def test_a_significant_but_small_slope_is_stable():
    drift = drift_of(windows_of(5 * np.linspace(1, 1.02, 60) * noise(60, 0.001)), 0.95)
    assert drift["change_percent_low"] > 0
    assert drift["verdict"] == "stable"


@pytest.mark.parametrize(("windows", "std"), [(5, 0.2), (60, 0.5)])
def test_a_soak_that_is_too_short_or_too_noisy_cannot_tell(windows, std):
    drift = drift_of(windows_of(5 * noise(windows, std)), 0.95)
    assert max(-drift["change_percent_low"], drift["change_percent_high"]) > 5
    assert (drift["verdict"], drift["reasons"]) == ("cannot tell", [])


def test_growing_memory_and_changed_answers_are_drift():
    leak = drift_of(windows_of(5 * noise(60), rss=lambda index: (100 + index) * MEGABYTE), 0.95)
    assert (leak["verdict"], leak["rss_growth_bytes"]) == ("drifts", 30 * MEGABYTE)
    assert "31.5 MB" in leak["reasons"][0]
    changed = drift_of(windows_of(5 * noise(60), wrong=2), 0.95)
    assert (changed["verdict"], changed["wrong"]) == ("drifts", 2)
    assert "answers" in changed["reasons"][0]


def test_the_interval_covers_the_slope_of_autocorrelated_values_nearly_at_its_level():
    generator, covered = np.random.default_rng(1), 0
    times = np.arange(80.0)
    for _ in range(200):
        values = np.zeros(80)
        for index in range(1, 80):
            values[index] = 0.4 * values[index - 1] + generator.standard_normal()
        low, _, high = slope_interval(times, values + 0.1 * times, 0.9)
        covered += low <= 0.1 <= high
    assert covered / 200 > 0.8  # 0.73 under the assumption of independence


def test_long_soaks_are_averaged_down_to_few_points():
    values = np.linspace(0, 1, 20_000)
    assert slope_interval(np.arange(20_000.0), values, 0.95) == pytest.approx((1 / 19_999,) * 3, rel=1e-6)


def result() -> dict:
    def row(variant: str, runtime: str, ratio: float) -> dict:
        base = {"baseline": "a-none-fp32", "baseline_runtime": "torch-eager"}
        return base | {"variant": variant, "runtime": runtime, "latency_ratio": ratio, "onnx_sha256": variant}

    return {
        "run_id": "first",
        "target": "local",
        "machine": {"cpu": "one"},
        "protocol": {"threads": 1},
        "rows": [
            row("a-none-fp32", "torch-eager", 1.0),
            row("a-none-fp32", "onnxruntime", 3.0),
            row("a-oto-int8", "onnxruntime", 8.0),
        ],
    }


@pytest.mark.parametrize(
    ("index", "change", "compared", "largest", "apart"),
    [
        (1, {"latency_ratio": 3.12}, 2, 0.04, []),
        (2, {"latency_ratio": 7.5}, 2, 0.0625, ["a-oto-int8 in onnxruntime"]),
        (2, {"latency_ratio": 20.0, "onnx_sha256": "new"}, 1, 0.0, []),
    ],
    ids=["within 5 %", "apart", "another file"],
)
def test_speed_ups_of_the_same_files_are_compared_with_the_previous_run(index, change, compared, largest, apart):
    again = copy.deepcopy(result())
    again["rows"][index] |= change
    found = {"run_id": "first", "compared": compared, "largest": pytest.approx(largest), "apart": apart}
    assert repeat_of(again, result()) == found


@pytest.mark.parametrize("key", ["target", "machine", "protocol"])
def test_runs_on_another_machine_or_with_another_protocol_are_not_compared(key):
    other = {"cpu": "two"} if key == "machine" else "other"
    assert repeat_of(result() | {key: other}, result()) is None
    warmer = result() | {"machine": {"cpu": "one", "temperature_c_before": 70}}
    assert repeat_of(warmer, result()) is not None


@pytest.mark.parametrize("before", [None, [], {}, result() | {"rows": []}, result() | {"rows": [{}]}])
def test_without_a_previous_run_there_is_no_comparison(before):
    assert repeat_of(result(), before) is None
