import io
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_run import params_of, write_run

from stages.common.params import load_params
from stages.reporting.inputs import Run, read_run
from stages.reporting.plots import Picture, confusion_counts, draw_all, training
from stages.reporting.rows import assemble_groups, assemble_rows, choose
from stages.reporting.text import bytes_text, count_text, points_text


def crowded() -> tuple[dict, dict[str, float]]:
    """Seven prunings of nearly the same cost and accuracy, each in two precisions."""
    pruners = {"none": {"method": "none"}}
    pruners["continued"] = {"method": "none_continued", "epochs": 4, "learning_rate_factor": 0.5}
    for number in range(5):
        sparsity = 0.5 + number / 100
        pruners[f"oto{number}"] = {
            "method": "oto",
            "epochs": 4,
            "learning_rate_factor": 0.5,
            "group_sparsity": sparsity,
        }
    variants = [(pruner, quantizer) for pruner in pruners for quantizer in ("fp32", "int8")]
    return params_of(pruners=pruners, variants=variants), {f"oto{n}": 0.79 + n / 500 for n in range(5)}


def test_pictures_are_whole_and_described(pictures: dict[str, Picture]):
    assert set(pictures) == {
        "pareto_size",
        "pareto_latency",
        "pareto_macs",
        "size",
        "params",
        "training",
        "confusion",
    }
    for picture in pictures.values():
        assert Image.open(io.BytesIO(picture.png)).width > 600
        assert picture.svg.startswith("<svg role=")
        assert len(picture.alt) > 40


def test_labels_do_not_overlap_and_name_the_headline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params, accuracy = crowded()
    write_run(tmp_path, params, accuracy=accuracy)
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params())
    pictures = draw_all(run, assemble_rows(run, assemble_groups(run)), choose(run))
    for name in ("pareto_size", "pareto_latency", "pareto_macs"):
        boxes = pictures[name].labels
        assert len(boxes) >= 6
        for one, other in combinations(boxes, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, name
    assert "sparsity" in pictures


def test_every_variant_is_a_mark_that_names_itself(run: Run, pictures: dict[str, Picture]):
    svg = pictures["pareto_size"].svg
    marks = re.findall(r'class="mark" tabindex="0" role="img" aria-label="([^:"]+):', svg)
    assert marks == list(run.params.variants)


def test_ids_of_one_picture_do_not_meet_those_of_another(pictures: dict[str, Picture]):
    ids = [set(re.findall(r'\sid="([^"]+)"', picture.svg)) for picture in pictures.values()]
    assert all(not one & other for one, other in combinations(ids, 2))
    for picture in pictures.values():
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', picture.svg))
        assert used <= set(re.findall(r'\sid="([^"]+)"', picture.svg))


def test_nothing_trained_means_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    for path in (tmp_path / "reports/curves").rglob("*.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    monkeypatch.chdir(tmp_path)
    assert training(read_run(load_params())) is None


def test_confusion_counts_every_image_once(run: Run):
    counts = confusion_counts(run, "atto-none-fp32")
    measured = run.variants["atto-none-fp32"]
    expected = np.zeros((5, 5), int)
    for actual, predicted in zip(run.labels, measured.predicted, strict=True):
        expected[actual, predicted] += 1
    assert np.array_equal(counts, expected)
    assert np.trace(counts) == measured.correct.sum()


def test_numbers_as_a_person_reads_them():
    assert [bytes_text(n) for n in (812, 61_250, 1_246_000, 99_960_000)] == [
        "812 bytes",
        "61.2 KB",
        "1.25 MB",
        "100 MB",
    ]
    assert [count_text(n) for n in (9, 61_300, 2_484_000)] == ["9", "61.3 k", "2.48 M"]
    assert points_text(-0.0123) == "\N{MINUS SIGN}1.2"
