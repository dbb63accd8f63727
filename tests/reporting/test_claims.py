import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import EDGE, change_arrays, change_profile, params_of, write_run

from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.claims import (
    FAILS,
    HOLDS,
    NOT_TESTED,
    ONLY_AS_COUNTED,
    assess,
    read_claims,
    verdict_at_least,
    verdict_at_most,
)
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import VERDICT_CLASS
from stages.reporting.rows import assemble_groups, assemble_rows

KEYS = ["id", "claim", "published", "ours_as_counted_there", "ours_honest", "verdict", "how", "run_id", "variants"]


def verdicts(run: Run) -> dict[str, dict]:
    groups = assemble_groups(run)
    return {entry["id"]: entry for entry in assess(read_claims(), run, assemble_rows(run, groups), groups)}


def run_with(folder: Path, monkeypatch: pytest.MonkeyPatch, params: dict, **settings) -> Run:
    write_run(folder, params, **settings)
    monkeypatch.chdir(folder)
    return read_run(load_params(Params))


@pytest.mark.parametrize(
    ("there", "honest", "expected"),
    [(0.95, 0.95, HOLDS), (0.93, 0.91, HOLDS), (0.95, 0.0, ONLY_AS_COUNTED), (0.5, 0.0, FAILS), (0.5, 0.99, HOLDS)],
)
def test_an_effect_of_at_least_the_published_size(there: float, honest: float, expected: str):
    assert verdict_at_least(0.95, 0.05, there, honest) == expected


def test_an_effect_of_at_most_a_limit():
    assert verdict_at_most(0.05, 0.0, 0.0) == HOLDS
    assert verdict_at_most(0.05, 0.0, 0.5) == ONLY_AS_COUNTED
    assert verdict_at_most(0.05, 0.5, 0.5) == FAILS


def test_fewer_parameters_hold_only_as_counted_there(run: Run):
    found = verdicts(run)
    assert found["dynamic_quantization_params_reduction"]["verdict"] == ONLY_AS_COUNTED
    assert found["dynamic_quantization_params_reduction"]["ours_honest"] == 0
    assert found["dynamic_quantization_params_reduction"]["ours_as_counted_there"] == pytest.approx(0.94, abs=1e-4)
    assert found["combination_params_reduction"]["verdict"] == ONLY_AS_COUNTED
    assert found["combination_params_reduction"]["ours_honest"] == pytest.approx(0.75)
    assert found["combination_macs_reduction"]["verdict"] == ONLY_AS_COUNTED


def test_sizes_are_those_of_the_saved_weights_in_both_columns(run: Run):
    found = verdicts(run)
    rows = {row["variant"]: row for row in assemble_rows(run, assemble_groups(run))}
    weights, onnx = (
        1 - rows["atto-oto50-int8"][key] / rows["atto-none-fp32"][key] for key in ("artifact_bytes", "size_bytes")
    )
    entry = found["combination_size_reduction"]
    assert entry["ours_honest"] == entry["ours_as_counted_there"] == pytest.approx(weights, abs=1e-6)
    assert f"model.onnx shrinks by {100 * onnx:.1f} %" in entry["how"]
    assert found["structured_pruning_size_reduction"]["verdict"] == HOLDS
    assert found["combination_beats_each_part"]["verdict"] == HOLDS


@pytest.mark.parametrize("reduction", [0.80, 0.876])
def test_a_narrow_network_whose_convolutions_stay_visible_shows_the_artefact_too(tmp_path, monkeypatch, reduction):
    write_run(tmp_path, params_of())
    change_profile(tmp_path, "atto-none-int8", params_visible=round(2_400_000 * (1 - reduction)))
    monkeypatch.chdir(tmp_path)
    found = verdicts(read_run(load_params(Params)))["dynamic_quantization_params_reduction"]
    assert found["ours_as_counted_there"] == pytest.approx(reduction)
    assert found["verdict"] == ONLY_AS_COUNTED
    assert "short by 0.2;" in found["how"]
    assert "short by 0.05." in found["how"]


