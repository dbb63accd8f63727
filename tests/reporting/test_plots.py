import io
import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from synthetic_run import page_of, params_of, read, write_run

from stages.reporting import plots
from stages.reporting.drawing import PNG_DPI, Picture, new_figure
from stages.reporting.inputs import CompletedRun, Params
from stages.reporting.labels import overlap, place_labels
from stages.reporting.plots import draw_all, training
from stages.reporting.rows import Row, assemble_rows, choose
from stages.reporting.tables import confusion_counts, plot_tables

CONTINUED = {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5}


def crowded(count: int, name: str = "oto") -> dict:
    """Params with pruned networks of nearly the same cost, each in two precisions."""
    pruners = {"none": {"method": "none"}, "continued": CONTINUED}
    pruners |= {f"{name}{n}": CONTINUED | {"method": "oto", "group_sparsity": 0.5} for n in range(count)}
    return params_of(pruners=pruners, variants=[(p, q) for p in pruners for q in ("fp32", "int8")])


@pytest.mark.parametrize("quantizers", [["fp32"], ["fp32", "int8"]])
def test_more_pruners_than_colors_and_many_quantizers_still_look_different(quantizers):
    pruners = {f"oto{n}": CONTINUED | {"method": "oto", "group_sparsity": 0.5} for n in range(len(plots.COLORS) + 3)}
    more = [f"q{index}" for index in range(10)]
    pairs = [(pruner, quantizer) for pruner in pruners for quantizer in [*quantizers, *more]]
    raw = params_of(pruners=pruners, variants=pairs)
    raw["quantizers"] |= {name: {"method": "uniform_bits", "bits": 4} for name in more}
    params = Params.model_validate({key: raw[key] for key in raw if key in Params.model_fields})
    of_pruner, of_quantizer = plots.looks_of(SimpleNamespace(params=params))
    looks = [of_quantizer[quantizer] | of_pruner[pruner] for pruner, quantizer in pairs]
    assert len({tuple(sorted(look.items())) for look in looks}) == len(looks)


def test_pictures_are_whole_and_described(pictures: dict[str, Picture]):
    assert set(pictures) == {"pareto_size", "pareto_latency", "training"}
    for picture in pictures.values():
        assert Image.open(io.BytesIO(picture.png)).width > 600
        assert picture.svg.startswith("<svg role=")
        assert len(picture.alt) > 40


def test_only_the_front_and_the_headline_have_labels_that_do_not_overlap(tmp_path: Path, monkeypatch):
    params = crowded(5)
    write_run(tmp_path, params, accuracy={f"oto{n}": 0.79 + n / 500 for n in range(5)})
    monkeypatch.chdir(tmp_path)
    run = read()
    rows = assemble_rows(run)
    placed = []
    keep = plots.place_labels
    monkeypatch.setattr(plots, "place_labels", lambda f, a, labels, c: placed.append(labels) or keep(f, a, labels, c))
    pictures = draw_all(run, rows, choose(run, rows))
    for name, cost, labels in zip(
        ("pareto_size", "pareto_latency"), ("size_bytes", "latency_ms_p50"), placed, strict=True
    ):
        wanted = {p.first["variant"] for p in plots.points_of(rows, cost) if p.on_front} | {choose(run, rows).headline}
        assert {f"atto-{text.replace(chr(10), '')}" for *_, text in labels} == wanted
        boxes = [label.box for label in pictures[name].labels]
        assert boxes
        assert not any(overlap(one, other) for one, other in combinations(boxes, 2))


def test_points_far_below_are_listed_and_leave_the_axis_to_the_rest(tmp_path, monkeypatch):
    write_run(tmp_path, crowded(5), accuracy={"continued": 0.3}, left={"continued": 1.1})
    monkeypatch.chdir(tmp_path)
    run = read()
    rows, drawn = assemble_rows(run), []
    monkeypatch.setattr(plots, "new_figure", lambda *size: drawn.append(new_figure(*size)) or drawn[-1])
    choices = choose(run, rows)
    picture = plots.pareto(run, rows, choices, "size_bytes", "pareto_size")
    axes = drawn[0][1]
    assert axes.get_ylim()[0] > 60
    assert re.search(r"Far below: continued-fp32 [23]\d\.\d %, continued-int8 [23]\d\.\d %\.", picture.alt)
    assert re.search(r"\n. far below: continued-fp32 [23]\d\.\d.%,", axes.get_xlabel())
    # the cheapest is on the front, however inaccurate it is, so it stays on the axis
    cheapest = min(rows, key=lambda row: row["size_bytes"])
    changed = [row | {"top1": 0.1} if row is cheapest else row for row in rows]
    plots.pareto(run, changed, choices, "size_bytes", "pareto_size")
    assert drawn[1][1].get_ylim()[0] < 10


