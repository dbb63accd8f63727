"""How every picture is drawn: style, figure, axes, legend, and the SVG that the page embeds."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape

from stages.reporting.labels import Label
from stages.reporting.wording import wrapped

INK, FAINT = "#1b1f24", "#c3c9d2"
"""Placeholders that the SVG replaces by the page's text and line colors, so that dark mode works."""
WIDTH = 5.2
"""Inches of every figure: two fit side by side on a desktop, and one is still readable on a phone."""
PNG_DPI = 150
LEGEND_LETTERS = 50
"""Letters in a line of the legend before it is wrapped."""
LINE_HEIGHT = 0.19
"""Inches of a line of text."""


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


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for all pictures: no display, reproducible bytes, glyphs as outlines."""
    import matplotlib

    settings = {
        "svg.hashsalt": "edgewise",
        "svg.fonttype": "path",  # the same text widths in every browser, so labels never overlap
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": FAINT,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 9,
    } | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float, rows: int = 1):
    """A figure of the common width and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, sharex=rows > 1)


def finish(figure, name: str, title: str, alt: str, titles: dict[str, str] | None = None, labels=()) -> Picture:
    """The picture of a figure.

    Args:
        titles: for each mark by its `gid`, the text that names it.
    """
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # the layout is settled and serves both files
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Picture(name, title, alt, png.getvalue(), _for_page(svg.getvalue(), name, alt, titles or {}), list(labels))


def _for_page(svg: str, name: str, alt: str, titles: dict[str, str]) -> str:
    """matplotlib's SVG as an element of a page: with the page's colors, and named points that the keyboard reaches."""
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
    # tenths of a point are enough for a screen and halve the bytes; a glyph's scale of 0.09 must not become 0
    svg = re.sub(r"scale\([^)]*\)|(\.\d)\d+", lambda number: number[1] or number[0], svg)
    return re.sub(r"\n\s*", "\n", svg)


def cost_axis(axes, xs: list[float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5 if the costs differ by more than a factor of four."""
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


def grow(figure, lines: int) -> None:
    """Make room for lines of text."""
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * lines)


def legend_below(figure, handles: list, labels: list[str]) -> None:
    """Under the plot, with as many columns as fit; the figure grows by the legend's lines."""
    labels = [wrapped(label, LEGEND_LETTERS) for label in labels]
    letters = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), 66 // (letters + 6)))
    lines = -(-len(labels) // columns) * max(label.count("\n") + 1 for label in labels)
    grow(figure, lines)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
