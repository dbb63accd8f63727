"""Placement of text labels beside the marks of a plot."""

from dataclasses import dataclass
from itertools import pairwise, product
from math import cos, pi, sin

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
GAPS = (5, 11, 19, 30, 44)
"""Possible distances of a label from its marker, in points; the nearest free one is used."""
DIRECTIONS = tuple(pi * n / 6 for n in (0, 6, 3, -3, 1, -1, 5, -5, 2, -2, 4, -4))
MARK_RADIUS = 4.5
"""In points."""


@dataclass(frozen=True)
class Label:
    """A label beside a mark, in pixels."""

    box: Box
    mark: tuple[float, float]
    """The center of the mark that it names."""


def place_labels(figure, axes, labels: list[tuple[float, float, str]], color: str) -> list[Label]:
    """Write labels beside their points where nothing is in the way, with a thin line to the point.

    Greedy: each label takes the nearest free one of twelve directions at growing distances (Christensen, Marks &
    Shieber 1995 give greedy placement as the baseline). A label without room is left out, except the first, which then
    covers what is near its point.

    Args:
        labels: x, y and text, the most important first.
    """
    figure.canvas.draw()  # settles the layout, so that data map to pixels
    axes.autoscale(False)  # lines to labels must not rescale the axes
    figure.set_layout_engine("none")
    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    taken = [box for line in axes.lines for box in _boxes_of(axes, line, point)]
    placed: list[Label] = []
    for x, y, words in labels:
        text = axes.text(x, y, words, fontsize=8.5, zorder=4, verticalalignment="bottom")
        size = text.get_window_extent(renderer)
        width, height = size.width + 2, size.height + 2
        px, py = mark = tuple(axes.transData.transform((x, y)))
        best: Box | None = None
        for gap, angle in product(GAPS, DIRECTIONS):
            reach = (gap + 4) * point
            x0 = px + (reach + width / 2) * cos(angle) - width / 2
            y0 = py + (reach + height / 2) * sin(angle) - height / 2
            box = (x0, y0, x0 + width, y0 + height)
            within = box[0] >= inside.x0 and box[2] <= inside.x1 and box[1] >= inside.y0 and box[3] <= inside.y1
            if within and not any(overlap(box, other) for other in taken):
                best = box
                break
        if best is None and not placed:
            x0 = min(max(px, inside.x0), inside.x1 - width)
            y0 = min(max(py + 6 * point, inside.y0), inside.y1 - height)
            best = (x0, y0, x0 + width, y0 + height)
        if best is None:
            text.remove()
            continue
        placed.append(Label(best, mark))
        taken.append(best)
        text.set_position(axes.transData.inverted().transform((best[0] + 1, best[1] + 1)))
        nearest = min(max(px, best[0]), best[2]), min(max(py, best[1]), best[3])
        end = axes.transData.inverted().transform(nearest)
        axes.plot([x, end[0]], [y, end[1]], color=color, lw=0.5, alpha=0.6, zorder=1)
    return placed


def _boxes_of(axes, line, point: float) -> list[Box]:
    """The boxes that a drawn line and its markers cover."""
    places = axes.transData.transform(line.get_xydata())
    radius = MARK_RADIUS * point if line.get_marker() not in ("None", None, "") else 1.0
    pieces = [(places.min(axis=0), places.max(axis=0))]
    if line.get_drawstyle() == "steps-post":
        pieces = list(pairwise([corner for a, b in pairwise(places) for corner in (a, (b[0], a[1]), b)]))
    return [
        (min(a[0], b[0]) - radius, min(a[1], b[1]) - radius, max(a[0], b[0]) + radius, max(a[1], b[1]) + radius)
        for a, b in pieces
    ]


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
