"""Pictures of the run, each as PNG (for files) and as SVG (for the page) from one drawing.

The colors are Okabe & Ito's, which color-blind readers can tell apart. Color shows the pruner, the marker shows the
quantizer.
"""

import textwrap
from statistics import quantiles
from typing import Any

from stages.reporting.drawing import (
    INK,
    LEGEND_LETTERS,
    Picture,
    cost_axis,
    finish,
    grow,
    legend_below,
    new_figure,
    style,
)
from stages.reporting.inputs import CompletedRun
from stages.reporting.labels import place_labels
from stages.reporting.rows import Choices, Point, Row, metric_of, points_of
from stages.reporting.wording import (
    BYTE_UNITS,
    FIGURES,
    PLUS_MINUS,
    bytes_text,
    ms_text,
    percent_text,
    short_name,
    wrapped,
)

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "H", "8")
FILLS = ("full", "none", "left")
LINES = ("-", "--", ":", "-.")
Look = dict[str, Any]
"""Keyword arguments of a matplotlib line."""
LABEL_LETTERS = 22
"""Letters in a line of a label before it is wrapped."""
MOST_CURVES = 40
"""Number of training curves in one picture."""
FAR_BELOW = 0.05
"""Points less than this accuracy below the rest always have a place on the axis."""
COSTS = {
    "size_bytes": ("size of model.onnx", "bytes", bytes_text),
    "latency_ms_p50": ("median latency, batch {batch}", "ms", ms_text),
}
"""For each cost of a Pareto plot: words (with a place for the batch), unit, and the function that words a value."""


def draw_all(run: CompletedRun, rows: list[Row], choices: Choices) -> dict[str, Picture]:
    """All pictures by file name; pictures without content are left out."""
    with style():
        pictures = [
            pareto(run, rows, choices, "size_bytes", "pareto_size"),
            pareto(run, rows, choices, "latency_ms_p50", "pareto_latency"),
            soak(run),
            training(run),
        ]
    return {picture.name: picture for picture in pictures if picture is not None}


def pareto(run: CompletedRun, rows: list[Row], choices: Choices, cost: str, name: str) -> Picture:
    """Top-1 against a cost with the front as a line; labels on the front and the headline variant.

    If the run chooses by balanced accuracy, that figure takes the place of top-1.

    A variant has its interval; several seeds are one point with their standard deviation. Points far below the
    rest are listed under the axis instead, so that the axis fits those that a reader chooses from.
    """
    words, unit, write = COSTS[cost]
    words = words.format(batch=run.batch)

    def is_headline(point: Point) -> bool:
        return choices.headline in point.group.variants

    figure_name = FIGURES[metric_of(rows[0])]
    points = points_of(rows, cost)
    lowest = _axis_floor(points, [point.accuracy for point in points if point.on_front or is_headline(point)])
    listed = [f"{_name(run, point)} {percent_text(point.accuracy)}" for point in points if point.accuracy < lowest]
    points = [point for point in points if point.accuracy >= lowest]
    prefixes = BYTE_UNITS.items() if unit == "bytes" else ()
    dearest = max(point.cost for point in points)
    scale, unit = next(((one, name) for name, one in prefixes if dearest >= one), (1.0, unit))
    figure, axes = new_figure(3.7)
    pruners, quantizers = looks_of(run)
    cost_axis(axes, [point.cost / scale for point in points])
    titles = {}
    for index, point in enumerate(points):
        look, x = quantizers[point.first["quantizer"]] | pruners[point.first["pruner"]], point.cost / scale
        axes.plot([x, x], [100 * point.low, 100 * point.high], color=look["color"], lw=1, alpha=0.6)
        emphasis = {"ms": 8, "mew": 1.4, "mec": INK, "zorder": 3.5} if is_headline(point) else {"ms": 6, "zorder": 3}
        (mark,) = axes.plot([x], [100 * point.accuracy], **look | emphasis)
        mark.set_gid(f"{name}-point-{index}")
        titles[f"{name}-point-{index}"] = (
            f"{_accuracy_words(point, figure_name)}, {write(point.cost)}{', on the front' if point.on_front else ''}"
        )
    front = sorted((point for point in points if point.on_front), key=lambda point: point.cost)
    if len(front) > 1:
        xs, ys = [point.cost / scale for point in front], [100 * point.accuracy for point in front]
        axes.plot(xs, ys, color=INK, lw=0.9, ls="--", drawstyle="steps-post", zorder=1)
    below = f"\N{DOWNWARDS ARROW} far below: {', '.join(listed)}".replace(" %", "\N{NO-BREAK SPACE}%") if listed else ""
    lines = textwrap.wrap(below, LEGEND_LETTERS, break_on_hyphens=False)
    axes.set_xlabel("\n".join([f"{words} ({unit})", *lines]))
    grow(figure, len(lines))
    several = any(point.group.seeds > 1 for point in points)
    axes.set_ylabel(f"test {figure_name} (%)" + (", mean over seeds" if several else ""))
    axes.margins(y=0.12)
    _legend(figure, pruners, quantizers, front=len(front) > 1)
    named = [*filter(is_headline, points), *(point for point in front if not is_headline(point))]
    texts = [(p.cost / scale, 100 * p.accuracy, wrapped(_name(run, p), LABEL_LETTERS)) for p in named]
    labels = place_labels(figure, axes, texts, INK)
    spread = "standard deviation over seeds" if several else "interval"
    alt = (
        f"Scatter plot of test {figure_name} with {spread} against {words}. On the front, from cheapest:"
        f" {', '.join(point.first['variant'] for point in front)}."
    )
    alt += f" Far below: {', '.join(listed)}." if listed else ""
    return finish(figure, name, f"Accuracy against {words}", alt, titles, labels)


