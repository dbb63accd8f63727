"""Pictures of the run, each as PNG (for files) and as SVG (for the page): one drawing for both.

Colours are Okabe & Ito's, which colour-blind readers tell apart, and tell the pruner; the marker tells the quantizer.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise, product
from math import cos, dist, pi, sin
from statistics import quantiles

from stages.reporting.bits import Contest, bits_by_layer, contests_of, objectives_of
from stages.reporting.inputs import Run
from stages.reporting.levels import Level, levels_of
from stages.reporting.robustness import curves_of, headline_variants
from stages.reporting.rows import Choices, Group, Point, model_family, points_of
from stages.reporting.text import bytes_text, count_text, ms_text, percent_text, short_name, wrapped

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DOWN = {"marker": r"$\downarrow$", "ms": 8}
FILLS = ("full", "none", "left")
LINES = ("-", "--", ":", "-.")
INK, FAINT = "#1b1f24", "#c3c9d2"
"""Stand-ins that the SVG turns into the page's own text and line colours, so that dark mode works."""
WIDTH = 5.2
"""Inches of every figure: two stand side by side on a desktop, and one is still readable on a phone."""
PNG_DPI = 150
LABEL_GAPS = (5, 11, 19, 30, 44)
"""Distances in points that a label may stand from its marker; the nearest that is free is taken."""
LABEL_LETTERS, LEGEND_LETTERS = 22, 50
"""So many letters stand in a line of a label and of the legend before it is wrapped."""
LINE_HEIGHT = 0.19
"""Inches of a line of text."""
MOST_CURVES = 40
"""Training curves in one picture."""
FAR_BELOW = 0.05
"""What lies by less than this accuracy under the rest is never moved to the edge of an axis."""
CONFUSION_NUMBERS = 12
"""Up to so many classes the cells of the confusion matrix hold numbers."""
CONFUSION_CLASSES = 50
"""Up to so many classes the confusion matrix is shown whole; beyond that, so many of the worst."""


@dataclass(frozen=True)
class Label:
    """A label beside a mark, in pixels."""

    box: tuple[float, float, float, float]
    """x0, y0, x1, y1."""
    mark: tuple[float, float]
    """The middle of the mark that it names."""
    joined: bool
    """Whether a thin line leads to it."""


@dataclass
class Picture:
    """A finished drawing."""

    name: str
    title: str
    alt: str
    png: bytes
    svg: str
    labels: list[Label] = field(default_factory=list)
    """The direct labels, whose boxes must not overlap."""


def draw_all(run: Run, rows: list[dict], groups: dict[str, Group], choices: Choices) -> dict[str, Picture]:
    """All pictures by file name; those with nothing to show are left out."""
    found, contests = levels_of(run, rows, groups), contests_of(run, groups)
    with _style():
        pictures = [
            pareto(run, rows, choices, "size_bytes", "pareto_size"),
            pareto(run, rows, choices, "latency_ms_p50", "pareto_latency"),
            pareto(run, rows, choices, "macs", "pareto_macs"),
            size_bars(run, rows),
            params_bars(run, rows),
            *(levels(run, rows, found, cost, f"levels_{short}") for short, cost in LEVEL_COSTS.items()),
            *(draw(run, contest) for contest in contests for draw in (bits, searches)),
            corruptions(run, choices),
            soak(run),
            training(run),
            confusion(run, choices.headline),
        ]
    return {picture.name: picture for picture in pictures if picture is not None}


COSTS = {
    "size_bytes": ("size of model.onnx", "bytes", bytes_text),
    "latency_ms_p50": ("median latency, batch {batch}", "ms", ms_text),
    "macs": ("multiply-accumulates for one image", "MACs", count_text),
}
"""What a Pareto plot may have on its x axis: words (with a place for the batch), unit, and how a value is written."""
LEVEL_COSTS = {"size": "size_bytes", "macs": "macs", "latency": "latency_ms_p50"}


