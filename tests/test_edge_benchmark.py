import csv
import json
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_project import compressed_project

from stages import edge_benchmark
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.edge import local
from stages.params.edge_benchmark import EdgeBenchmark

FP32, INT8 = "toy-none-fp32", "toy-none-int8"
MISSING = "torch-compile is not installed: do this"
QUICK = {"start_up_runs": 1, "quiet_seconds": 1}
protocol_of = edge_benchmark.protocol_of


def change_params(folder, **edge_benchmark):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["edge_benchmark"] |= edge_benchmark
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def quick_protocol(section):
    return replace(protocol_of(section), **QUICK)


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    monkeypatch.setattr(edge_benchmark, "protocol_of", quick_protocol)
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of the stage, read by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(compressed_project(tmp_path_factory.mktemp("edge")))
        patch.setattr(edge_benchmark, "protocol_of", quick_protocol)
        change_params(
            Path(),
            soak={"variant": INT8, "minutes": 0.01, "window_seconds": 0.1},
            printed={"variant": INT8, "images": 20, "seed": 3},
            runtimes=["onnxruntime", "torch-compile"],
        )
        patch.setattr(local, "not_installed", lambda runtime: MISSING if runtime.name == "torch-compile" else None)
        edge_benchmark.main()
        with (paths.EDGE / "windows.csv").open(newline="") as file:
            windows = list(csv.DictReader(file))
        files = sorted(path.name for path in paths.EDGE.iterdir())
        hashes = {variant: sha256_of(paths.compressed(variant) / "model.onnx") for variant in (FP32, INT8)}
        edge = json.loads((paths.EDGE / "edge.json").read_text())
        edge["printed"] = json.loads((paths.EDGE / "printed.json").read_text())
        with (paths.EDGE / "soak.csv").open(newline="") as file:
            edge["soak_rows"] = list(csv.DictReader(file))
        return edge, windows, files, hashes


def test_all_variants_and_the_eager_baseline_have_a_row(measured):
    edge, _, files, hashes = measured
    rows = {(row["variant"], row["runtime"]): row for row in edge["rows"]}
    assert list(rows) == [(FP32, "onnxruntime"), (INT8, "onnxruntime"), (FP32, "torch-eager")]
    assert files == ["edge.json", "printed.json", "soak.csv", "windows.csv"]
    for (variant, _), row in rows.items():
        assert row["onnx_sha256"] == hashes[variant]
        assert 0 < row["latency_ms_min"] <= row["latency_ms_p50"] <= row["latency_ms_p95"]
        assert row["latency_ratio_low"] <= row["latency_ratio"] <= row["latency_ratio_high"]
        assert row["throughput_per_s"] > 0
        assert row["load_ms"] > 0
        assert row["first_inference_ms"] > 0
        assert 20 * 2**20 < row["peak_rss_bytes"] < 4 * 2**30
    eager = rows[FP32, "torch-eager"]
    assert (eager["latency_ratio"], eager["latency_ratio_low"], eager["latency_ratio_high"]) == (1, 1, 1)
    assert eager["peak_rss_bytes"] > 1.5 * rows[FP32, "onnxruntime"]["peak_rss_bytes"]  # torch alone is larger


def test_the_result_has_the_run_id_the_machine_and_the_protocol(measured):
    edge = measured[0]
    assert re.fullmatch("[0-9a-f]{12}", edge["run_id"])
    assert datetime.fromisoformat(edge["started"]).utcoffset().total_seconds() == 0
    assert isinstance(edge["busy"], bool)
    assert isinstance(edge["throttled"], bool)
    assert edge["target"] == "local"
    assert 0 < edge["overhead_ns"] < 0.01 * 1e6 * min(row["latency_ms_p50"] for row in edge["rows"])
    assert edge["machine"]["cpu"]
    assert {"load_average_1min_before", "load_average_1min_after", "others_cores_during"} <= edge["machine"].keys()
    assert edge["protocol"]["windows"] == 2
    assert edge["protocol"]["threads"] == 1


def test_windows_add_up_to_the_rows(measured):
    edge, windows, _, _ = measured
    assert len(windows) == 2 * len(edge["rows"])
    assert list(windows[0]) == ["variant", "runtime", "round", "order", "runs", "p50_ms", "p95_ms", "min_ms"]
    for row in edge["rows"]:
        own = [w for w in windows if (w["variant"], w["runtime"]) == (row["variant"], row["runtime"])]
        assert sum(int(w["runs"]) for w in own) == row["runs"]
        assert min(float(w["min_ms"]) for w in own) == row["latency_ms_min"]
        eager = [w for w in windows if (w["variant"], w["runtime"]) == (FP32, "torch-eager")]
        ratios = [float(b["p50_ms"]) / float(w["p50_ms"]) for b in eager for w in own if b["round"] == w["round"]]
        assert row["latency_ratio"] == pytest.approx(np.median(ratios))


