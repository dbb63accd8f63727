"""How size, speed, accuracy and change are worded: the same text on the page, in the summary, cards and command."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.params.section import Section
from stages.reporting.inputs import Params
from stages.reporting.rows import Group, Row, dense_of, group_of, groups_of, metric_of, model_family
from stages.reporting.statistics import Change

BYTE_UNITS = {"GB": 1e9, "MB": 1e6, "KB": 1e3}
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
FIGURES = {"top1": "top-1", "balanced_accuracy": "balanced accuracy"}
NAMED = 5
"""Names that a sentence lists at most."""


def bytes_text(size: float) -> str:
    """Decimal units, three significant digits: `1.25 MB`."""
    for unit, scale in BYTE_UNITS.items():
        if size >= scale:
            return f"{_three_digits(size / scale)} {unit}"
    return f"{size:.0f} bytes"


def count_text(count: float) -> str:
    """`2.48 M`, `61.3 k`, `812`."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{_three_digits(count / scale)} {unit}"
    return f"{count:.0f}"


def percent_text(fraction: float, decimals: int = 1) -> str:
    return f"{100 * fraction:z.{decimals}f} %".replace("-", "\N{MINUS SIGN}")


def points_text(fraction: float, decimals: int = 1) -> str:
    """A difference of two accuracies in percentage points with its sign."""
    return signed_text(100 * fraction, decimals)


def signed_text(value: float, decimals: int) -> str:
    """With a sign, a true minus, and never a negative zero."""
    return f"{value:+z.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def drop_text(fraction: float) -> str:
    """A drop in percentage points without sign: `1 point`, `2.5 points`."""
    return f"{100 * fraction:g} point{'s' * (f'{100 * fraction:g}' != '1')}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """In a sentence: `p = 0.031` or `p < 0.001`."""
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"


def ms_text(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 1 else f"{_three_digits(milliseconds)} ms"


def ratio_text(ratio: float) -> str:
    return f"{_three_digits(ratio)}\N{MULTIPLICATION SIGN}"


def size_ratio_text(ratio: float) -> str:
    """The size of a file against a reference `ratio` times as large: `30.0 times smaller than`."""
    if ratio < 0.995:
        return f"{_three_digits(1 / ratio)} times as large as"
    return f"{_three_digits(ratio)} times smaller than" if ratio >= 1.005 else "as large as"


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def fraction_text(fraction: float, low: float, high: float) -> str:
    """A fraction with its interval: `85.89 % [85.19 %, 86.56 %]`."""
    return f"{percent_text(fraction, 2)} [{percent_text(low, 2)}, {percent_text(high, 2)}]"


def std_text(std: float | None, decimals: int = 2, scale: float = 100) -> str:
    """A standard deviation that follows its mean; empty if it is not known."""
    return "" if std is None else f" {PLUS_MINUS} {scale * std:.{decimals}f}"


def interval_text(change: Change, decimals: int = 2) -> str:
    """`[-0.61, +1.17]`; empty if it is not known."""
    if change.low is None or change.high is None:
        return ""
    return f"[{points_text(change.low, decimals)}, {points_text(change.high, decimals)}]"


def change_text(change: Change) -> str:
    """`+0.28 points [-0.61, +1.17], p = 0.625`."""
    words = f"{points_text(change.delta, 2)} points {interval_text(change)}".rstrip()
    return words if change.p_value is None else f"{words}, {p_equals(change.p_value)}"


def change_sentence(change: Change, other: str, group: Group, confidence: float, figure: str = "top1") -> str:
    """The change of a figure against another network, and whether the test images can show it."""
    pooled = f", pooled over {group.seeds} seeds" if group.seeds > 1 else ""
    sentence = f"Against {other}, {FIGURES[figure]} changes by {change_text(change)}{pooled}"
    if change.p_value is None:
        return f"{sentence}."
    return f"{sentence}: " + ("a measurable" if change.p_value < 1 - confidence else "no measurable") + " difference."


def seeds_text(group: Group) -> str:
    """The spread over training runs as far as the seeds of the run show it."""
    if group.seeds == 1:
        return "one seed, so the spread over training runs is unknown"
    figure = metric_of(group.rows[0])
    mean = f"{percent_text(group.mean(figure), 2)}{std_text(group.std(figure))}"
    return f"mean of {group.seeds} seeds {mean}" + (f" {FIGURES[figure]}" if figure != "top1" else "")


def names_text(names: Sequence[str]) -> str:
    """At most `NAMED` names."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def worst_text(row: Row) -> str:
    """`defect 25.0 % of 4 images`."""
    return f"{row['worst_class']} {percent_text(row['worst_recall'])} of {plural(row['worst_images'], 'image')}"


