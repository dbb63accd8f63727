import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import params_of, write_run

from stages.common.errors import UserError
from stages.params.load import load_params
from stages.params.pruners import Depgraph, Importance, Oto, Unstructured
from stages.params.whole import Params
from stages.reporting.claims import assess, read_claims
from stages.reporting.inputs import Run, read_run
from stages.reporting.levels import at_equal_macs, between_libraries, cuts_of, kinds_of, levels_of
from stages.reporting.page import render_page
from stages.reporting.plots import draw_all
from stages.reporting.rows import assemble_groups, assemble_rows, choose

BUDGET = {"epochs": 4, "learning_rate_factor": 0.5}
PRUNERS = {
    "none": {"method": "none"},
    "continued": BUDGET | {"method": "continued"},
    "oto30": BUDGET | {"method": "oto", "group_sparsity": 0.3},
    "oto50": BUDGET | {"method": "oto", "group_sparsity": 0.5},
    "dhspg50": BUDGET | {"method": "oto", "optimizer": "dhspg", "group_sparsity": 0.5},
    "magnitude": BUDGET | {"method": "depgraph", "importance": "magnitude", "macs_reduction": 0.75},
    "random": BUDGET | {"method": "random_structured", "macs_reduction": 0.4},
    "narrow": BUDGET | {"method": "small_dense", "macs_reduction": 0.75},
    "l1": BUDGET | {"method": "l1_unstructured", "sparsity": 0.8},
}
LEFT = {"oto30": 0.5, "oto50": 0.25, "dhspg50": 0.26, "magnitude": 0.255, "random": 0.6, "narrow": 0.25}
ACCURACY = {"oto50": 0.79, "dhspg50": 0.78, "magnitude": 0.7, "random": 0.75, "narrow": 0.76, "continued": 0.81}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two seeds of a timm network and of a torchvision one, and before them another network of timm's."""
    folder = tmp_path_factory.mktemp("levels")
    timm = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    torchvision = {"library": "torchvision", "architecture": "convnext_tiny", "input_size": 16}
    models = {"larger": timm | {"input_size": 32}}
    models |= {f"atto-s{seed}": timm | {"seed": seed} for seed in (0, 1)}
    models |= {f"tv-s{seed}": torchvision | {"seed": seed} for seed in (0, 1)}
    write_run(
        folder,
        params_of(models=models, pruners=PRUNERS, variants=[(p, "fp32") for p in PRUNERS]),
        400,
        ACCURACY,
        left=LEFT,
    )
    times = {"median_ms": 700.0, "min_ms": 650.0, "ratio": 1.02, "ratio_ci_low": 1.01, "ratio_ci_high": 1.03}
    parts = {"ratio_by_parts": 1.005, "ratio_by_parts_ci_low": 1.004, "ratio_by_parts_ci_high": 1.006}
    benchmark = {
        "machine": {"cpu": "A CPU of the tests", "device": "cpu", "threads": 1, "torch": "2.11.0"},
        "step": {"batch": 16, "input_size": 64, "precision": "float32"},
        "n": 40,
        "whole_step": {"hesso, recovery": times | parts},
        "optimizer_only": {"hesso, recovery": times | {"median_ms": 20.0, "ratio": 1.3}},
        "convnext_small_cut": {"total_seconds": 3.4, "peak_rss_bytes": 1.5e9, "peak_rss_before_bytes": 0.9e9},
    }
    (folder / "reports/benchmarks/pruning").mkdir(parents=True)
    (folder / "reports/benchmarks/pruning/cpu.json").write_text(json.dumps(benchmark))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return read_run(load_params(Params))


@pytest.fixture(scope="module")
def parts(run: Run) -> tuple:
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    return groups, rows, levels_of(run, rows, groups)


def test_a_level_tells_the_share_of_its_own_dense_network(parts: tuple):
    levels = {level.group.name: level for level in parts[2]}
    assert "atto-s0-none-fp32" not in levels
    assert "atto-s0-continued-fp32" not in levels
    assert levels["atto-s0-oto50-fp32"].shares["macs"] == pytest.approx(0.25)
    assert levels["atto-s0-l1-fp32"].shares["macs"] == 1
    assert levels["atto-s0-l1-fp32"].sparsity == 0.8


def test_a_method_is_told_by_the_settings_that_make_it_another():
    taylor = dict.fromkeys(Importance.model_fields, 0.0) | {"taylor_first_order": 1.0}
    oto = {"method": "oto", **BUDGET}
    pruners = {
        "oto50": Oto(group_sparsity=0.5, **oto),
        "oto70": Oto(group_sparsity=0.7, optimizer="hesso", **oto),  # the default, said aloud
        "plain": Oto(optimizer="dhspg", layer_norm="plain", group_sparsity=0.5, **oto),
        "plain_hard": Oto(optimizer="dhspg", layer_norm="plain", group_sparsity=0.5, penalty=100, **oto),
        "taylor": Oto(importance=taylor, group_sparsity=0.5, **oto),
        "eights": Oto(group_sparsity=0.5, divisible_by=8, **oto),
        "magnitude": Depgraph(method="depgraph", macs_reduction=0.5, minimum_width=4, **BUDGET),
        "lasso": Depgraph(method="depgraph", importance="group_lasso", macs_reduction=0.5, minimum_width=4, **BUDGET),
        "gradual": Unstructured(method="l1_unstructured", sparsity=0.5, schedule="gradual", **BUDGET),
    }
    assert kinds_of(pruners) == {
        "oto50": "oto",
        "oto70": "oto",
        "plain": "oto plain dhspg",
        "plain_hard": "oto plain dhspg penalty 100",
        "taylor": "oto taylor_first_order",
        "eights": "oto by 8",
        "magnitude": "depgraph",
        "lasso": "depgraph group_lasso",
        "gradual": "l1_unstructured",
    }


