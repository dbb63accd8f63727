"""Choose: the variant to deploy under limits on accuracy, latency and size, picked on validation figures.

In:  `params.yaml` and what the stages measured for the listed variants, as the report reads it.
Out: on the terminal, the choice and why, its test figures, and the command that deploys it; or, with exit code 1, that
     no variant fits and which is nearest.
Run: python -m stages.reporting.choose [--max-drop POINTS] [--max-latency-ms MS] [--max-size SIZE]
"""

import argparse
import math
import re
import sys
import textwrap

from stages.common.errors import run_stage
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.cards import machine_text
from stages.reporting.edge import marks_of
from stages.reporting.inputs import Run, read_run
from stages.reporting.rows import (
    assemble_groups,
    assemble_rows,
    baseline_words,
    best_dense_top1,
    least_top1,
    most_accurate,
    smallest,
    validation_top1,
)
from stages.reporting.text import (
    BYTE_UNITS,
    allowance_text,
    bytes_text,
    difference_text,
    percent_text,
    ratio_text,
    share_text,
    spread_text,
)

DROP, LATENCY, SIZE = "--max-drop", "--max-latency-ms", "--max-size"
RULE = (
    f"With {DROP} the best is the smallest file that fits all limits, since accuracy within the drop is given up;"
    " without it, the highest validation top-1 that fits. Ties go to the other of the two."
)
NEAREST = (
    f"Nearest is the variant whose largest excess over a limit is the smallest share of that limit; {DROP} counts as"
    " the error rate that it allows on validation images."
)
COLUMNS, LABEL = 100, 18  # letters in a line, and before its text


def costs(run: Run, variant: str) -> dict[str, float]:
    """What each option limits: the error rate on validation images (a fraction), median milliseconds, bytes."""
    measured = run.variants[variant]
    return {
        DROP: 1 - validation_top1(run, variant),
        LATENCY: measured.edge["latency_ms_p50"],
        SIZE: measured.profile["size_bytes"],
    }


def limits_of(run: Run, max_drop: float | None, max_latency_ms: float | None, max_size: int | None) -> dict[str, float]:
    """The largest of `costs` that are allowed, by option; those that are not limited are left out."""
    error = None if max_drop is None else 1 - least_top1(run, max_drop)
    given = {DROP: error, LATENCY: max_latency_ms, SIZE: max_size}
    return {option: most for option, most in given.items() if most is not None}


def excesses(run: Run, variant: str, limits: dict[str, float]) -> dict[str, float]:
    """How far the variant is over each limit that it does not keep, in that limit's unit; empty where it fits."""
    found = costs(run, variant)
    return {option: found[option] - most for option, most in limits.items() if found[option] > most}


def fitting(run: Run, limits: dict[str, float]) -> list[str]:
    return [variant for variant in run.params.variants if not excesses(run, variant, limits)]


def best(run: Run, variants: list[str], limits: dict[str, float]) -> str:
    """The one of those that fit that `RULE` says; a limit on cost that it keeps never makes another one the best."""
    return smallest(run, variants) if DROP in limits else most_accurate(run, variants)


def distance(run: Run, variant: str, limits: dict[str, float]) -> float:
    """The largest excess of a variant that does not fit, as a share of its limit: what `NEAREST` goes by."""
    return max(excess / limits[option] for option, excess in excesses(run, variant, limits).items())


def nearest(run: Run, limits: dict[str, float]) -> str:
    """The one that `NEAREST` says, of variants none of which fits; ties go to the higher validation top-1."""
    return min(run.params.variants, key=lambda name: (distance(run, name, limits), -validation_top1(run, name)))


def answer(run: Run, limits: dict[str, float], fits: list[str]) -> str:
    """The best of the variants that fit, and why, in words; then its test figures and the command that deploys it."""
    chosen, of = best(run, fits, limits), f"{len(run.variants)} variants"
    if len(fits) == 1:
        why = f"the only one of {of} that fits"
    elif DROP in limits:
        why = f"the smallest file (as {DROP} is given) of {len(fits)} that fit, of {of}"
    else:
        why = f"the highest validation top-1 of {len(fits)} that fit, of {of}"
    lines = [
        ("chosen", chosen),
        ("why", why),
        *_figures(run, chosen, limits),
        *_tested(run, chosen),
        *(("take care", mark) for mark in marks_of(run, [chosen])),
    ]
    return f"{_written(lines)}\n{'deploy':<{LABEL}}uv run python -m stages.edge.bundle {chosen}"


def refusal(run: Run, limits: dict[str, float]) -> str:
    """That no variant fits, which limits cannot be met, and what is nearest, in words and validation figures."""
    lines = [("chosen", f"none: no variant keeps {'all limits at once' if len(limits) > 1 else 'the limit'}")]
    for option, most in limits.items():
        kept, of = len(fitting(run, {option: most})), f"of {len(run.variants)} variants"
        words = f"kept by {kept} {of}" if kept else f"cannot be met: kept by none {of}"
        lines.append((option, f"{_limit(run, option, most)}; {words}"))
    variant = nearest(run, limits)
    missed = distance(run, variant, limits)
    over = f"{percent_text(missed, 2)} over" if missed < 1 else f"{ratio_text(1 + missed)}"
    note = " (a drop counts as error rate)" if DROP in limits else ""
    lines.append(("nearest", f"{variant}: at worst {over} a limit{note}, no other by less"))
    marks = (("take care", mark) for mark in marks_of(run, []))  # of the machine; others tell of test images
    return _written([*lines, *_figures(run, variant, limits), *marks])


