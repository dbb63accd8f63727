import json
import re

import onnxruntime
from toy_bundle import VARIANT, on_device, toy_bundle

from stages.common.files import sha256_of


def test_bench_prints_and_writes_the_figures_and_the_machine(tmp_path):
    out = tmp_path / "bench.json"
    done = on_device(toy_bundle(), "bench.py", "--seconds", 0.3, "--json", out)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(out.read_text())
    assert set(result) == {
        *("variant", "onnx_sha256", "started", "busy", "throttled", "batch", "threads", "warmup_runs", "windows"),
        *("window_seconds", "energy_mj_per_image"),
        *("latency_ms_p50", "latency_ms_p95", "latency_ms_p99", "latency_ms_min", "throughput_per_s", "runs"),
        *("latency_ms_p50_fastest_window", "latency_ms_p50_slowest_window"),
        *("import_ms", "load_ms", "first_inference_ms", "peak_rss_bytes", "machine"),
    }
    assert (result["variant"], result["batch"], result["threads"]) == (VARIANT, 1, 1)
    assert result["onnx_sha256"] == sha256_of(toy_bundle() / "model.onnx")
    ordered = [result[f"latency_ms_{name}"] for name in ("min", "p50", "p95", "p99")]
    assert ordered == sorted(ordered)
    assert ordered[0] > 0
    fastest, slowest = (result[f"latency_ms_p50_{name}_window"] for name in ("fastest", "slowest"))
    assert fastest <= result["latency_ms_p50"] <= slowest
    assert result["runs"] >= 50
    assert 20 * 2**20 < result["peak_rss_bytes"] < 2**30
    assert min(result["import_ms"], result["load_ms"], result["first_inference_ms"]) > 0
    machine = result["machine"]
    assert machine["onnxruntime"] == onnxruntime.__version__
    assert "torch" not in machine
    for key in ("load_average_1min", "frequency_mhz", "temperature_c", "others_cores"):
        assert {f"{key}_before", f"{key}_{'during' if key == 'others_cores' else 'after'}"} <= set(machine)
    others = max(machine["others_cores_before"], machine["others_cores_during"])
    assert result["busy"] == (others > machine["busy_above_cores"])
    assert re.search(rf"p50 {result['latency_ms_p50']:.3f} ms", done.stdout)
    assert ("busy  " in done.stdout) == result["busy"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_impossible_options_are_refused_before_the_timing(tmp_path):
    for path, words in [(tmp_path / "none" / "bench.json", "there is no folder"), (tmp_path, "it is a folder")]:
        done = on_device(toy_bundle(), "bench.py", "--seconds", 3000, "--json", path)
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr
    for seconds in ("0", "nan", "inf"):
        assert on_device(toy_bundle(), "bench.py", f"--seconds={seconds}").returncode == 2
