from pathlib import Path

import numpy as np
import pytest
from synthetic_run import change_arrays, params_of, write_run

from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.inputs import Run, read_run
from stages.reporting.robustness import curves_of, headline_variants, robustness_of
from stages.reporting.rows import Choices, assemble_groups, assemble_rows, choose
from stages.reporting.statistics import mcnemar_p

DENSE, OTO = "atto-none-fp32", "atto-oto50-fp32"
EMPTY = {
    "position": np.zeros(0, np.int64),
    "corruption": np.zeros(0, "U5"),
    "severity": np.zeros(0, np.int64),
    "predicted": np.zeros((0, 0), np.int64),
}


def test_means_are_over_all_cells_and_the_clean_ones_over_the_same_images(run: Run):
    groups = assemble_groups(run)
    found = {one.group.name: one for one in robustness_of(run, groups)}
    assert list(found) == list(groups)
    corrupted = run.variants[OTO].corrupted
    right = corrupted.predicted == run.labels[corrupted.position]
    assert found[OTO].corrupted == right.mean()
    assert found[OTO].clean == (run.variants[OTO].predicted == run.labels)[corrupted.position].mean()
    rows = {row["variant"]: row for row in assemble_rows(run, groups)}
    assert rows[OTO]["corrupted_top1"] == pytest.approx(right.mean(), abs=1e-6)
    baseline = run.variants[DENSE].corrupted
    difference = right.mean() - (baseline.predicted == run.labels[baseline.position]).mean()
    assert found[OTO].difference.delta == pytest.approx(difference)
    assert found[OTO].difference.n == len(corrupted.position)
    assert found[DENSE].difference is None


def test_an_image_is_the_unit_not_each_of_its_corruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ten images lost in all nine cells are ten losses, not ninety."""
    write_run(tmp_path, params_of())
    monkeypatch.chdir(tmp_path)

    def all_right(stored: dict, wrong: int) -> dict:
        predicted = np.tile(np.arange(400)[stored["position"]] % 5, (9, 1))
        predicted[:, :wrong] = (predicted[:, :wrong] + 1) % 5
        return stored | {"predicted": predicted}

    for variant, wrong in ((DENSE, 0), (OTO, 10)):
        change_arrays(Path("reports/profile") / variant / "corruptions.npz", lambda s, w=wrong: all_right(s, w))
    run = read_run(load_params(Params))
    found = {one.group.name: one for one in robustness_of(run, assemble_groups(run))}
    assert found[OTO].difference.delta == -10 / 200
    assert found[OTO].difference.p_value == pytest.approx(mcnemar_p(0, 10))


def test_curves_start_with_the_images_as_they_are(run: Run):
    curves = curves_of(run, OTO)
    assert list(curves) == ["noise", "blur", "JPEG"]
    corrupted = run.variants[OTO].corrupted
    right = corrupted.predicted == run.labels[corrupted.position]
    clean = run.variants[OTO].correct[corrupted.position].mean()
    assert curves["blur"] == [clean, *(right[number].mean() for number in (3, 4, 5))]


def test_seeds_are_pooled(seeds_run: Run):
    groups = assemble_groups(seeds_run)
    (one,) = [one for one in robustness_of(seeds_run, groups) if one.group.name == OTO]
    means = [seeds_run.variants[v].corrupted.top1(seeds_run.labels) for v in one.group.variants]
    assert len(means) == 3
    assert one.corrupted == pytest.approx(np.mean(means))


def test_a_run_without_corruptions_says_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    for path in tmp_path.glob("reports/profile/*/corruptions.npz"):
        change_arrays(path, lambda _: EMPTY)
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    assert robustness_of(run, groups) == []
    assert curves_of(run, DENSE) == {}
    assert {row["corrupted_top1"] for row in assemble_rows(run, groups)} == {None}


def test_headline_variants_are_named_once_the_dense_one_first(run: Run):
    choices = choose(run)
    assert headline_variants(run, choices)[0] == DENSE
    same = Choices(OTO, OTO, DENSE)
    assert headline_variants(run, same) == [DENSE, OTO]