@pytest.mark.parametrize("crowd", range(3))
def test_every_label_has_a_line_to_its_own_mark_and_covers_no_mark(crowd: int):
    spread = np.random.default_rng(crowd).normal(size=(12, 2)) * (0.05, 0.2) + (1.0, 80.0)
    marks = [*map(tuple, spread), (2.0, 85.0), (0.2, 75.0)]
    figure, axes = new_figure(3.7)
    for x, y in marks:
        axes.plot([x], [y], marker="o")
    placed = place_labels(figure, axes, [(x, y, f"variant {n}") for n, (x, y) in enumerate(marks)], "black")
    assert len(placed) >= 4
    for label in placed[1:]:
        for x, y in axes.transData.transform(marks):
            assert not (label.box[0] < x < label.box[2] and label.box[1] < y < label.box[3])
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert np.allclose([start for start, _ in lines], [label.mark for label in placed])


def test_the_first_label_is_written_even_without_room():
    figure, axes = new_figure(3.7)
    axes.plot([0, 1], [0, 1], marker="o")
    (label,) = place_labels(figure, axes, [(0.5, 0.5, "\n".join(["a long name"] * 30)), (0.5, 0.5, "second")], "black")[
        :1
    ]
    assert label.mark == pytest.approx(tuple(axes.transData.transform((0.5, 0.5))))


def test_the_legend_names_a_front_only_if_one_is_drawn(run: CompletedRun, rows: list[Row], monkeypatch):
    legends = []
    monkeypatch.setattr(plots, "legend_below", lambda figure, handles, labels: legends.append(labels))
    cheapest = min(rows, key=lambda row: row["size_bytes"])
    for top1 in (0.1, 1.0):  # the cheapest variant is the worst, and then the best of all
        changed = [row | {"top1": top1} if row is cheapest else row for row in rows]
        plots.pareto(run, changed, choose(run, rows), "size_bytes", "pareto_size")
    assert "Pareto front" in legends[0]
    assert "Pareto front" not in legends[1]


def test_forty_long_names_fit_and_the_headline_keeps_its_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, crowded(18, "structured-pruning-with-a-long-recovery-"), n=100)
    monkeypatch.chdir(tmp_path)
    run = read()
    rows = assemble_rows(run)
    pictures = draw_all(run, rows, choose(run, rows))
    for name in ("pareto_size", "pareto_latency"):
        assert pictures[name].labels, name
    for name, least in {"pareto_size": 6, "training": 8}.items():
        assert Image.open(io.BytesIO(pictures[name].png)).height > least * PNG_DPI, name


def test_many_classes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of(), n=2000, classes=[f"class {k}" for k in range(1000)])
    monkeypatch.chdir(tmp_path)
    run = read()
    choices = choose(run, assemble_rows(run))
    counts = confusion_counts(run, choices.headline)
    shown = {row["actual"] for row in plot_tables(run, choices)["confusion"][1]}
    recall = {f"class {k}": counts[k, k] / 2 for k in range(1000)}
    assert len(shown) == 50
    assert max(recall[name] for name in shown) <= min(recall[name] for name in recall.keys() - shown)
    page = page_of(run)
    for caption in ("Recall of the worst classes", "The most frequent confusions"):
        table = page[page.index(caption) :]
        assert table[: table.index("</table>")].count('<th scope="row">') == 20
    assert 'class="matrix"' not in page
    assert len(page) < 300_000


def test_few_classes_have_a_line_for_each_image(run: CompletedRun, rows: list[Row]):
    choices = choose(run, rows)
    _, lines = plot_tables(run, choices)["confusion"]
    assert len(lines) == len(run.labels)
    measured = run.variants[choices.headline]
    assert sum(line["actual"] == line["predicted"] for line in lines) == measured.correct.sum()
    expected = np.zeros((5, 5), int)
    np.add.at(expected, (run.labels, measured.predicted), 1)
    assert np.array_equal(confusion_counts(run, choices.headline), expected)


def test_the_training_table_is_the_lineage_of_the_headline(run: CompletedRun, rows: list[Row]):
    _, lines = plot_tables(run, choose(run, rows))["training"]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert [line["network"] for line in lines] == ["atto"] * 6 + ["atto-oto50"] * 6


def test_every_variant_is_a_mark_that_names_itself(run: CompletedRun, pictures: dict[str, Picture]):
    marks = re.findall(r'class="mark" tabindex="0" role="img" aria-label="([^:"]+):', pictures["pareto_size"].svg)
    assert marks == [name for name in run.params.variants if name != "atto-l1-fp32"]  # which is far below


def test_ids_are_unique_across_pictures_and_scales_never_vanish(pictures: dict[str, Picture]):
    ids = [set(re.findall(r'\sid="([^"]+)"', picture.svg)) for picture in pictures.values()]
    assert all(not one & other for one, other in combinations(ids, 2))
    for picture, known in zip(pictures.values(), ids, strict=True):
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', picture.svg)) <= known
        scales = [scale.split() for scale in re.findall(r"scale\(([^)]*)\)", picture.svg)]
        assert any(0 < float(scale[0]) < 0.1 for scale in scales), picture.name
        assert all(float(number) for scale in scales for number in scale), picture.name


def test_nothing_trained_means_no_curve(folder: Path):
    for path in (folder / "reports/curves").rglob("*.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert training(read()) is None