def test_the_wide_tolerance_does_not_reach_the_honest_column(tmp_path, monkeypatch):
    assert verdict_at_least(0.95, 0.05, 0.8, 0.8, tolerance_there=0.2) == ONLY_AS_COUNTED
    write_run(tmp_path, params_of())
    change_profile(tmp_path, "atto-none-int8", params_visible=800_000)
    monkeypatch.chdir(tmp_path)
    assert verdicts(read_run(load_params(Params)))["dynamic_quantization_params_reduction"]["verdict"] == FAILS


def test_claims_are_answered_at_the_operating_point_of_the_study(tmp_path, monkeypatch):
    oto = {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "continued": {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5},
        "oto50": oto | {"group_sparsity": 0.5},
        "oto90": oto | {"group_sparsity": 0.9},
    }
    write_run(tmp_path, params_of(pruners=pruners, variants=[(p, q) for p in pruners for q in ("fp32", "int8")]))
    dense = 10_000_000
    change_profile(tmp_path, "atto-none-fp32", artifact_bytes=dense)
    for variant, left in {"oto50-fp32": 0.27, "oto90-fp32": 0.05, "oto50-int8": 0.11, "oto90-int8": 0.02}.items():
        change_profile(tmp_path, f"atto-{variant}", artifact_bytes=round(dense * left))
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    found = verdicts(run)
    assert found["structured_pruning_size_reduction"]["variants"] == ["atto-oto50-fp32"]
    gain = 100 * (run.variants["atto-oto50-int8"].correct.mean() - run.variants["atto-none-fp32"].correct.mean())
    for key in ("size_reduction", "params_reduction", "macs_reduction", "top1_gain", "beats_each_part"):
        entry = found[f"combination_{key}"]
        assert entry["variants"][0] == "atto-oto50-int8"
        assert "Variant: atto-oto50-int8" in entry["how"]
        assert f"top-1 less that of dense: {gain:+.2f} points" in entry["how"]


def test_unstructured_pruning_is_judged_by_time(tmp_path, monkeypatch):
    write_run(tmp_path, params_of())
    path = tmp_path / "reports/edge/edge.json"
    edge = json.loads(path.read_text())
    time = {row["variant"]: row for row in edge["rows"] if row["runtime"] == "onnxruntime"}
    time["atto-l1-fp32"]["latency_ms_p50"] = 0.7 * time["atto-none-fp32"]["latency_ms_p50"]
    path.write_text(json.dumps(edge))
    monkeypatch.chdir(tmp_path)
    found = verdicts(read_run(load_params(Params)))["unstructured_pruning_macs_reduction"]
    assert found["ours_as_counted_there"] == 0
    assert found["ours_honest"] == pytest.approx(0.3)
    assert found["verdict"] == ONLY_AS_COUNTED
    assert "zeros by definition" in found["how"]


def test_every_entry_has_the_keys_and_verdicts_of_the_design(run: Run):
    entries = verdicts(run).values()
    assert [list(entry) for entry in entries] == [KEYS] * len(entries)
    assert {entry["verdict"] for entry in entries} <= set(VERDICT_CLASS)
    assert {entry["run_id"] for entry in entries} == {run.run_id}
    assert all(variant in run.variants for entry in entries for variant in entry["variants"])


def test_a_gain_that_more_training_explains_holds_only_as_counted_there(tmp_path, monkeypatch):
    accuracy = {"none": 0.7, "continued": 0.76, "oto50": 0.76}
    run = run_with(tmp_path, monkeypatch, params_of(), n=2000, accuracy=accuracy)
    assert verdicts(run)["combination_top1_gain"]["verdict"] == ONLY_AS_COUNTED


def test_a_gain_beyond_more_training_holds(tmp_path, monkeypatch):
    accuracy = {"none": 0.7, "continued": 0.71, "oto50": 0.8}
    run = run_with(tmp_path, monkeypatch, params_of(), n=2000, accuracy=accuracy)
    found = verdicts(run)["combination_top1_gain"]
    assert found["verdict"] == HOLDS
    assert found["variants"] == ["atto-oto50-int8", "atto-continued-fp32"]


def test_a_gain_that_chance_explains_does_not_hold(tmp_path, monkeypatch):
    accuracy = {"none": 0.76, "continued": 0.7, "oto50": 0.76}
    run = run_with(tmp_path, monkeypatch, params_of(), n=20, accuracy=accuracy)
    found = verdicts(run)["combination_top1_gain"]
    assert found["ours_honest"] >= 0.03
    assert found["verdict"] == FAILS