def pareto(run: Run, rows: list[dict], choices: Choices, cost: str, name: str) -> Picture:
    """Top-1 against a cost, the front as a line, labels that do not overlap.

    A variant stands with its Wilson interval; several seeds stand as one point, with their standard deviation. Points
    far below the rest stand at the lower edge with an arrow, and a line under the axis tells their accuracy: the axis
    is for those that a reader chooses from.
    """
    words, unit, write = COSTS[cost]
    words = words.format(batch=run.batch)
    points = points_of(rows, cost)
    kept = [point.top1 for point in points if point.on_front or choices.headline in point.variants]
    bars = [(point.top1, point.low, point.high) for point in points]
    floor = _floor(bars, kept)
    scale, unit = _scale([point.cost for point in points], unit)
    figure, axes = _figure(3.7)
    pruners, quantizers = _looks(run)
    marks = [(point.cost / scale, floor.place(point.top1)) for point in points]
    _cost_axis(axes, [x for x, _ in marks])
    titles = {}
    for index, (point, bar, (x, y)) in enumerate(zip(points, bars, marks, strict=True)):
        look = quantizers[point.quantizer] | pruners[point.pruner]
        color = look["color"]
        floor.draw_bar(axes, x, bar, color)
        chosen = choices.headline in point.variants
        (mark,) = axes.plot([x], [y], **look, ms=8 if chosen else 6, mew=1.4 if chosen else 0.8)
        mark.set_markeredgecolor(INK if chosen else color)
        mark.set_zorder(3.5 if chosen else 3)
        mark.set_gid(f"{name}-point-{index}")
        titles[f"{name}-point-{index}"] = (
            f"{_accuracy_words(point)}, {write(point.cost)}{', on the front' if point.on_front else ''}"
        )
    line = sorted(mark for mark, point in zip(marks, points, strict=True) if point.on_front)
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color=INK, lw=0.9, ls="--", drawstyle="steps-post", zorder=1)
    below = [point for point in points if floor.far_below(point.top1)]
    told = [f"{short_name(run.params, point.variants[0])} {percent_text(point.top1)}" for point in below]
    _cost_label(figure, axes, f"{words} ({unit})", told)
    several = any(len(point.variants) > 1 for point in points)
    axes.set_ylabel("test top-1 (%), mean over seeds" if several else "test top-1 (%)")
    axes.margins(y=0.12)
    _legend(figure, pruners, quantizers, front=len(line) > 1)
    labels = _label_points(figure, axes, _labels(run, points, marks, choices), marks)
    best = [point.variants[0] for point in sorted(points, key=lambda point: point.cost) if point.on_front]
    spread = f"{percent_text(run.params.report.confidence, 0)} Wilson interval"
    if several:
        spread = "standard deviation over seeds, a group of seeds under the name of its first,"
    alt = (
        f"Scatter plot of {len(points)} variants: test top-1 accuracy with {spread} against {words}. On the front, from"
        f" cheapest: {', '.join(best)}."
    )
    if told:
        alt += f" Far below: {', '.join(told)}."
    return _finish(figure, name, f"Accuracy against {words}", alt, titles, labels)


@dataclass(frozen=True)
class _Floor:
    """Where an accuracy axis begins, so that points far below the rest do not squeeze the rest together."""

    lowest: float
    y: float
    """In percent: here stand the marks of what lies below `lowest`."""
    step: float
    """In percent: so far under them stands their arrow."""

    def far_below(self, top1: float) -> bool:
        return top1 < self.lowest

    def place(self, top1: float) -> float:
        return self.y if self.far_below(top1) else 100 * top1

    def draw_bar(self, axes, x: float, bar: tuple[float, float, float], color: str) -> None:
        """The line between the ends of a point's bar; an arrow under what is far below."""
        top1, low, high = bar
        if self.far_below(top1):
            axes.plot([x], [self.y - self.step], color=color, ls="", **DOWN)
        else:
            axes.plot([x, x], [100 * low, 100 * high], color=color, lw=1, alpha=0.6)


def _floor(bars: list[tuple[float, float, float]], kept: Sequence[float] = ()) -> _Floor:
    """Far below is what lies under Tukey's lower outer fence (Exploratory Data Analysis, 1977, section 2D), and by at
    least `FAR_BELOW` under the lower quartile.

    Args:
        bars: accuracy of each point, and both ends of its bar.
        kept: accuracies that have to stand where they are.
    """
    top1s = [top1 for top1, _, _ in bars]
    low, _, high = quantiles(top1s, n=4, method="inclusive") if len(top1s) > 1 else top1s * 3
    lowest = min([low - max(3 * (high - low), FAR_BELOW), *kept])
    shown = [bar for bar in bars if bar[0] >= lowest]
    bottom, top = 100 * min(bar[1] for bar in shown), 100 * max(bar[2] for bar in shown)
    step = 0.06 * (top - bottom)
    return _Floor(lowest, bottom - step, step)


def _accuracy_words(point: Point) -> str:
    if len(point.variants) == 1:
        interval = f"[{percent_text(point.low)}, {percent_text(point.high)}]"
        return f"{point.variants[0]}: top-1 {percent_text(point.top1)} {interval}"
    deviation = f"\N{PLUS-MINUS SIGN} {percent_text(point.high - point.top1)}"
    return f"{point.variants[0]} and {len(point.variants) - 1} more seeds: top-1 {percent_text(point.top1)} {deviation}"


