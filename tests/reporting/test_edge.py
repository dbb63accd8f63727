import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_run import EDGE, change_profile, params_of, write_run

from stages.common.errors import UserError
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.edge import exports_of, marks_of, printed_lines, runtimes_of, soak_lines, too_few_images
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import draw_all, soak
from stages.reporting.rows import assemble_groups, assemble_rows, choose, describe_run

VARIANT = "atto-oto50-int8"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_run(tmp_path, params_of() | {"edge_benchmark": EDGE})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_edge(folder, **values):
    path = folder / "reports/edge/edge.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_fastest_runtime_of_each_variant_is_named_with_its_lead(folder):
    table = runtimes_of(read_run(load_params(Params)))
    assert table.names == ["onnxruntime", "openvino", "torch-eager"]
    lines = {line[0]: line[1:] for line in table.lines}
    assert lines["atto-none-fp32"][-1] == "openvino (2.00\u00d7 as fast as onnxruntime)"
    assert lines["atto-none-fp32"][2].startswith("8.00 ms")
    assert lines[VARIANT][1:] == ("\u2013", "\u2013", "onnxruntime")  # OpenVINO does not run it
    assert lines["atto-l1-fp32"][2] == "\u2013"  # PyTorch times the dense network alone


def test_what_is_not_installed_and_what_did_not_run_is_told(folder):
    table = runtimes_of(read_run(load_params(Params)))
    assert table.missing == ["executorch is not installed: do this"]
    assert table.refused == ["openvino does not run it: why"]


def test_there_is_no_table_where_no_other_runtime_was_asked_for(run):
    assert runtimes_of(run) is None
    assert (soak_lines(run), printed_lines(run), soak(run), marks_of(run, run.variants)) == ([], [], None, [])


def test_a_busy_throttled_or_unsteady_run_is_marked(folder):
    rows = json.loads((folder / "reports/edge/edge.json").read_text())["rows"]
    rows[0]["unsteady"] = True
    change_edge(folder, busy=True, throttled=True, rows=rows)
    run = read_run(load_params(Params))
    busy, throttled, unsteady = marks_of(run, run.variants)
    assert "Other programs" in busy
    assert "slowed down" in throttled
    assert unsteady.endswith("atto-none-fp32 in onnxruntime.")
    assert marks_of(run, [VARIANT]) == [busy, throttled]


def test_speed_ups_that_the_run_before_told_otherwise_are_marked(folder):
    repeat = {"run_id": "before", "compared": 6, "largest": 0.096, "apart": [f"{VARIANT} in onnxruntime"]}
    change_edge(folder, repeat=repeat)
    run = read_run(load_params(Params))
    (mark,) = marks_of(run, [VARIANT])
    assert "run before (before, same machine and files)" in mark
    assert mark.endswith(f"more than 5 % (at most 9.6 %): {VARIANT} in onnxruntime.")
    assert marks_of(run, ["atto-l1-fp32"]) == []
    change_edge(folder, repeat=None)
    assert marks_of(read_run(load_params(Params)), run.variants) == []


def test_a_file_that_is_not_faithful_to_its_artifact_is_named(folder):
    run = read_run(load_params(Params))
    assert exports_of(run, run.variants) == []
    change_profile(folder, "atto-none-fp32", agreement=0.99)
    change_profile(folder, "atto-l1-fp32", agreement=0.9975)  # one image of 400
    top1 = json.loads((folder / "reports/profile" / VARIANT / "profile.json").read_text())["top1"]
    change_profile(folder, VARIANT, quantized_operators=5, agreement=0.9, top1_torch=top1 - 0.01)
    run = read_run(load_params(Params))
    assert exports_of(run, run.variants) == [
        "atto-none-fp32 (the same class on 99.00 %)",
        f"{VARIANT} (top-1 1.00 % apart)",
    ]
    assert marks_of(run, run.variants)[-1].startswith(
        "model.onnx does not do what the PyTorch artifact does: atto-none-fp32"
    )


def render(run: Run) -> str:
    groups = assemble_groups(run)
    rows, choices = assemble_rows(run, groups), choose(run)
    return render_page(run, rows, groups, choices, [], draw_all(run, rows, groups, choices))


def test_soak_and_printed_samples_stand_on_the_page_with_their_figures(folder):
    run = read_run(load_params(Params))
    page = render(run)
    for words in (
        "stable",
        "0 of 10,800",
        "+0.05 % [\N{MINUS SIGN}1.00, +1.10]",
        "84.20 % [81.80 %, 86.30 %]",
        "1,000, seed 0",
        "executorch is not installed",
    ):
        assert words in page
    assert "Soak of atto-oto50-int8: stable" in page
    assert "1.50 ms to 1.50 ms" in soak(run).alt
    assert describe_run(run)["printed"]["top1_printed"] == 0.842


def test_a_device_without_pytorch_has_its_baseline_in_onnx_runtime(folder):
    rows = json.loads((folder / "reports/edge/edge.json").read_text())["rows"]
    rows = [row | {"baseline_runtime": "onnxruntime"} for row in rows if row["runtime"] == "onnxruntime"]
    change_edge(folder, rows=rows, left_out=[])
    run = read_run(load_params(Params))
    assert run.baselines["atto"]["runtime"] == "onnxruntime"
    assert describe_run(run)["baseline_runtime"] == "ONNX Runtime"


def test_a_soak_or_printed_samples_of_another_run_are_refused_by_name(folder):
    printed = folder / "reports/edge/printed.json"
    content = json.loads(printed.read_text())
    printed.write_text(json.dumps(content | {"onnx_sha256": "0" * 64}))
    with pytest.raises(UserError, match=rf"{VARIANT}: .*printed.json is about {VARIANT}, model.onnx 000000000000"):
        read_run(load_params(Params))
    printed.unlink()
    with pytest.raises(UserError, match=rf"{VARIANT}: .*printed.json is missing"):
        read_run(load_params(Params))
    printed.write_text(json.dumps(content))
    change_edge(folder, soak=None)
    with pytest.raises(UserError, match=rf"{VARIANT}: .*edge.json holds no soak of it"):
        read_run(load_params(Params))


def test_a_dense_network_at_chance_and_very_few_validation_images_are_told(run):
    dense = "atto-none-fp32"
    assert too_few_images(run, run.variants) == []
    most = float(np.bincount(run.labels).max() / len(run.labels))
    measured = run.variants[dense]
    poor = replace(measured, profile=measured.profile | {"top1": most + 0.01, "n_validation": 24})
    too_poor = replace(run, variants=run.variants | {dense: poor})
    chance, few = too_few_images(too_poor, [dense])
    assert "Ship this one: " in render(run)
    assert "Ship this one: " not in render(too_poor)
    assert "Nothing to ship yet, for the reasons below. This would be the smallest" in render(too_poor)
    assert chance.startswith(f"{dense} is not surely better than always giving the most frequent class")
    assert few.startswith("With 24 validation images one of them is 4.2 %, more than report.headline_max_drop (1.0 %)")
