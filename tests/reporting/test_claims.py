from pathlib import Path

import pytest
from synthetic_run import params_of, write_run

from stages.common.params import load_params
from stages.reporting.claims import (
    FAILS,
    HOLDS,
    NOT_TESTED,
    ONLY_AS_COUNTED,
    VERDICTS,
    assess,
    read_claims,
    verdict_at_least,
    verdict_at_most,
)
from stages.reporting.inputs import Run, read_run
from stages.reporting.rows import assemble_groups, assemble_rows

KEYS = ["id", "claim", "published", "ours_as_counted_there", "ours_honest", "verdict", "how", "run_id", "variants"]


def verdicts(run: Run) -> dict[str, dict]:
    groups = assemble_groups(run)
    return {entry["id"]: entry for entry in assess(read_claims(), run, assemble_rows(run, groups), groups)}


def run_with(folder: Path, monkeypatch: pytest.MonkeyPatch, params: dict, **settings) -> Run:
    write_run(folder, params, **settings)
    monkeypatch.chdir(folder)
    return read_run(load_params())


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


def test_sizes_are_those_of_the_files(run: Run):
    found = verdicts(run)
    rows = {row["variant"]: row for row in assemble_rows(run, assemble_groups(run))}
    expected = 1 - rows["atto-oto50-int8"]["size_bytes"] / rows["atto-none-fp32"]["size_bytes"]
    assert found["combination_size_reduction"]["ours_honest"] == pytest.approx(expected, abs=1e-6)
    assert found["structured_pruning_size_reduction"]["verdict"] == HOLDS
    assert found["combination_beats_each_part"]["verdict"] == HOLDS


def test_every_entry_has_the_keys_and_verdicts_of_the_design(run: Run):
    entries = verdicts(run).values()
    assert [list(entry) for entry in entries] == [KEYS] * len(entries)
    assert {entry["verdict"] for entry in entries} <= set(VERDICTS)
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


def test_claims_without_their_variants_are_not_tested(tmp_path, monkeypatch):
    params = params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    found = verdicts(run_with(tmp_path, monkeypatch, params))
    assert {entry["verdict"] for entry in found.values()} == {NOT_TESTED}
    assert all(entry["ours_honest"] is None for entry in found.values())


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


def test_seeds_are_averaged(seeds_run: Run):
    found = verdicts(seeds_run)["combination_top1_gain"]
    assert "3 seeds" in found["how"]
    tops = {v: m.correct.mean() for v, m in seeds_run.variants.items()}
    seeds = ("atto", "atto-s1", "atto-s2")
    expected = sum(tops[f"{s}-oto50-int8"] - tops[f"{s}-none-fp32"] for s in seeds) / 3
    assert found["ours_as_counted_there"] == pytest.approx(expected, abs=1e-6)