def size_bars(run: Run, rows: list[dict]) -> Picture:
    """What is loaded, and what is left of it under gzip (where unstructured zeros show)."""
    series = [("model.onnx", "size_bytes"), ("its gzip", "size_gzip_bytes"), ("model.safetensors", "artifact_bytes")]
    return _bars(run, rows, series, "bytes", "size", "Bytes of each variant", bytes_text)


def params_bars(run: Run, rows: list[dict]) -> Picture:
    """The truth beside what `model.parameters()` shows."""
    series = [
        ("parameters (true)", "params"),
        ("not zero", "params_nonzero"),
        ("visible to parameters()", "params_visible"),
    ]
    return _bars(run, rows, series, "parameters", "params", "Parameters: true, not zero, visible", count_text)


def levels(run: Run, rows: list[dict], found: list[Level], cost: str, name: str) -> Picture | None:
    """Accuracy against the share of a dense network's cost: a line for each method, means and deviations over seeds.

    None where no method has two levels. Levels far below the rest stand at the lower edge with an arrow; a line under
    the axis tells their accuracy.
    """
    several = len({level.family for level in found}) > 1
    lines: dict[tuple[str, str], list[Level]] = {}
    for level in found:
        method = f"{level.family} {level.kind}" if several else level.kind
        lines.setdefault((method, level.quantizer), []).append(level)
    if all(len(line) == 1 for line in lines.values()):
        return None
    words = COSTS[cost][0].format(batch=run.batch)
    figure, axes = _figure(3.7)
    methods, quantizers = (list(dict.fromkeys(key[i] for key in lines)) for i in (0, 1))
    dense: dict[str, list[float]] = {}
    for row in rows:
        if row["variant"] == run.params.baseline_of(row["variant"]):
            dense.setdefault(model_family(run.params, row["model"]), []).append(row["top1"])
    dense_means = {family: sum(top1) / len(top1) for family, top1 in dense.items()}
    floor = _floor([*map(_bar_of, found), *((top1,) * 3 for top1 in dense_means.values())], list(dense_means.values()))
    titles, below = {}, []
    for number, ((method, quantizer), line) in enumerate(lines.items()):
        look = {
            "color": COLORS[methods.index(method) % len(COLORS)],
            **_shape(methods.index(method)),
            "ls": LINES[quantizers.index(quantizer) % len(LINES)],
        }
        line = sorted(line, key=lambda level: (level.shares[cost], level.group.name))
        xs, ys = [100 * level.shares[cost] for level in line], [floor.place(level.group.top1) for level in line]
        label = f"{method} {quantizer}" if len(quantizers) > 1 else method
        axes.plot(xs, ys, **look, lw=1.2, ms=5, label=label)
        for index, (level, x, y) in enumerate(zip(line, xs, ys, strict=True)):
            floor.draw_bar(axes, x, _bar_of(level), look["color"])
            if floor.far_below(level.group.top1):
                below.append(f"{level.group.name} {percent_text(level.group.top1)}")
            (point,) = axes.plot([x], [y], **look, ms=5)
            point.set_gid(f"{name}-point-{number}-{index}")
            deviation = level.group.top1_deviation
            spread = f" \N{PLUS-MINUS SIGN} {100 * deviation:.2f}" if deviation is not None else ""
            titles[f"{name}-point-{number}-{index}"] = (
                f"{level.group.name}: {x:.1f} % of the dense {words}, top-1 {100 * level.group.top1:.2f} %{spread}"
            )
    for place, (family, top1) in enumerate(dense_means.items()):
        label = f"dense {family}" if several else "dense"
        axes.axhline(100 * top1, color=INK, lw=0.9, ls=LINES[1 + place % 3], label=label)
    _cost_label(figure, axes, f"{words}, % of the dense network's", below)
    seeds = any(len(level.group.variants) > 1 for level in found)
    axes.set_ylabel("test top-1 (%), mean over seeds" if seeds else "test top-1 (%)")
    _legend_below(figure, *axes.get_legend_handles_labels())
    alt = (
        f"Line plot of test top-1 accuracy against {words} as a share of the dense network's, for {', '.join(methods)}."
    )
    return _finish(figure, name, f"Levels: accuracy against {words}", alt, titles)


def _bar_of(level: Level) -> tuple[float, float, float]:
    """Accuracy, and a standard deviation over seeds to either side."""
    top1, deviation = level.group.top1, level.group.top1_deviation or 0.0
    return top1, top1 - deviation, top1 + deviation


NUMBERED_LAYERS = 40