def _axis_floor(points: list[Point], kept: list[float]) -> float:
    """The lowest accuracy on the axis: Tukey's lower outer fence (Exploratory Data Analysis, 1977, section 2D).

    It is at least `FAR_BELOW` under the lower quartile and never above the `kept` accuracies.
    """
    accuracies = [point.accuracy for point in points]
    low, _, high = quantiles(accuracies, n=4, method="inclusive") if len(accuracies) > 1 else accuracies * 3
    return min([low - max(3 * (high - low), FAR_BELOW), *kept])


def _name(run: CompletedRun, point: Point) -> str:
    return short_name(run.params, point.first["variant"])


def _accuracy_words(point: Point, figure: str) -> str:
    name, accuracy = point.first["variant"], percent_text(point.accuracy)
    if point.group.seeds == 1:
        return f"{name}: {figure} {accuracy} [{percent_text(point.low)}, {percent_text(point.high)}]"
    std = percent_text(point.high - point.accuracy)
    return f"{name} and {point.group.seeds - 1} more seeds: {figure} {accuracy} {PLUS_MINUS} {std}"


def looks_of(run: CompletedRun) -> tuple[dict[str, Look], dict[str, Look]]:
    """The color and filling of each pruner and the marker of each quantizer, in the params' order."""
    used = run.params.variants.values()
    pruners = [p for p in run.params.pruners if any(run.params.pruned[v.pruned].pruner == p for v in used)]
    quantizers = [q for q in run.params.quantizers if any(v.quantizer == q for v in used)]
    colors = {
        pruner: {"color": COLORS[index % len(COLORS)], "fillstyle": FILLS[index // len(COLORS) % len(FILLS)]}
        for index, pruner in enumerate(pruners)
    }
    return colors, {name: {"marker": MARKERS[index % len(MARKERS)]} for index, name in enumerate(quantizers)}


def _legend(figure, pruners: dict[str, Look], quantizers: dict[str, Look], front: bool) -> None:
    """Under the plot: pruners by color and filling, quantizers by marker, and the front's line if it is drawn."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look, marker="o", ls="", ms=6, label=pruner) for pruner, look in pruners.items()]
    if len(quantizers) > 1:
        marks = quantizers.items()
        handles += [Line2D([], [], color=INK, **look, ls="", ms=6, label=name) for name, look in marks]
    if front:
        handles.append(Line2D([], [], color=INK, lw=0.9, ls="--", label="Pareto front"))
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])


def soak(run: CompletedRun) -> Picture | None:
    """Median and 99th percentile of latency in each time window of the soak test; None without one."""
    if not run.soak:
        return None
    found = run.edge["soak"]
    minutes = [window["seconds"] / 60 for window in run.soak]
    figure, axes = new_figure(3.4)
    for index, (words, key) in enumerate((("median", "latency_ms_p50"), ("99th percentile", "latency_ms_p99"))):
        values = [window[key] for window in run.soak]
        axes.plot(minutes, values, color=COLORS[index], ls=LINES[index], lw=1.3, label=words)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("latency of a window (ms)")
    legend_below(figure, *axes.get_legend_handles_labels())
    title = f"Soak test of {found['variant']}: {found['verdict']}"
    return finish(figure, "soak", title, f"Line plot of latency over {minutes[-1]:.1f} minutes. {title}.")


def training(run: CompletedRun) -> Picture | None:
    """The validation figure that chooses and the training loss by epoch, with a line for each network; None if nothing
    was trained."""
    if not run.curves:
        return None
    metric = run.params.report.metric
    key, words = f"validation_{metric}", f"validation {FIGURES[metric]}"
    figure, (upper, lower) = new_figure(4.8, rows=2)
    shown = dict(list(run.curves.items())[:MOST_CURVES])
    for index, (name, curve) in enumerate(shown.items()):
        look = {
            "color": COLORS[index % len(COLORS)],
            "ls": LINES[(index // len(COLORS)) % len(LINES)],
            "marker": MARKERS[index % 8],
            "ms": 3.5,
            "lw": 1.3,
            "markevery": max(1, len(curve) // 8),
        }
        epochs = [row["epoch"] for row in curve]
        upper.plot(epochs, [100 * row[key] for row in curve], label=name, **look)
        lower.plot(epochs, [row["training_loss"] for row in curve], **look)
    upper.set_ylabel(f"{words} (%)")
    lower.set_ylabel("training loss")
    lower.set_xlabel("epoch")
    lower.xaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, *upper.get_legend_handles_labels())
    best = ", ".join(f"{name} {percent_text(max(row[key] for row in rows))}" for name, rows in shown.items())
    alt = f"Line plots of {words} and training loss by epoch. Best {words}: {best}."
    rest = f" (the first {MOST_CURVES} of {len(run.curves)})" if len(shown) < len(run.curves) else ""
    return finish(figure, "training", f"Training curves{rest}", alt)
