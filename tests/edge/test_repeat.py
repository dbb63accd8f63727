import copy

import pytest

from stages.edge.repeat import Repeat, repeat_of


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


def test_a_run_that_tells_the_same_is_within_five_per_cent():
    again = copy.deepcopy(result())
    again["rows"][1]["latency_ratio"] = 3.12
    assert repeat_of(again, result()) == Repeat("first", 2, pytest.approx(0.04), [])


def test_speed_ups_that_changed_by_more_are_named():
    again = copy.deepcopy(result())
    again["rows"][2]["latency_ratio"] = 7.5
    assert repeat_of(again, result()) == Repeat("first", 2, pytest.approx(0.0625), ["a-oto-int8 in onnxruntime"])


@pytest.mark.parametrize("key", ["target", "machine", "protocol"])
def test_runs_on_another_machine_or_by_another_protocol_are_not_compared(key):
    other = {"cpu": "two"} if key == "machine" else "other"
    assert repeat_of(result() | {key: other}, result()) is None
    warmer = result() | {"machine": {"cpu": "one", "temperature_c_before": 70}}
    assert repeat_of(warmer, result()) is not None


def test_other_files_are_not_compared():
    again = copy.deepcopy(result())
    again["rows"][2] |= {"onnx_sha256": "new", "latency_ratio": 20.0}
    assert repeat_of(again, result()) == Repeat("first", 1, 0.0, [])


@pytest.mark.parametrize("before", [None, [], {}, result() | {"rows": []}, result() | {"rows": [{}]}])
def test_without_a_run_before_there_is_nothing_to_tell(before):
    assert repeat_of(result(), before) is None