def bits(run: Run, contest: Contest) -> Picture:
    """The bits of each layer as every search of a contest chose them, for its first seed."""
    shown, labels = contest.allocations, _search_labels(contest)
    chosen = [bits_by_layer(run, one.group.variants[0]) for one in shown]
    names = list(chosen[0])
    figure, axes = _figure(1.4 + 0.32 * len(shown))
    values = [[of_layer[name] for name in names] for of_layer in chosen]
    cells = axes.imshow(values, cmap="cividis", vmin=2, vmax=8, aspect="auto")
    axes.grid(visible=False)
    axes.set_yticks(range(len(shown)), [wrapped(label, LABEL_LETTERS) for label in labels])
    axes.set_xlabel("layer, in the network's order")
    _whole_numbers(axes)
    if len(names) > NUMBERED_LAYERS:  # no room for a number in each cell
        figure.colorbar(cells, ax=axes, ticks=range(2, 9), label="bits")
    else:
        for row, column in product(range(len(shown)), range(len(names))):
            value = values[row][column]
            color = "white" if value < 6 else "black"
            axes.text(column, row, value, ha="center", va="center", color=color, fontsize=6)
    alt = f"Bits of each layer at {contest.title}. " + "; ".join(
        f"{label}: " + ", ".join(map(str, row)) for label, row in zip(labels, values, strict=True)
    )
    return _finish(figure, f"bits_{contest.number}", f"Bits by layer: {contest.title} (first seed)", alt + ".", {})