def test_a_gain_over_dense_that_chance_explains_is_none_as_counted_there_either(tmp_path, monkeypatch):
    accuracy = {"none": 0.7, "continued": 0.76, "oto50": 0.76}
    run = run_with(tmp_path, monkeypatch, params_of(), n=20, accuracy=accuracy)
    found = verdicts(run)["combination_top1_gain"]
    assert found["ours_as_counted_there"] >= 0.03
    assert found["verdict"] == FAILS


def test_without_room_a_gain_is_not_tested(tmp_path, monkeypatch):
    write_run(tmp_path, params_of())
    path = tmp_path / "reports/profile/atto-none-fp32/predictions.npz"
    change_arrays(path, lambda stored: stored | {"predicted": stored["label"]})
    change_profile(tmp_path, "atto-none-fp32", top1=1.0)
    monkeypatch.chdir(tmp_path)
    found = verdicts(read_run(load_params(Params)))["combination_top1_gain"]
    assert found["verdict"] == NOT_TESTED
    assert "no room to gain +3.80 points" in found["how"]


def test_claims_without_their_variants_are_not_tested(tmp_path, monkeypatch):
    params = params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    found = verdicts(run_with(tmp_path, monkeypatch, params))
    assert {entry["verdict"] for entry in found.values()} == {NOT_TESTED}
    assert all(entry["ours_honest"] is None for entry in found.values())


@pytest.mark.parametrize(
    ("top1", "high", "verdict"), [(0.842, 0.92, FAILS), (0.842, 0.925, NOT_TESTED), (0.925, 0.94, HOLDS)]
)
def test_printed_images_answer_by_their_interval_and_few_are_told_to_be_few(tmp_path, monkeypatch, top1, high, verdict):
    write_run(tmp_path, params_of() | {"edge_benchmark": EDGE})
    path = tmp_path / "reports/edge/printed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top1_printed": top1, "top1_printed_ci_high": high}))
    monkeypatch.chdir(tmp_path)
    found = verdicts(read_run(load_params(Params)))["edge_top1"]
    assert (found["verdict"], found["ours_honest"], found["variants"]) == (verdict, top1, ["atto-oto50-int8"])
    assert "no count of 20 gives 92.5 %" in found["how"]
    assert "from 69.9 % to 97.2 % possible" in found["how"]
    assert "1,000 test images" in found["how"]
    assert ("Too few images to tell" in found["how"]) == (verdict == NOT_TESTED)


def test_what_needs_a_camera_or_weights_is_not_tested(run: Run):
    found = verdicts(run)
    assert [found[key]["verdict"] for key in ("edge_top1", "edge_latency_ms", "pretraining_top1_delta")] == [
        NOT_TESTED
    ] * 3


def test_pretrained_networks_are_compared_with_their_twins_from_scratch(tmp_path, monkeypatch):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"scratch": network, "tuned": network | {"weights": "pretrained"}}
    run = run_with(tmp_path, monkeypatch, params_of(models=models), accuracy={"none": 0.8})
    found = verdicts(run)["pretraining_top1_delta"]
    assert found["verdict"] in (HOLDS, FAILS)
    assert "tuned-oto50-int8" in found["variants"]
    assert "scratch-oto50-int8" in found["variants"]
    assert "tuned-continued-fp32" not in found["variants"]  # nothing is compressed in a control
    assert "(approximate)" in found["how"]


def test_seeds_are_averaged(seeds_run: Run):
    found = verdicts(seeds_run)["combination_top1_gain"]
    assert "3 seeds" in found["how"]
    tops = {v: m.correct.mean() for v, m in seeds_run.variants.items()}
    seeds = ("atto", "atto-s1", "atto-s2")
    gains = [tops[f"{s}-oto50-int8"] - tops[f"{s}-none-fp32"] for s in seeds]
    assert "not training again: over 3 seeds the gain over dense has a standard deviation of" in found["how"]
    assert f"{100 * np.std(gains, ddof=1):.2f} points" in found["how"]
    expected = sum(tops[f"{s}-oto50-int8"] - tops[f"{s}-none-fp32"] for s in seeds) / 3
    assert found["ours_as_counted_there"] == pytest.approx(expected, abs=1e-6)