def refused_before_the_timing(monkeypatch, words):
    monkeypatch.setattr(edge_benchmark, "time_here", lambda *_: pytest.fail("timed"))
    with pytest.raises(UserError, match=words):
        edge_benchmark.main()
    assert not paths.EDGE.exists()


@pytest.mark.parametrize("file", ["model.onnx", "model.json"])
def test_a_missing_or_changed_artifact_is_refused_before_the_timing(project, monkeypatch, file):
    with (paths.compressed(FP32) / "model.onnx").open("ab") as model:
        model.write(b"\0")
    refused_before_the_timing(monkeypatch, rf"{FP32}/model\.onnx is not the file")
    (paths.compressed(FP32) / file).unlink()
    refused_before_the_timing(monkeypatch, rf"{FP32}.*{file} is missing")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threads": 3}, r"edge_benchmark\.threads = 3: .* 2 cores: lower it"),
        ({"affinity": [4095]}, r"edge_benchmark\.affinity names core 4095"),
        ({"printed": {"variant": INT8, "images": 51}}, r"edge_benchmark\.printed\.images = 51: give 1 to 50"),
        ({"printed": {"variant": "another"}}, r"edge_benchmark\.printed\.variant = 'another': not listed"),
        ({"soak": {"variant": "another", "minutes": 1}}, r"\.soak\.variant = 'another': not listed"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_before_the_timing(project, monkeypatch, settings, words):
    monkeypatch.setattr(edge_benchmark, "usable_cores", lambda: 2)
    change_params(project, **settings)
    refused_before_the_timing(monkeypatch, words)


def test_as_many_threads_as_cores_are_allowed(project, monkeypatch):
    change_params(project, threads=3)
    monkeypatch.setattr(edge_benchmark, "usable_cores", lambda: 3)
    with pytest.raises(pytest.fail.Exception, match="timed"):
        refused_before_the_timing(monkeypatch, "not refused")


def test_a_missing_runtime_is_listed(measured):
    edge = measured[0]
    assert edge["left_out"] == [{"variant": None, "runtime": "torch-compile", "reason": MISSING}]


def test_the_soak_and_the_printed_samples_have_results(measured):
    edge = measured[0]
    soak = edge["soak"]
    assert (soak["variant"], soak["minutes"], soak["wrong"]) == (INT8, 0.01, 0)
    assert soak["soak_seconds"] >= 0.6
    assert soak["verdict"] in ("stable", "drifts", "cannot tell")
    assert (soak["verdict"] == "drifts") == bool(soak["reasons"])
    assert len(edge["soak_rows"]) >= 4
    assert sum(int(row["runs"]) for row in edge["soak_rows"]) == soak["soak_runs"]
    printed = edge["printed"]
    assert (printed["variant"], printed["n_images"], printed["seed"]) == (INT8, 20, 3)
    assert printed["onnx_sha256"] == next(row for row in edge["rows"] if row["variant"] == INT8)["onnx_sha256"]


def test_printed_images_are_filmed_before_the_timing(project, monkeypatch):
    change_params(project, printed={"variant": INT8, "images": 5})

    def full(*_):
        raise UserError("no space left")

    monkeypatch.setattr(edge_benchmark, "printed_row", full)
    monkeypatch.setattr(edge_benchmark, "run_timing", lambda params: pytest.fail("timed"))
    with pytest.raises(UserError, match="no space left"):
        edge_benchmark.main()


def test_the_protocol_comes_from_the_params():
    section = EdgeBenchmark(
        threads=2, warmup_runs=7, windows=3, window_seconds=0.5, seed=4, batch=2, minimum_runs=9, confidence=0.9
    )
    protocol = protocol_of(section)
    assert protocol.confidence == 0.9
    assert (protocol.threads, protocol.warmup_runs, protocol.windows, protocol.minimum_runs) == (2, 7, 3, 9)
    assert (protocol.window_seconds, protocol.seed, protocol.batch) == (0.5, 4, 2)


def test_a_second_run_is_compared_with_the_first(project, measured, monkeypatch, capsys):
    first = json.loads(json.dumps(measured[0]))
    assert first["repeat"] is None
    for row in first["rows"]:
        row["latency_ratio"] *= 1.0 if row["runtime"] == "torch-eager" else 100.0
    paths.EDGE.mkdir(parents=True)
    (paths.EDGE / "edge.json").write_text(json.dumps(first))
    monkeypatch.setattr(local, "measure_fresh", lambda *_: {"load_ms": 1.0})
    edge_benchmark.main()
    repeat = json.loads((paths.EDGE / "edge.json").read_text())["repeat"]
    assert (repeat["run_id"], repeat["compared"]) == (first["run_id"], 2)
    assert repeat["apart"] == [f"{variant} in onnxruntime" for variant in (FP32, INT8)]
    assert 0.5 < repeat["largest"] < 1
    assert f"speed-ups against run {first['run_id']}: 2 compared" in capsys.readouterr().out
