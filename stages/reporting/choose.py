"""Choose the variant to deploy under limits on accuracy, latency and size, by validation figures.

In:  `params.yaml` and the measurements of the listed variants.
Out: on the terminal, the choice, its test figures, and the command that deploys it. If no variant fits, the nearest
     one and exit code 1.
Run: edgewise choose [--max-drop POINTS] [--max-latency-ms MS] [--max-size SIZE]
"""

import argparse
import math
import re
import sys
import textwrap

from stages.common.errors import UserError
from stages.params.load import load_params
from stages.reporting.edge import describe_run, marks_of
from stages.reporting.inputs import CompletedRun, Params, read_run
from stages.reporting.rows import (
    Row,
    assemble_rows,
    best_dense,
    dense_of,
    groups_of,
    least_accuracy,
    metric_of,
    most_accurate,
    smallest,
    validation,
)
from stages.reporting.wording import (
    BYTE_UNITS,
    FIGURES,
    bytes_text,
    change_sentence,
    drop_text,
    fraction_text,
    lost_text,
    machine_text,
    percent_text,
    ratio_text,
    seeds_text,
    worst_text,
)

DROP, LATENCY, SIZE = "--max-drop", "--max-latency-ms", "--max-size"
RULE = (
    f"With {DROP}, the choice is the smallest file that fits all limits; without it, the highest validation figure that"
    " fits, which is top-1 or balanced accuracy (report.metric). Ties go to the other of the two."
)
NEAREST = (
    "If no variant fits, the nearest is the one with the smallest worst excess, as a fraction of the limit;"
    f" {DROP} counts as the error rate that it allows on validation images. The exit code is then 1."
)
COLUMNS, LABEL = 100, 18  # letters in a line, and width of the labels
Limits = dict[str, float]
"""By option, the largest of `costs` that is allowed."""


def costs(row: Row) -> dict[str, float]:
    """What each option limits: the error rate on validation images (a fraction), median milliseconds, bytes."""
    return {DROP: 1 - validation(row), LATENCY: row["latency_ms_p50"], SIZE: row["size_bytes"]}


def limits_of(rows: list[Row], max_drop: float | None, ms: float | None, size: int | None) -> Limits:
    """Those of the limits that are given."""
    error = None if max_drop is None else 1 - least_accuracy(rows, max_drop)
    given = {DROP: error, LATENCY: ms, SIZE: size}
    return {option: most for option, most in given.items() if most is not None}


def excesses(row: Row, limits: Limits) -> dict[str, float]:
    """The excess over each limit that the variant exceeds, in that limit's unit; empty if it fits."""
    found = costs(row)
    return {option: found[option] - most for option, most in limits.items() if found[option] > most}


def fitting(rows: list[Row], limits: Limits) -> list[Row]:
    return [row for row in rows if not excesses(row, limits)]


def best(fits: list[Row], limits: Limits) -> Row:
    """The choice by `RULE` among those that fit."""
    return smallest(fits) if DROP in limits else most_accurate(fits)


def distance(row: Row, limits: Limits) -> float:
    """The largest excess as a fraction of its limit."""
    return max(excess / limits[option] for option, excess in excesses(row, limits).items())


def nearest(rows: list[Row], limits: Limits) -> Row:
    """The choice by `NEAREST` if none fits; ties go to the higher `validation`."""
    return min(rows, key=lambda row: (distance(row, limits), -validation(row)))


def answer(run: CompletedRun, rows: list[Row], limits: Limits, fits: list[Row]) -> str:
    """The best of the variants that fit, the reason, its test figures and the command that deploys it."""
    chosen, total = best(fits, limits), f"{len(rows)} variants"
    highest = f"the highest validation {FIGURES[metric_of(chosen)]}"
    rule = f"the smallest file (because of {DROP})" if DROP in limits else highest
    only = f"the only one of {total} that fits"
    lines = [
        ("chosen", chosen["variant"]),
        ("why", only if len(fits) == 1 else f"{rule} of {len(fits)} that fit, of {total}"),
        *_figures(run, rows, chosen, limits),
        *_tested(run, rows, chosen),
        *(("warning", mark) for mark in _warnings(run, rows, chosen)),
    ]
    return f"{_written(lines)}\n{'deploy':<{LABEL}}uv run edgewise bundle {chosen['variant']}"


def _warnings(run: CompletedRun, rows: list[Row], chosen: Row) -> list[str]:
    lost = lost_text(chosen, dense_of(chosen, {row["variant"]: row for row in rows}))
    return [*([lost] if lost else []), *marks_of(run, [chosen["variant"]])]


def refusal(run: CompletedRun, rows: list[Row], limits: Limits) -> str:
    """That no variant fits, which limits cannot be met, and the nearest variant with its validation figures."""
    lines = [("chosen", f"none: no variant meets {'all limits at once' if len(limits) > 1 else 'the limit'}")]
    for option, most in limits.items():
        met, total = len(fitting(rows, {option: most})), f"of {len(rows)} variants"
        words = f"met by {met} {total}" if met else f"cannot be met: met by none {total}"
        lines.append((option, f"{_limit(rows, option, most)}; {words}"))
    row = nearest(rows, limits)
    missed = distance(row, limits)
    over = f"{percent_text(missed, 2)} over" if missed < 1 else ratio_text(1 + missed)
    note = " (a drop counts as error rate)" if DROP in limits else ""
    lines.append(("nearest", f"{row['variant']}: at worst {over} a limit{note}"))
    marks = (("warning", mark) for mark in marks_of(run, []))  # of the machine; the others are about test images
    return _written([*lines, *_figures(run, rows, row, limits), *marks])