def test_pruners_of_other_budgets_are_not_compared_at_equal_macs(run: Run, parts: tuple):
    level = next(level for level in parts[2] if level.pruner == "magnitude")
    longer = run.params.pruners["magnitude"].model_copy(update={"epochs": 40})
    changed = run.params.model_copy(update={"pruners": run.params.pruners | {"magnitude": longer}})
    found = at_equal_macs(replace(run, params=changed), parts[2])
    assert found
    assert level.group.name not in {name for one in found for name in (one.ours, one.theirs)}


def test_networks_are_compared_where_their_macs_are_equal_and_each_pair_once(run: Run, parts: tuple):
    pairs = [(one.ours, one.theirs) for one in at_equal_macs(run, parts[2]) if one.ours.startswith("atto")]
    assert pairs == [
        ("atto-s0-oto50-fp32", "atto-s0-dhspg50-fp32"),
        ("atto-s0-oto50-fp32", "atto-s0-magnitude-fp32"),
        ("atto-s0-oto50-fp32", "atto-s0-narrow-fp32"),
        ("atto-s0-dhspg50-fp32", "atto-s0-magnitude-fp32"),
        ("atto-s0-dhspg50-fp32", "atto-s0-narrow-fp32"),
    ]


def test_the_difference_at_equal_macs_is_that_of_the_same_seeds_on_the_same_images(run: Run, parts: tuple):
    found = next(one for one in at_equal_macs(run, parts[2]) if one.theirs == "atto-s0-magnitude-fp32")
    seeds = [
        run.variants[f"atto-s{seed}-oto50-fp32"].correct.mean()
        - run.variants[f"atto-s{seed}-magnitude-fp32"].correct.mean()
        for seed in (0, 1)
    ]
    assert found.difference.delta == pytest.approx(np.mean(seeds))
    assert found.deviation == pytest.approx(np.std(seeds, ddof=1))
    assert found.difference.low < found.difference.delta < found.difference.high
    assert found.p_value >= found.difference.p_value


def test_libraries_are_compared_pruner_by_pruner_on_the_same_network(run: Run, parts: tuple):
    found = between_libraries(run, parts[1], parts[0])
    assert [(one.one, one.other) for one in found] == [(f"atto-s0-{p}-fp32", f"tv-s0-{p}-fp32") for p in PRUNERS]
    differences = [
        run.variants[f"atto-s{seed}-oto50-fp32"].profile["top1"]
        - run.variants[f"tv-s{seed}-oto50-fp32"].profile["top1"]
        for seed in (0, 1)
    ]
    oto = next(one for one in found if one.one == "atto-s0-oto50-fp32")
    assert oto.deviation == pytest.approx(np.std(differences, ddof=1))


def test_the_jump_at_the_cut_is_told_for_pruners_that_cut(run: Run, parts: tuple):
    cuts = {cut.group: cut for cut in cuts_of(run, parts[2])}
    assert cuts["atto-s0-oto50-fp32"].before == pytest.approx(cuts["atto-s0-oto50-fp32"].after)
    assert cuts["atto-s0-magnitude-fp32"].before - cuts["atto-s0-magnitude-fp32"].after == pytest.approx(0.4)
    assert cuts["atto-s0-magnitude-fp32"].difference == 0.9
    assert "atto-s0-l1-fp32" not in cuts


def test_the_page_shows_levels_pairs_libraries_and_cuts(run: Run, parts: tuple, tmp_path: Path):
    groups, rows, _ = parts
    choices = choose(run)
    claims = assess(read_claims(), run, rows, groups)
    page = render_page(run, rows, groups, choices, claims, draw_all(run, rows, groups, choices))
    for heading in ("Pruners and levels", "At equal MACs", "Between libraries", "What removal did"):
        assert f">{heading}</h" in page
    assert "Over control (points)" in page
    assert (
        "for <code>oto</code> and <code>random_structured</code> from the network with the same channels at zero"
        in page
    )
    assert "for <code>depgraph</code> from the whole network to the cut one" in page
    assert "ConvNeXt-Tiny (batch 16, 64 px, float32) on A CPU of the tests, 1 thread" in page
    assert (
        '<th scope="row">hesso, recovery</th><td>700 ms</td><td>1.020</td><td>1.010 to 1.030</td><td>1.005</td>' in page
    )
    assert "Graph, partition and cut of ConvNeXt-Small: 3.4 s, peak memory 1.50 GB" in page


def test_a_benchmark_of_another_shape_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    (tmp_path / "reports/benchmarks/pruning").mkdir(parents=True)
    (tmp_path / "reports/benchmarks/pruning/cpu.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    message = r"reports/benchmarks/pruning/cpu\.json is not what tests/benchmarks/pruning\.py"
    with pytest.raises(UserError, match=message):
        read_run(load_params(Params))
