from pathlib import Path

import numpy as np
import pytest
from synthetic_run import change_arrays, read

from stages.reporting.inputs import CompletedRun
from stages.reporting.robustness import headline_variants, robustness_of
from stages.reporting.rows import Choices, Row, assemble_rows, choose, groups_of
from stages.reporting.statistics import mcnemar_p

DENSE, OTO = "atto-none-fp32", "atto-oto50-fp32"
EMPTY = {
    "position": np.zeros(0, np.int64),
    "corruption": np.zeros(0, "U5"),
    "severity": np.zeros(0, np.int64),
    "predicted": np.zeros((0, 0), np.int64),
}


def test_means_are_over_all_cells_and_the_clean_ones_over_the_same_images(run: CompletedRun, rows: list[Row]):
    found = robustness_of(run, groups_of(rows))
    assert list(found) == list(groups_of(rows))
    corrupted = run.variants[OTO].corrupted
    right = corrupted.predicted == run.labels[corrupted.position]
    assert found[OTO].corrupted == right.mean()
    assert found[OTO].clean == run.variants[OTO].correct[corrupted.position].mean()
    by_name = {row["variant"]: row for row in rows}
    assert by_name[OTO]["corrupted_top1"] == pytest.approx(right.mean(), abs=1e-6)
    baseline = run.variants[DENSE].corrupted
    difference = right.mean() - (baseline.predicted == run.labels[baseline.position]).mean()
    assert found[OTO].change.delta == pytest.approx(difference)
    assert found[DENSE].change is None


def test_an_image_is_the_unit_not_each_of_its_corruptions(folder: Path):
    """Ten images lost in all nine cells are ten losses, not ninety."""

    def all_right(stored: dict, wrong: int) -> dict:
        predicted = np.tile(np.arange(400)[stored["position"]] % 5, (9, 1))
        predicted[:, :wrong] = (predicted[:, :wrong] + 1) % 5
        return stored | {"predicted": predicted}

    for path in folder.glob("reports/profile/*/corruptions.npz"):
        wrong = 10 if path.parent.name == OTO else 0
        change_arrays(path, lambda stored, wrong=wrong: all_right(stored, wrong))
    run = read()
    found = robustness_of(run, groups_of(assemble_rows(run)))
    others = len(found) - 1
    assert found[OTO].change.delta == -10 / 200
    assert found[OTO].change.p_value == pytest.approx(others * mcnemar_p(0, 10))


def test_seeds_are_pooled(seeds_run: CompletedRun):
    one = robustness_of(seeds_run, groups_of(assemble_rows(seeds_run)))[OTO]
    means = [seeds_run.variants[v].corrupted.top1(seeds_run.labels) for v in one.group.variants]
    assert len(means) == 3
    assert one.corrupted == pytest.approx(np.mean(means))


def test_a_run_without_corruptions_has_no_figures_of_them(folder: Path):
    for path in folder.glob("reports/profile/*/corruptions.npz"):
        change_arrays(path, lambda _: EMPTY)
    run = read()
    rows = assemble_rows(run)
    assert robustness_of(run, groups_of(rows)) == {}
    assert {row["corrupted_top1"] for row in rows} == {None}


def test_headline_variants_are_named_once_the_dense_one_first(run: CompletedRun, rows: list[Row]):
    assert headline_variants(run, choose(run, rows))[0] == DENSE
    assert headline_variants(run, Choices(OTO, OTO, DENSE, None)) == [DENSE, OTO]