def lost_text(row: Row, dense: Row) -> str:
    """A sentence about the classes that a variant never classifies correctly; empty without any."""
    if not (lost := row.get("classes_at_zero")):
        return ""
    images, known = plural(row["worst_images"], "test image"), dense["classes_at_zero"]
    which = f"the {images} of {row['worst_class']}"
    if lost > 1:
        which = f"the test images of {lost:,} classes, such as {images} of {row['worst_class']},"
    others = f"{known:,} such class{'es' * (known != 1)}"
    return f"{row['variant']} classifies none of {which} correctly (dense network: {others})."


def short_name(params: Params, variant: str) -> str:
    """Pruner and quantizer; with the model only if the run has several models (seeds do not count)."""
    families = {model_family(params, model) for model in params.models}
    if len(families) > 1:
        return group_of(params, variant)
    return f"{params.pruner_of(variant)}-{params.variants[variant].quantizer}"


def wrapped(name: str, letters: int) -> str:
    """Lines of at most so many letters, broken after `-`, `_` or a space; a longer piece stays whole."""
    lines = [""]
    for piece in re.findall(r"[^-_ ]*[-_ ]|[^-_ ]+", name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def describe(name: str, section: Section) -> str:
    """An entry of the params in one phrase: its name and the single values that the file gives it."""
    values = section.model_dump(exclude_unset=True)
    settings = [f"{key} {value}" for key, value in values.items() if key != "method" and not isinstance(value, dict)]
    inside = ", ".join(([] if values["method"] == name else [values["method"]]) + settings)
    return f"{name} ({inside})" if inside else name


def machine_text(run: dict[str, Any]) -> str:
    """The machine in one phrase, from `run.json`."""
    machine, protocol = run.get("machine") or {}, run.get("protocol") or {}
    name = machine.get("cpu") or machine.get("processor") or "an unnamed CPU"
    return f"{name}, {plural(protocol['threads'], 'thread')}" if "threads" in protocol else name


@dataclass(frozen=True)
class Headline:
    """The variant to ship in words."""

    variant: str
    rule: str
    """Why it is the headline."""
    figures: list[tuple[str, str, str]]
    """Name, value and note of size, latency, top-1 and balanced accuracy."""
    comparison: str
    """Sentences: the same figures beside those of the dense network."""
    change: str
    """Sentences: the change against the dense network and against the control."""
    warning: str
    """`lost_text` of the variant."""


def headline_of(rows: list[Row], run: dict[str, Any], metrics: dict[str, Any]) -> Headline:
    """From the contents of `variants.json`, `run.json` and `metrics.json`."""
    by_name = {row["variant"]: row for row in rows}
    chosen = by_name[metrics["headline_variant"]]
    dense = dense_of(chosen, by_name)
    drop = drop_text(run["headline_max_drop"]) if "headline_max_drop" in run else "the allowed drop"
    figure = metric_of(chosen)
    best = "the best dense network" if len(run["baseline_latency_ms_p50"]) > 1 else "the dense network"
    baseline = f"{ms_text(run['baseline_latency_ms_p50'][chosen['model']])} in {run['baseline_runtime']}"
    top1 = f"[{percent_text(chosen['top1_ci_low'])}, {percent_text(chosen['top1_ci_high'])}], n = {chosen['n_test']:,}"
    smaller = ratio_text(dense["size_bytes"] / chosen["size_bytes"])
    sizes = f"dense: {bytes_text(dense['size_bytes'])}, {smaller} as large"
    times = f"dense: {ms_text(dense['latency_ms_p50'])} in ONNX Runtime, {baseline}"
    accuracy = fraction_text(chosen[figure], chosen[f"{figure}_ci_low"], chosen[f"{figure}_ci_high"])
    comparison = f"Its {FIGURES[figure]} is {accuracy}, n = {chosen['n_test']:,}"
    if chosen is dense:
        comparison += f". It takes {ms_text(dense['latency_ms_p50'])} in ONNX Runtime ({baseline})."
    else:
        comparison = (
            f"It is {size_ratio_text(dense['size_bytes'] / chosen['size_bytes'])} the dense network"
            f" ({bytes_text(dense['size_bytes'])}) and takes {ms_text(chosen['latency_ms_p50'])} instead of"
            f" {ms_text(dense['latency_ms_p50'])} in ONNX Runtime ({baseline}). {comparison};"
            f" that of the dense network is {percent_text(dense[figure], 2)}."
        )
    return Headline(
        chosen["variant"],
        f"the smallest file whose validation {FIGURES[figure]} is within {drop} of {best}",
        [
            ("Size of model.onnx", bytes_text(chosen["size_bytes"]), sizes),
            ("Median latency", ms_text(chosen["latency_ms_p50"]), times),
            ("Test top-1", percent_text(chosen["top1"]), f"{top1}; dense: {percent_text(dense['top1'])}"),
            *_balanced(chosen, dense),
        ],
        comparison,
        _headline_change(chosen, groups_of(rows)[chosen["group"]], run, only=len(rows) == 1),
        lost_text(chosen, dense),
    )


def _balanced(chosen: Row, dense: Row) -> list[tuple[str, str, str]]:
    """The figure of balanced accuracy, which reports of older code lack."""
    if "balanced_accuracy" not in chosen:
        return []
    interval = (percent_text(chosen[f"balanced_accuracy_ci_{end}"]) for end in ("low", "high"))
    note = f"[{', '.join(interval)}]; dense: {percent_text(dense['balanced_accuracy'])}; worst: {worst_text(chosen)}"
    return [("Test balanced accuracy", percent_text(chosen["balanced_accuracy"]), note)]


def _headline_change(chosen: Row, group: Group, run: dict[str, Any], only: bool) -> str:
    confidence, figure = run.get("confidence", 0.95), metric_of(chosen)
    change, control = (group.change_of(figure, kind) for kind in ("delta", "control"))
    if change is None:
        return "This is the dense network: " + (
            "the run has no compressed variant." if only else "no smaller variant is within the allowed drop."
        )
    sentences = [change_sentence(change, "the dense network", group, confidence, figure)]
    if control is not None:
        other = f"the control `{chosen['control']}`, which trained as long without compression"
        sentences.append(change_sentence(control, other, group, confidence, figure))
        sentences.append("Only the second comparison isolates compression; the first includes the longer training.")
    return " ".join(sentences)


def soak_lines(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the soak test's results, from `run.json`; empty without one."""
    if not (soak := run.get("soak")):
        return []

    def interval(key: str, unit: str) -> str:
        value, low, high = (signed_text(soak[name], 2) for name in (key, f"{key}_low", f"{key}_high"))
        return f"{value} {unit} [{low}, {high}]"

    rate = f"{soak['images_per_second']:g} images/s" if soak["images_per_second"] else "back-to-back inferences"
    growth = soak["rss_growth_bytes"]
    lines = [
        ("variant", f"{soak['variant']}, {rate}"),
        ("length", f"{soak['soak_seconds'] / 60:.1f} minutes, {soak['soak_runs']:,} inferences"),
        ("latency", f"median {ms_text(soak['latency_ms_p50'])}, 99th percentile {ms_text(soak['latency_ms_p99'])}"),
        ("change over the soak", interval("change_percent", "%")),
    ]
    if soak["verdict"] != "cannot tell":
        lines.append(("slope", interval("slope_percent_per_hour", "% an hour")))
    lines += [
        ("growth of memory", "not known" if growth is None else f"{signed_text(growth / 1e6, 1)} MB"),
        ("predictions that changed", f"{soak['wrong']} of {soak['soak_runs']:,}"),
    ]
    if soak["images_per_second"]:
        lines.append(("late images", f"{soak['late']:,}"))
    reasons = f": {'; '.join(soak['reasons'])}" if soak["reasons"] else ""
    return [*lines, ("verdict", f"{soak['verdict']}{reasons}")]


def printed_lines(run: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the accuracy on printed samples, from `run.json`; empty without them."""
    if not (printed := run.get("printed")):
        return []

    def top1(key: str) -> str:
        return fraction_text(printed[key], printed[f"{key}_ci_low"], printed[f"{key}_ci_high"])

    return [
        ("variant", printed["variant"]),
        ("test images", f"{printed['n_images']:,}, seed {printed['seed']}"),
        ("top-1, printed and filmed", top1("top1_printed")),
        ("top-1 on the original images", top1("top1_clean")),
        ("same class on both", percent_text(printed["agreement"], 2)),
    ]
