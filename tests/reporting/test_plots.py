import io
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from synthetic_run import params_of, write_run

from stages.params.load import load_params
from stages.params.pruners import Importance
from stages.params.whole import Params
from stages.reporting import plots
from stages.reporting.inputs import Run, read_run
from stages.reporting.levels import levels_of
from stages.reporting.plots import PNG_DPI, Picture, confusion, confusion_counts, draw_all, levels, training
from stages.reporting.rows import assemble_groups, assemble_rows, choose
from stages.reporting.tables import plot_tables
from stages.reporting.text import allowance_text, bytes_text, count_text, points_text, wrapped


def crowded() -> tuple[dict, dict[str, float]]:
    """Seven pruned networks of nearly the same cost and accuracy, each in two precisions."""
    pruners = {"none": {"method": "none"}}
    pruners["continued"] = {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5}
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


def test_more_quantizers_than_shapes_still_look_different():
    raw = params_of()
    names = [f"q{index}" for index in range(len(plots.MARKERS) + 5)]
    raw["quantizers"] |= {name: {"method": "uniform_bits", "bits": 4} for name in names}
    raw["variants"] |= {f"atto-none-{name}": {"pruned": "atto-none", "quantizer": name} for name in names}
    run = SimpleNamespace(params=Params.model_validate(raw))
    _, markers = plots._looks(run)
    assert len({tuple(look.values()) for look in markers.values()}) == len(markers) > len(plots.MARKERS)


@pytest.mark.parametrize("quantizers", [["fp32"], ["fp32", "int8"]])
def test_more_pruners_than_colours_still_look_different(quantizers):
    oto = {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5, "group_sparsity": 0.5}
    pruners = {f"oto{number}": oto for number in range(len(plots.COLORS) + 3)}
    variants = [(pruner, quantizer) for pruner in pruners for quantizer in quantizers]
    raw = params_of(pruners=pruners, variants=variants)
    of_pruner, of_quantizer = plots._looks(SimpleNamespace(params=Params.model_validate(raw)))
    looks = [of_quantizer[quantizer] | of_pruner[pruner] for pruner, quantizer in variants]
    assert len({tuple(sorted(look.items())) for look in looks}) == len(looks)