def _figures(run: CompletedRun, rows: list[Row], row: Row, limits: Limits) -> list[tuple[str, str]]:
    """Both validation figures, then a line for each of the other `costs`; with the limit and its excess."""
    found, over = costs(row), excesses(row, limits)
    bounds = {option: f"; {_limit(rows, option, most)}" for option, most in limits.items()}
    for option, excess in over.items():
        bounds[option] += f", missed by {_amount(option, excess)}"
    lines = []
    for label, figure in (("validation top-1", "top1"), ("and balanced", "balanced_accuracy")):
        ours, dense = (percent_text(part, 2) for part in (row[f"validation_{figure}"], best_dense(rows, figure)))
        bound = bounds.get(DROP, "") if figure == metric_of(row) else ""
        lines.append((label, f"{ours} (best dense {dense}){bound}"))
    return [
        *lines,
        ("latency", f"{_amount(LATENCY, found[LATENCY])}{bounds.get(LATENCY, '')}"),
        ("timed on", f"{machine_text(run.edge)}: median in ONNX Runtime, batch {run.batch}"),
        ("model.onnx", f"{_amount(SIZE, found[SIZE])}{bounds.get(SIZE, '')}"),
    ]


def _limit(rows: list[Row], option: str, most: float) -> str:
    if option == DROP:
        return f"at most {_amount(DROP, round(most - 1 + best_dense(rows, metric_of(rows[0])), 9))} below dense"
    return f"at most {_amount(option, most)}"


def _amount(option: str, amount: float) -> str:
    """In the unit of the option's limit, with four digits (bytes with three): `0.2877 ms`."""
    short = float(f"{amount:.4g}")
    if option == DROP:
        return drop_text(short)
    return f"{short:g} ms" if option == LATENCY else bytes_text(short)


def _tested(run: CompletedRun, rows: list[Row], row: Row) -> list[tuple[str, str]]:
    """The test figures, which had no part in the choice, and the costs of the dense network of the same seed."""
    group, dense = groups_of(rows)[row["group"]], dense_of(row, {one["variant"]: one for one in rows})
    figure = metric_of(row)
    against_dense = group.change_of(figure, "delta")
    confidence, itself = run.params.report.confidence, "it is the dense network itself"
    top1 = fraction_text(row["top1"], row["top1_ci_low"], row["top1_ci_high"])
    balanced = fraction_text(*(row[f"balanced_accuracy{end}"] for end in ("", "_ci_low", "_ci_high")))
    change = (
        itself
        if against_dense is None
        else change_sentence(against_dense, "the dense network", group, confidence, figure)
    )
    size, time = (ratio_text(dense[key] / row[key]) for key in ("size_bytes", "latency_ms_p50"))
    return [
        ("test top-1", f"{top1} ({percent_text(confidence, 0)} Wilson interval), n = {row['n_test']:,}"),
        ("and balanced", f"{balanced}; worst class: {worst_text(row)}"),
        ("change", change),
        ("seeds", seeds_text(group)),
        (
            "dense costs",
            f"{size} the bytes ({dense['variant']}, {bytes_text(dense['size_bytes'])}), {time} the time in ONNX Runtime"
            f" ({_amount(LATENCY, dense['latency_ms_p50'])}), {ratio_text(row['latency_ratio'])} in"
            f" {describe_run(run)['baseline_runtime']}",
        ),
    ]


def _written(lines: list[tuple[str, str]]) -> str:
    """Labels and texts in two columns; names are never broken."""
    wrapper = textwrap.TextWrapper(
        COLUMNS, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(f"{label:<{LABEL}}{text}") for label, text in lines)


def number(text: str, least: float, most: float, expected: str) -> float:
    """A number within limits as typed."""
    try:
        if least <= (value := float(text)) <= most:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: give {expected}")


def points(text: str) -> float:
    """Points as typed, as a fraction."""
    return number(text, 0, 100, "points of accuracy from 0 to 100, such as 1.0") / 100


def milliseconds(text: str) -> float:
    return number(text, 1e-9, 1e9, "milliseconds above 0, such as 2.5")


def size(text: str) -> int:
    """Bytes as typed: `300000`, `500KB`, `1.5 MB`; decimal units."""
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+) ?({'|'.join(BYTE_UNITS)}|B|)", text, re.IGNORECASE | re.ASCII)
    value = float(match[1]) * BYTE_UNITS.get(match[2].upper(), 1) if match else 0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give bytes, or KB, MB or GB, such as 300000, 500KB or 1.5MB")
    return round(value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Give at least one limit. {RULE} {NEAREST}"
    parser.add_argument(DROP, type=points, metavar="POINTS", help="of validation accuracy below the best dense network")
    parser.add_argument(LATENCY, type=milliseconds, metavar="MS", help="median latency in ONNX Runtime in this run")
    parser.add_argument(SIZE, type=size, metavar="SIZE", help="of model.onnx: 300000 (bytes), 500KB, 1.5MB")


def run(arguments: argparse.Namespace) -> None:
    given = (arguments.max_drop, arguments.max_latency_ms, arguments.max_size)
    if all(limit is None for limit in given):
        raise UserError(f"give at least one of {DROP}, {LATENCY}, {SIZE}")
    completed = read_run(load_params(Params))
    rows = assemble_rows(completed)
    limits = limits_of(rows, *given)
    if not (fits := fitting(rows, limits)):
        print(refusal(completed, rows, limits), flush=True)
        sys.exit(1)
    print(answer(completed, rows, limits, fits))
