import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reporting.synthetic_run import params_of, read, write_run

from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import assemble_rows, groups_of
from studies.edge_ai import comparisons
from studies.edge_ai.comparisons import LEARNED, UNTRAINED, compared, contests_of, duels_of, search_of

BUDGET = {"epochs": 4, "learning_rate_factor": 0.5}
PRUNERS = {
    "none": {"method": "none"},
    "oto50": BUDGET | {"method": "oto", "group_sparsity": 0.5},
    "magnitude": BUDGET | {"method": "depgraph", "importance": "magnitude", "macs_reduction": 0.75},
    "longer": BUDGET | {"method": "depgraph", "importance": "magnitude", "macs_reduction": 0.75, "epochs": 40},
    "random": BUDGET | {"method": "random_structured", "macs_reduction": 0.4},
}
SEARCH = {"average_bits": 4.0, "evaluations": 100}
QUANTIZERS = {
    "uniform_4": {"method": "uniform_bits", "bits": 4},
    "random_4": SEARCH | {"method": "searched_bits", "search": "random"},
    "greedy_4": SEARCH | {"method": "searched_bits", "search": "greedy"},
    "other_4": SEARCH | {"method": "searched_bits", "search": "greedy", "evaluations": 40},
    "untrained_4": SEARCH | {"method": "learned_bits"},
    "learned_4": SEARCH | {"method": "learned_bits"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """Two seeds of a timm network and of a torchvision one."""
    folder = tmp_path_factory.mktemp("comparisons")
    network = {"input_size": 16, "library": "timm", "architecture": "convnext_atto"}
    other = network | {"library": "torchvision", "architecture": "convnext_tiny"}
    models = {f"atto-s{seed}": network | {"seed": seed} for seed in (0, 1)}
    models |= {f"tv-s{seed}": other | {"seed": seed} for seed in (0, 1)}
    pairs = [(pruner, "fp32") for pruner in PRUNERS] + [("none", quantizer) for quantizer in QUANTIZERS]
    params = params_of(models=models, pruners=PRUNERS, variants=pairs)
    params["quantizers"] |= QUANTIZERS
    left = {"oto50": 0.25, "magnitude": 0.255, "longer": 0.25, "random": 0.6}
    write_run(folder, params, 400, {"oto50": 0.79, "magnitude": 0.7}, left=left)
    for path in folder.glob("reports/profile/*-none-*_4/model.json"):
        search = {"best": 1.1, "evaluations": 100, "weights": 1000, "used_bits": 3990}
        stored = json.loads(path.read_text()) | ({} if "uniform" in str(path) else {"search": search})
        path.write_text(json.dumps(stored))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = read()
    untrained = found.params.quantizers["untrained_4"].model_copy(update={"learning_rate": 0.0})
    quantizers = found.params.quantizers | {"untrained_4": untrained}
    return replace(found, params=found.params.model_copy(update={"quantizers": quantizers}))


@pytest.fixture(scope="module")
def groups(run: CompletedRun) -> dict:
    return groups_of(assemble_rows(run))


def names(pairs) -> list[tuple[str, str]]:
    return [(one.name, other.name) for one, other in pairs]


def test_pruners_are_compared_at_equal_macs_and_budget(run: CompletedRun, groups: dict):
    pairs = names(comparisons.at_equal_macs(run, groups))
    assert pairs == [(f"{model}-oto50-fp32", f"{model}-magnitude-fp32") for model in ("atto-s0", "tv-s0")]


def test_libraries_are_compared_setting_by_setting(run: CompletedRun, groups: dict):
    pairs = names(comparisons.between_libraries(run, groups))
    assert pairs == [(name, name.replace("atto", "tv")) for name in groups if name.startswith("atto")]


def test_a_comparison_is_paired_by_seed_and_image_and_corrected(run: CompletedRun, groups: dict):
    pairs = comparisons.at_equal_macs(run, groups)
    first, _ = compared(run, pairs)
    correct = {name: measured.correct for name, measured in run.variants.items()}
    seeds = [correct[f"atto-s{n}-oto50-fp32"].mean() - correct[f"atto-s{n}-magnitude-fp32"].mean() for n in (0, 1)]
    assert first.change.delta == pytest.approx(np.mean(seeds))
    assert first.std == pytest.approx(np.std(seeds, ddof=1))
    assert first.change.low < first.change.delta < first.change.high
    (alone,) = compared(run, pairs[:1])
    assert first.change.p_value >= alone.change.p_value
    fewer = replace(groups["atto-s0-magnitude-fp32"], rows=groups["atto-s0-magnitude-fp32"].rows[:1])
    assert compared(run, [(groups["atto-s0-oto50-fp32"], fewer)]) == []


def test_a_contest_shares_budget_and_settings_and_the_learned_bits_meet_the_others(run: CompletedRun, groups: dict):
    contests = [contest for contest in contests_of(run, groups) if contest[0].name.startswith("atto")]
    ways = [[search_of(run.params.quantizers[group.rows[0]["quantizer"]]) for group in one] for one in contests]
    assert ways == [["uniform", "random", "greedy", UNTRAINED, LEARNED], ["uniform", "greedy"]]
    others = [other.rows[0]["quantizer"] for _, other in duels_of(run, contests)]
    assert others == ["uniform_4", "random_4", "greedy_4", "untrained_4"]


def test_the_command_prints_tables(run: CompletedRun, monkeypatch, capsys):
    monkeypatch.setattr(comparisons, "load_params", lambda kind: None)
    monkeypatch.setattr(comparisons, "read_run", lambda params: run)
    comparisons.main()
    out = capsys.readouterr().out
    for words in ("policy gradient against", "equal MACs", "two libraries", "3.990", "1.1000"):
        assert words in out


def test_a_run_without_comparisons_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    monkeypatch.chdir(tmp_path)
    assert comparisons.report(read()).startswith("This run has no")