def test_pictures_are_whole_and_described(pictures: dict[str, Picture]):
    assert set(pictures) == {
        "pareto_size",
        "pareto_latency",
        "pareto_macs",
        "size",
        "params",
        "corruptions",
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
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    pictures = draw_all(run, assemble_rows(run, groups), groups, choose(run))
    for name in ("pareto_size", "pareto_latency", "pareto_macs"):
        boxes = [label.box for label in pictures[name].labels]
        assert len(boxes) >= 6
        for one, other in combinations(boxes, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, name
    assert {"levels_size", "levels_macs", "levels_latency"} <= set(pictures)


def test_marks_far_below_tell_their_accuracy_and_leave_the_axis_to_the_rest(tmp_path, monkeypatch):
    params, accuracy = crowded()
    write_run(tmp_path, params, accuracy=accuracy | {"continued": 0.3}, left={"continued": 1.1})
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    axes, figure_of = [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: axes.append(figure_of(*size)) or axes[-1])
    rows = assemble_rows(run, groups)
    picture = plots.pareto(run, rows, choose(run), "size_bytes", "pareto_size")
    assert axes[0][1].get_ylim()[0] > 60
    assert re.search(r"Far below: continued-fp32 [23]\d\.\d %, continued-int8 [23]\d\.\d %\.", picture.alt)
    assert re.search(r"\n. far below: continued-fp32 [23]\d\.\d.%,", axes[0][1].get_xlabel())
    # the cheapest is on the front, however bad it is
    cheapest = min(rows, key=lambda row: row["size_bytes"])
    changed = [row | {"top1": 0.1} if row is cheapest else row for row in rows]
    plots.pareto(run, changed, choose(run), "size_bytes", "pareto_size")
    assert axes[1][1].get_ylim()[0] < 10


@pytest.mark.parametrize("crowd", range(4))
def test_a_label_stands_nearest_to_its_own_mark_or_a_line_leads_there(crowd: int):
    spread = np.random.default_rng(crowd).normal(size=(12, 2)) * (0.05, 0.2) + (1.0, 80.0)
    marks = [*map(tuple, spread), (2.0, 85.0), (0.2, 75.0)]
    figure, axes = plots._figure(3.7)
    for x, y in marks:
        axes.plot([x], [y], marker="o")
    placed = plots._label_points(figure, axes, [(x, y, f"variant {n}") for n, (x, y) in enumerate(marks)], marks)
    assert len(placed) >= 4
    spots = [tuple(spot) for spot in axes.transData.transform(marks)]

    def distance(spot: tuple[float, float], box: tuple[float, ...]) -> float:
        return float(np.hypot(*(max(box[i] - spot[i], 0, spot[i] - box[i + 2]) for i in (0, 1))))

    for label in placed:
        own = distance(label.mark, label.box)
        assert label.joined or own <= min(distance(spot, label.box) for spot in spots) + 1  # pixel
    leaders = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert len(leaders) == sum(label.joined for label in placed)


def test_the_legend_names_a_front_only_where_one_is_drawn(run: Run, monkeypatch: pytest.MonkeyPatch):
    legends = []
    monkeypatch.setattr(plots, "_legend_below", lambda figure, handles, labels: legends.append(labels))
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    for top1 in (0.1, 1.0):  # the cheapest variant is the worst, and then the best of all
        cheapest = min(rows, key=lambda row: row["size_bytes"])
        changed = [row | {"top1": top1} if row is cheapest else row for row in rows]
        plots.pareto(run, changed, choose(run), "size_bytes", "pareto_size")
    assert "Pareto front" in legends[0]
    assert "Pareto front" not in legends[1]


def test_forty_long_names_fit_and_the_headline_keeps_its_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pruners = {"none": {"method": "none"}}
    pruners["continued"] = {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5}
    for number in range(18):
        name = f"{'structured-pruning-with-a-long-recovery' if number else 'x' * 40}-{number:02}"
        pruners[name] = pruners["continued"] | {"method": "oto", "group_sparsity": 0.5}
    variants = [(pruner, quantizer) for pruner in pruners for quantizer in ("fp32", "int8")]
    write_run(tmp_path, params_of(pruners=pruners, variants=variants), n=100)
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    pictures = draw_all(run, assemble_rows(run, groups), groups, choose(run))
    for name in ("pareto_size", "pareto_latency", "pareto_macs"):
        assert pictures[name].labels, name
    for name, least in {"size": 40 * 0.42, "pareto_size": 7, "training": 8}.items():
        assert Image.open(io.BytesIO(pictures[name].png)).height > least * PNG_DPI, name


def test_names_wrap_after_a_dash_and_stay_whole_otherwise():
    assert wrapped("continued-int8", 22) == "continued-int8"
    assert wrapped("structured-pruning-long-int8_dynamic", 22) == "structured-pruning-\nlong-int8_dynamic"
    assert wrapped("x" * 30 + "-int8", 22) == "x" * 30 + "-\nint8"
    assert wrapped("a-b-", 22).replace("\n", "") == "a-b-"


def test_many_classes_give_a_bounded_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of(), n=2000, classes=[f"class {k}" for k in range(1000)])
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    choices = choose(run)
    counts = confusion_counts(run, choices.headline)
    table = plot_tables(run, assemble_rows(run, assemble_groups(run)), choices)["confusion"]
    assert 0 < len(table.rows) <= 150
    shown = {row["actual"] for row in table.rows}
    recall = {f"class {k}": counts[k, k] / 2 for k in range(1000)}
    assert len(shown) == 50
    assert max(recall[name] for name in shown) <= min(recall[name] for name in recall.keys() - shown)
    assert all(row["images"] > 0 and row["actual"] != row["predicted"] for row in table.rows)
    picture = confusion(run, choices.headline)
    assert "50 classes found least often of 1000" in picture.alt
    assert len(picture.svg) < 1_000_000


def test_models_do_not_share_a_line_of_the_levels_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    oto = {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "continued": {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5},
        "oto50": oto | {"group_sparsity": 0.5},
        "oto70": oto | {"group_sparsity": 0.7},
    }
    models = {"small": network, "tuned": network | {"weights": "pretrained"}}
    params = params_of(pruners=pruners, models=models)
    write_run(tmp_path, params | {"variants": {v: e for v, e in params["variants"].items() if v.endswith("fp32")}})
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    picture = levels(run, rows, levels_of(run, rows, groups), "macs", "levels_macs")
    assert "small oto, tuned oto" in picture.alt
    assert len(set(re.findall(r'id="levels_macs-point-(\d)-', picture.svg))) == 2


def test_many_methods_look_different_and_a_level_far_below_is_told_under_the_axis(tmp_path, monkeypatch):
    pruners = {"none": {"method": "none"}}
    pruners["continued"] = {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5}
    for number, score in enumerate(sorted(Importance.model_fields)):
        weights = dict.fromkeys(Importance.model_fields, 0.0) | {score: 1.0}
        for optimizer in ("hesso", "dhspg"):
            name = f"{optimizer}{number}"
            pruners[name] = pruners["continued"] | {"method": "oto", "optimizer": optimizer, "importance": weights}
            pruners[name] |= {"group_sparsity": 0.5}
    pruners["more"] = pruners[name] | {"group_sparsity": 0.9}
    write_run(tmp_path, params_of(pruners=pruners), accuracy={"more": 0.3})
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    found, drawn, figure_of = levels_of(run, rows, groups), [], plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: drawn.append(figure_of(*size)) or drawn[-1])
    levels(run, rows, found, "macs", "levels_macs")
    _, axes = drawn[0]
    lines = [line for line in axes.lines if line.get_label() in {level.kind for level in found}]
    assert len({(line.get_color(), line.get_marker(), line.get_fillstyle()) for line in lines}) == len(lines) > 8
    assert re.search(r"far below: \S*more-fp32 [23]\d\.\d.%", axes.get_xlabel())
    assert axes.get_ylim()[0] > 60


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


def test_letters_of_every_size_keep_their_height(pictures: dict[str, Picture]):
    for picture in pictures.values():
        scales = [scale.split() for scale in re.findall(r"scale\(([^)]*)\)", picture.svg)]
        assert any(0 < float(scale[0]) < 0.1 for scale in scales), picture.name
        assert all(float(number) for scale in scales for number in scale), picture.name


def test_nothing_trained_means_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of())
    for path in (tmp_path / "reports/curves").rglob("*.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    monkeypatch.chdir(tmp_path)
    assert training(read_run(load_params(Params))) is None


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
    assert [allowance_text(x) for x in (0.01, 0.005, 0.025)] == ["1 point", "0.5 points", "2.5 points"]
    assert points_text(-0.0123) == "\N{MINUS SIGN}1.2"