def searches(run: Run, contest: Contest) -> Picture | None:
    """The objective of what each search of a contest tried, a band over seeds; None where none tried several."""
    named = zip(_search_labels(contest), contest.allocations, strict=True)
    curves = [(label, found) for label, one in named if (found := objectives_of(run, one)) is not None]
    if not curves:
        return None
    name = f"searches_{contest.number}"
    figure, axes = _figure(3.4)
    titles = {}
    for index, (label, found) in enumerate(curves):
        smooth = max(1, found.shape[1] // 40)
        count = found.shape[1] // smooth
        means = found[:, : count * smooth].reshape(len(found), count, smooth).mean(2)
        look = {"color": COLORS[index % len(COLORS)], "ls": LINES[index % len(LINES)]}
        xs = [(place + 0.5) * smooth for place in range(count)]
        (line,) = axes.plot(xs, means.mean(0), label=label, lw=1.3, **look)
        axes.fill_between(xs, means.min(0), means.max(0), color=look["color"], alpha=0.2, lw=0)
        line.set_gid(f"{name}-line-{index}")
        titles[f"{name}-line-{index}"] = (
            f"{label}: from {means[:, 0].mean():.4f} to {means[:, -1].mean():.4f}, best {found.min():.4f}"
        )
    axes.set_xlabel("allocations tried")
    axes.set_ylabel("objective on calibration images")
    _legend_below(figure, *axes.get_legend_handles_labels())
    alt = (
        f"Line plot of the objective (less is better) of the allocations that each search tried at {contest.title}, in"
        " order. "
    )
    alt += "; ".join(titles.values()) + "."
    return _finish(figure, name, f"What the searches tried: {contest.title}", alt, titles)


def _search_labels(contest: Contest) -> list[str]:
    """How each allocation was found, with its name where two were found the same way."""
    ways = [one.search for one in contest.allocations]
    return [
        way if ways.count(way) == 1 else f"{way} ({one.group.name})"
        for way, one in zip(ways, contest.allocations, strict=True)
    ]


def soak(run: Run) -> Picture | None:
    """Latency over the time of a soak: each window's median, and its 99th percentile; None where there was none."""
    if not run.soak:
        return None
    found = run.edge["soak"]
    minutes = [window["seconds"] / 60 for window in run.soak]
    figure, axes = _figure(3.4)
    series = {"median": "latency_ms_p50", "99th percentile": "latency_ms_p99"}
    titles = {}
    for index, (words, key) in enumerate(series.items()):
        values = [window[key] for window in run.soak]
        (line,) = axes.plot(minutes, values, color=COLORS[index], ls=LINES[index], lw=1.3, label=words)
        line.set_gid(f"soak-line-{index}")
        titles[f"soak-line-{index}"] = f"{words}: {ms_text(min(values))} to {ms_text(max(values))}"
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("latency of a window (ms)")
    _legend_below(figure, *axes.get_legend_handles_labels())
    alt = (
        f"Line plot of latency over {minutes[-1]:.1f} minutes of {found['variant']}: {found['verdict']}."
        f" {'; '.join(titles.values())}."
    )
    return _finish(figure, "soak", f"Soak of {found['variant']}: {found['verdict']}", alt, titles)


def corruptions(run: Run, choices: Choices) -> Picture | None:
    """Top-1 against severity, a panel for each corruption and a line for each headline variant; None without any."""
    shown = headline_variants(run, choices)
    curves = {variant: curves_of(run, variant) for variant in shown}
    kinds = list(curves[shown[0]])
    if not kinds:
        return None
    figure, panels = _figure(1.9 * -(-len(kinds) // 2), rows=-(-len(kinds) // 2), columns=2)
    titles = {}
    for kind, axes in zip(kinds, panels.flat, strict=False):
        axes.set_title(kind, fontsize=10)
        for index, (variant, of_kind) in enumerate(curves.items()):
            values = [100 * top1 for top1 in of_kind[kind]]
            look = {"color": COLORS[index], "ls": LINES[index % len(LINES)], "marker": MARKERS[index]}
            (line,) = axes.plot(range(len(values)), values, ms=3.5, lw=1.3, label=variant, **look)
            line.set_gid(f"corruptions-line-{kinds.index(kind)}-{index}")
            titles[f"corruptions-line-{kinds.index(kind)}-{index}"] = (
                f"{kind}, {variant}: {' to '.join(f'{value:.1f} %' for value in (values[0], values[-1]))}"
            )
        axes.set_xticks(range(len(values)), ["none", *map(str, range(1, len(values)))])
    for axes in panels.flat[len(kinds) :]:
        axes.remove()
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1 (%)")
    for axes in panels.flat[max(0, len(kinds) - 2) : len(kinds)]:
        axes.set_xlabel("severity")
        axes.tick_params(labelbottom=True)
    _legend_below(figure, *panels.flat[0].get_legend_handles_labels())
    alt = "Line plots of top-1 accuracy on corrupted test images by severity. " + "; ".join(titles.values()) + "."
    return _finish(figure, "corruptions", "Corrupted test images", alt, titles)


def training(run: Run) -> Picture | None:
    """Validation top-1 and training loss by epoch, a line for each run; None if nothing was trained."""
    if not run.curves:
        return None
    figure, (upper, lower) = _figure(4.8, rows=2)
    titles = {}
    for index, (name, curve) in enumerate(_shown_curves(run).items()):
        look = {
            "color": COLORS[index % len(COLORS)],
            "ls": LINES[(index // len(COLORS)) % len(LINES)],
            "marker": MARKERS[index % len(MARKERS)],
            "ms": 3.5,
            "lw": 1.3,
            "markevery": max(1, len(curve) // 8),
        }
        epochs = [row["epoch"] for row in curve]
        (line,) = upper.plot(epochs, [100 * row["validation_top1"] for row in curve], label=name, **look)
        lower.plot(epochs, [row["training_loss"] for row in curve], **look)
        line.set_gid(f"training-line-{index}")
        best = max(row["validation_top1"] for row in curve)
        titles[f"training-line-{index}"] = f"{name}: {len(curve)} epochs, best validation top-1 {percent_text(best)}"
    upper.set_ylabel("validation top-1 (%)")
    lower.set_ylabel("training loss")
    lower.set_xlabel("epoch")
    _whole_numbers(lower)
    _legend_below(figure, *upper.get_legend_handles_labels())
    alt = "Line plots of validation top-1 accuracy and training loss by epoch. " + "; ".join(titles.values()) + "."
    return _finish(figure, "training", "Training curves", alt, titles)


def _shown_curves(run: Run) -> dict[str, list[dict[str, float]]]:
    """All of them; beyond `MOST_CURVES`, those of the first model."""
    if len(run.curves) <= MOST_CURVES:
        return run.curves
    params, first = run.params, next(iter(run.params.models))
    model_of = {name: name for name in params.models}
    model_of |= {name: pruning.model for name, pruning in params.pruned.items()}
    model_of |= {name: params.model_of(name) for name in params.variants}
    return {name: curve for name, curve in run.curves.items() if model_of[name] == first}


def confusion(run: Run, variant: str) -> Picture:
    """Rows: the true class; columns: what the variant says; shares of the true class.

    Beyond `CONFUSION_CLASSES` classes, only those that are found least often, both ways, in their own order.
    """
    import numpy as np

    counts = confusion_counts(run, variant)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown, title = list(range(len(counts))), f"Confusion matrix of {variant}"
    alt = f"Confusion matrix of {variant} on {len(run.labels)} test images: shares of each true class."
    for worst in worst_classes(counts, 1):
        alt += f" Found least often: {run.classes[worst]}, {percent_text(shares[worst, worst])} of its images."
    if len(counts) > CONFUSION_CLASSES:
        shown = sorted(worst_classes(counts, CONFUSION_CLASSES))
        title += f": the {len(shown)} classes found least often"
        alt += f" Shown are the {len(shown)} classes found least often of {len(counts)}."
    names = [wrapped(run.classes[k], LABEL_LETTERS) for k in shown]
    counts, shares = counts[np.ix_(shown, shown)], shares[np.ix_(shown, shown)]
    figure, axes = _figure(4.9)
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    axes.grid(visible=False)
    places = range(0, len(names), max(1, len(names) // 20))
    axes.set_xticks(places, [names[place] for place in places], rotation=90)
    axes.set_yticks(places, [names[place] for place in places])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= CONFUSION_NUMBERS:
        for actual, predicted in product(range(len(names)), repeat=2):
            color = "white" if shares[actual, predicted] < 0.6 else "black"
            text = str(counts[actual, predicted]) if counts[actual, predicted] else "\N{MIDDLE DOT}"
            axes.text(predicted, actual, text, ha="center", va="center", color=color, fontsize=7)
    return _finish(figure, "confusion", title, alt, {})


def confusion_counts(run: Run, variant: str):
    """`[classes, classes]` integers: true class by predicted class."""
    import numpy as np

    k = len(run.classes)
    pairs = run.labels * k + run.variants[variant].predicted
    return np.bincount(pairs, minlength=k * k)[: k * k].reshape(k, k)


def worst_classes(counts, most: int) -> list[int]:
    """The classes found least often (lowest recall), worst first; a class without test images has none to lose."""
    import numpy as np

    images = counts.sum(axis=1)
    order = np.argsort(np.diag(counts) / np.maximum(images, 1), kind="stable")
    return order[images[order] > 0][:most].tolist()


def _bars(
    run: Run, rows: list[dict], series: list[tuple[str, str]], unit: str, name: str, title: str, write
) -> Picture:
    several_seeds = len({row["group"] for row in rows}) < len(rows)
    shown = list({row["group"]: row for row in reversed(rows)}.values())[::-1] if several_seeds else rows
    scale, unit = _scale([row[key] for row in shown for _, key in series], unit)
    names = [wrapped(short_name(run.params, row["variant"]), LABEL_LETTERS) for row in shown]
    lines = max(name.count("\n") + 1 for name in names)
    figure, axes = _figure(0.9 + max(0.42, LINE_HEIGHT * lines) * len(shown))
    titles, thickness = {}, 0.8 / len(series)
    for place, (words, key) in enumerate(series):
        for index, row in enumerate(shown):
            y = index + (place - (len(series) - 1) / 2) * thickness
            (bar,) = axes.barh(
                y,
                row[key] / scale,
                height=thickness * 0.92,
                color=COLORS[place],
                label=words if index == 0 else None,
                hatch=("", "///", "\\\\\\")[place],
                edgecolor="white",
                lw=0,
            )
            bar.set_gid(f"{name}-bar-{place}-{index}")
            titles[f"{name}-bar-{place}-{index}"] = f"{row['variant']}: {words} {write(row[key])}"
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(unit)
    _legend_below(figure, *axes.get_legend_handles_labels())
    alt = "Bar chart. " + "; ".join(
        f"{row['variant']}: " + ", ".join(f"{words} {write(row[key])}" for words, key in series) for row in shown
    )
    return _finish(figure, name, title, alt + ".", titles)


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib set up for the whole batch: no display, the same bytes each time, glyphs as outlines."""
    import matplotlib

    settings = {
        "svg.hashsalt": "edgewise",
        "svg.fonttype": "path",  # the same widths in every browser, so that what does not overlap here never does
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
    } | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(settings):
        yield


def _figure(height: float, rows: int = 1, columns: int = 1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=rows > 1, sharey=columns > 1)


def _finish(figure, name: str, title: str, alt: str, titles: dict[str, str], labels: Sequence = ()) -> Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # found once, it serves both
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(name, title, alt, png.getvalue(), _for_page(svg.getvalue(), name, alt, titles), list(labels))


def _for_page(svg: str, name: str, alt: str, titles: dict[str, str]) -> str:
    """matplotlib's SVG as an element of a page: its colours the page's, its points named and reachable by keyboard."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sid="[A-Za-z.0-9]+_\d+"', "", svg)  # numbered ids repeat from picture to picture
    svg = re.sub(r'(id="|url\(#|href="#)(?!' + name + "-)", rf"\g<1>{name}-", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL).replace("xlink:href", "href").replace(" \n", "\n")
    svg = re.sub(r'style="[^"]*"', lambda style: style[0].replace(": ", ":").replace("; ", ";"), svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="group" aria-label="{escape(alt)}"', 1)
    for gid, words in titles.items():
        words = escape(words)
        named = f'<g id="{gid}" class="mark" tabindex="0" role="img" aria-label="{words}">'
        svg = svg.replace(f'<g id="{gid}">', named, 1)
    # tenths of a point are as fine as a screen, at half the bytes; a glyph's scale of 0.09 would become 0
    svg = re.sub(r"scale\([^)]*\)|(\.\d)\d+", lambda number: number[1] or number[0], svg)
    return re.sub(r"\n\s*", "\n", svg)


def _looks(run: Run) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Of each pruner its colour, of each quantizer its marker, in the params' order.

    Pruners may be more than the colours: with one quantizer the marker tells them apart too, with several the filling.
    """
    used = run.params.variants.values()
    pruners = [p for p in run.params.pruners if any(run.params.pruned[v.pruned].pruner == p for v in used)]
    quantizers = [q for q in run.params.quantizers if any(v.quantizer == q for v in used)]
    colors = {pruner: {"color": COLORS[index % len(COLORS)]} for index, pruner in enumerate(pruners)}
    if len(quantizers) == 1:
        return {pruner: colors[pruner] | _shape(index) for index, pruner in enumerate(pruners)}, {quantizers[0]: {}}
    for index, pruner in enumerate(pruners[len(COLORS) :], len(COLORS)):
        colors[pruner]["fillstyle"] = FILLS[index // len(COLORS) % len(FILLS)]
    return colors, {quantizer: _shape(index) for index, quantizer in enumerate(quantizers)}


def _shape(index: int) -> dict[str, str]:
    """A marker for each of many things: all of them full, then hollow, then half full."""
    return {"marker": MARKERS[index % len(MARKERS)], "fillstyle": FILLS[index // len(MARKERS) % len(FILLS)]}


def _scale(values: list[float], unit: str) -> tuple[float, str]:
    """By what to divide so that the axis has short numbers, and the unit that results."""
    if unit == "ms":
        return 1.0, "ms"
    prefixes = ((1e9, "G"), (1e6, "M"), (1e3, "K" if unit == "bytes" else "k"))
    scale, prefix = next(((s, p) for s, p in prefixes if max(values) >= s), (1.0, ""))
    if unit == "bytes":
        return scale, f"{prefix}B" if prefix else "bytes"
    words = {"G": "thousand millions of ", "M": "millions of ", "k": "thousands of ", "": ""}[prefix]
    return scale, f"{words}{unit}"


def _cost_axis(axes, xs: list[float]) -> None:
    """Logarithmic where the cheapest and the dearest are far apart, with plain numbers at 1, 2, 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = min(xs), max(xs)
    if high > 4 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.1, high * (high / low) ** 0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        room = (high - low) * 0.12 or 0.5 * high
        axes.set_xlim(low - room, high + room)


def _cost_label(figure, axes, words: str, below: list[str]) -> None:
    """What the x axis shows; under it, for which the figure grows, what lies below the y axis."""
    told = f"\N{DOWNWARDS ARROW} far below: {', '.join(below)}".replace(" %", "\N{NO-BREAK SPACE}%") if below else ""
    lines = textwrap.wrap(told, LEGEND_LETTERS, break_on_hyphens=False)
    axes.set_xlabel("\n".join([words, *lines]))
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * len(lines))


def _whole_numbers(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(figure, pruners: dict[str, dict[str, str]], quantizers: dict[str, dict[str, str]], front: bool) -> None:
    """Pruners by colour, quantizers by marker, and the front's line where there is one, under the plot."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **{"marker": "o"} | look, ls="", ms=6, label=pruner)
        if {"marker", "fillstyle"} & look.keys()
        else Line2D([], [], **look, lw=5, label=pruner)
        for pruner, look in pruners.items()
    ]
    handles += [
        Line2D([], [], color=INK, **look, ls="", ms=6, label=quantizer)
        for quantizer, look in quantizers.items()
        if look
    ]
    if front:
        handles.append(Line2D([], [], color=INK, lw=0.9, ls="--", label="Pareto front"))
    _legend_below(figure, handles, [handle.get_label() for handle in handles])


def _legend_below(figure, handles: list, labels: list[str]) -> None:
    """Under the plot, for which the figure grows; as many columns as fit its width at the legend's letter width."""
    labels = [wrapped(label, LEGEND_LETTERS) for label in labels]
    letters = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), 66 // (letters + 6)))
    lines = -(-len(labels) // columns) * max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _labels(
    run: Run, points: list[Point], marks: list[tuple[float, float]], choices: Choices
) -> list[tuple[float, float, str]]:
    """x, y and text, the most important first: the headline, the baselines, the front from its cheapest."""
    order = []
    for point, mark in zip(points, marks, strict=True):
        first = point.variants[0]
        baseline = first == run.params.baseline_of(first)
        rank = (choices.headline not in point.variants, not baseline, not point.on_front, point.cost)
        order.append((rank, *mark, wrapped(short_name(run.params, first), LABEL_LETTERS)))
    return [label for _, *label in sorted(order, key=lambda item: item[0])]


def _label_points(
    figure, axes, labels: list[tuple[float, float, str]], marks: list[tuple[float, float]]
) -> list[Label]:
    """Write labels beside their points where nothing is in the way; where there is no room, a label is left out.

    The first, the headline's, is never left out: its line may run through other marks, and without any room it stands
    over what is near its point.

    Greedy: each label takes the nearest free one of twelve directions at growing distances (Christensen, Marks &
    Shieber 1995 give greedy placement as the baseline). One that stands away from its point, or nearer to another's
    mark, gets a thin line to its own, and is left out where that would run through another mark.

    Args:
        marks: x and y of all points, with a label or without.
    """
    figure.canvas.draw()  # settles the layout, so that data and pixels correspond
    axes.autoscale(False)  # and lines to labels must not move them apart again
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()
    point = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    obstacles = []
    for line in axes.lines:
        places = axes.transData.transform(line.get_xydata())
        radius = 4.5 * point if line.get_marker() not in ("None", None, "") else 1.0
        if line.get_drawstyle() == "steps-post":
            corners = [corner for a, b in pairwise(places) for corner in (a, (b[0], a[1]), b)]
            pieces = pairwise(corners)
        else:
            pieces = [(places.min(axis=0), places.max(axis=0))]
        for a, b in pieces:
            (x0, x1), (y0, y1) = sorted((a[0], b[0])), sorted((a[1], b[1]))
            obstacles.append((x0 - radius, y0 - radius, x1 + radius, y1 + radius))
    spots = [tuple(spot) for spot in axes.transData.transform(marks)]
    placed: list[Label] = []
    directions = [
        0,
        pi,
        pi / 2,
        -pi / 2,
        pi / 6,
        -pi / 6,
        5 * pi / 6,
        -5 * pi / 6,
        pi / 3,
        -pi / 3,
        2 * pi / 3,
        -2 * pi / 3,
    ]
    for x, y, words in labels:
        text = axes.text(x, y, words, fontsize=8.5, zorder=4)
        size = text.get_window_extent(renderer)
        width, height = size.width, size.height
        px, py = own = tuple(axes.transData.transform((x, y)))
        others = [spot for spot in spots if dist(spot, own) > 1]  # marks on the very same spot share their label
        best: Label | None = None
        for crossing, gap, angle in product((False,) if placed else (False, True), LABEL_GAPS, directions):
            reach = (gap + 4) * point
            cx = px + reach * cos(angle) + (width / 2) * cos(angle)
            cy = py + reach * sin(angle) + (height / 2) * sin(angle)
            box = (cx - width / 2 - 1, cy - height / 2 - 1, cx + width / 2 + 1, cy + height / 2 + 1)
            if box[0] < inside.x0 or box[2] > inside.x1 or box[1] < inside.y0 or box[3] > inside.y1:
                continue
            if any(_overlap(box, other) for other in (*(label.box for label in placed), *obstacles)):
                continue
            joined = gap > LABEL_GAPS[1] or _nearer(others, own, box)
            if joined and not crossing and any(_to_line(spot, own, _nearest(own, box)) < 6 * point for spot in others):
                continue
            best = Label(box, own, joined)
            break
        if best is None and not placed:
            x0 = min(max(px, inside.x0), inside.x1 - width - 2)
            y0 = min(max(py + 6 * point, inside.y0), inside.y1 - height - 2)
            box = (x0, y0, x0 + width + 2, y0 + height + 2)
            best = Label(box, own, _nearer(others, own, box))
        if best is None:
            text.remove()
            continue
        placed.append(best)
        x0, y0 = axes.transData.inverted().transform((best.box[0] + 1, best.box[1] + 1))
        text.set_position((x0, y0))
        text.set_verticalalignment("bottom")
        if best.joined:
            end = axes.transData.inverted().transform(_nearest(own, best.box))
            axes.plot([x, end[0]], [y, end[1]], color=INK, lw=0.5, alpha=0.6, zorder=1)
    return placed


def _nearest(point: tuple[float, ...], box: tuple[float, ...]) -> tuple[float, float]:
    """Of a box, what lies nearest to a point."""
    return min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])


def _nearer(others: list[tuple[float, ...]], own: tuple[float, ...], box: tuple[float, ...]) -> bool:
    """Whether a box stands as near to another mark as to its own, or nearer."""
    return any(_to_box(other, box) <= _to_box(own, box) for other in others)


def _to_box(point: tuple[float, ...], box: tuple[float, ...]) -> float:
    return dist(point, _nearest(point, box))


def _to_line(point: tuple[float, ...], start: tuple[float, ...], end: tuple[float, ...]) -> float:
    """Distance of a point from the line between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / (dx * dx + dy * dy or 1.0)
    along = min(max(along, 0.0), 1.0)
    return dist(point, (start[0] + along * dx, start[1] + along * dy))


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