def _figures(run: Run, variant: str, limits: dict[str, float]) -> list[tuple[str, str]]:
    """What the choice looks at: a line for each of `costs`, with its limit, and by how much it is missed."""
    found, over = costs(run, variant), excesses(run, variant, limits)
    bounds = {option: f"; {_limit(run, option, most)}" for option, most in limits.items()}
    for option, excess in over.items():
        bounds[option] += f", missed by {_amount(option, excess)}"
    top1, dense = (percent_text(share, 2) for share in (validation_top1(run, variant), best_dense_top1(run)))
    return [
        ("validation top-1", f"{top1} (best dense {dense}){bounds.get(DROP, '')}"),
        ("latency", f"{_amount(LATENCY, found[LATENCY])}{bounds.get(LATENCY, '')}"),
        ("timed on", f"{machine_text(run)}: median in ONNX Runtime, batch {run.batch}"),
        ("model.onnx", f"{_amount(SIZE, found[SIZE])}{bounds.get(SIZE, '')}"),
    ]


def _limit(run: Run, option: str, most: float) -> str:
    if option == DROP:
        return f"at most {_amount(DROP, round(most - 1 + best_dense_top1(run), 9))} under dense"
    return f"at most {_amount(option, most)}"


def _amount(option: str, amount: float) -> str:
    """In the unit of the option's limit, to four digits of which bytes show three: `0.2877 ms`."""
    short = float(f"{amount:.4g}")
    if option == DROP:
        return allowance_text(short)
    return f"{short:g} ms" if option == LATENCY else bytes_text(short)


def _tested(run: Run, variant: str) -> list[tuple[str, str]]:
    """What had no part in the choice: the test figures, and how the dense network of the same seed compares."""
    groups = assemble_groups(run)
    rows = {row["variant"]: row for row in assemble_rows(run, groups)}
    row, baseline = rows[variant], run.params.baseline_of(variant)
    group, dense = groups[row["group"]], rows[baseline]
    top1 = share_text(row["top1"], row["top1_ci_low"], row["top1_ci_high"])
    confidence = percent_text(run.params.report.confidence, 0)
    if group.difference is None:
        change = "it is the dense network itself"
    else:
        pooled = f", pooled over {len(group.variants)} seeds" if len(group.variants) > 1 else ""
        change = f"{difference_text(group.difference, group.p_value)}{pooled}"
    return [
        ("test top-1", f"{top1} ({confidence} Wilson interval), n = {row['n_test']:,}"),
        ("against dense", change),
        ("seeds", spread_text(group, 2)),
        (
            "dense costs",
            f"{ratio_text(dense['size_bytes'] / row['size_bytes'])} the bytes ({baseline},"
            f" {bytes_text(dense['size_bytes'])}), {ratio_text(dense['latency_ms_p50'] / row['latency_ms_p50'])} the"
            f" time in ONNX Runtime ({_amount(LATENCY, dense['latency_ms_p50'])}), {ratio_text(row['latency_ratio'])}"
            f" in {baseline_words(run)}",
        ),
    ]


def _written(lines: list[tuple[str, str]]) -> str:
    """Labels and their texts in two columns; names stay whole."""
    return "\n".join(
        textwrap.fill(
            text,
            COLUMNS,
            initial_indent=f"{label:<{LABEL}}",
            subsequent_indent=" " * LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in lines
    )


def points(text: str) -> float:
    """Points as typed, to a fraction."""
    if not 0 <= (value := _number(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{text}: give points of top-1 from 0 to 100, such as 1.0")
    return value / 100


def milliseconds(text: str) -> float:
    if not 0 < (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give milliseconds above 0, such as 2.5")
    return value


def _number(text: str) -> float:
    """NaN, which keeps no bound, for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def size(text: str) -> int:
    """Bytes as typed: `300000`, `500KB`, `1.5 MB`; decimal units, as everywhere here."""
    match = re.fullmatch(rf"(\d+\.?\d*|\.\d+) ?({'|'.join(BYTE_UNITS)}|B|)", text, re.IGNORECASE | re.ASCII)
    value = float(match[1]) * BYTE_UNITS.get(match[2].upper(), 1) if match else 0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give bytes, or KB, MB or GB, such as 300000, 500KB or 1.5MB")
    return round(value)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.reporting.choose",
        description="Choose the variant to deploy under limits, on validation figures; then tell its test figures.",
        epilog=f"{RULE} Where none fits, the exit code is 1. {NEAREST}",
    )
    parser.add_argument(DROP, type=points, metavar="POINTS", help="of validation top-1 under the best dense network")
    parser.add_argument(
        LATENCY, type=milliseconds, metavar="MS", help="median latency in ONNX Runtime on the machine of the run"
    )
    parser.add_argument(SIZE, type=size, metavar="SIZE", help="of model.onnx: 300000 (bytes), 500KB, 1.5MB")
    arguments = parser.parse_args()
    if all(limit is None for limit in vars(arguments).values()):
        parser.error(f"give at least one of {DROP}, {LATENCY}, {SIZE}")
    return arguments


def main() -> None:
    arguments = parse()
    run = read_run(load_params(Params))
    limits = limits_of(run, **vars(arguments))
    if not (fits := fitting(run, limits)):
        print(refusal(run, limits), flush=True)
        sys.exit(1)
    print(answer(run, limits, fits))


if __name__ == "__main__":
    run_stage(main)
