"""Numbers as a person reads them: the same words in the page, the plots, the tables and the cards."""

import re

from stages.params.whole import Params
from stages.reporting.rows import Group, group_of, model_family
from stages.reporting.statistics import PairedDifference

BYTE_UNITS = {"GB": 1e9, "MB": 1e6, "KB": 1e3}


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
    return f"{100 * fraction:.{decimals}f} %"


def points_text(fraction: float, decimals: int = 1) -> str:
    """A difference of two accuracies in percentage points, with its sign (a true minus)."""
    return signed_text(100 * fraction, decimals)


def signed_text(value: float, decimals: int) -> str:
    """With its sign, a true minus, and no sign of a zero's other than plus."""
    return f"{value:+z.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def allowance_text(fraction: float) -> str:
    """A size in percentage points without sign: `1 point`, `2.5 points`."""
    return f"{100 * fraction:g} point{'s' * (f'{100 * fraction:g}' != '1')}"


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """For a sentence: `= 0.031` or `< 0.001`."""
    return p_text(p) if p < 0.001 else f"= {p_text(p)}"


def share_text(share: float, low: float, high: float) -> str:
    """A share with its interval: `85.89 % [85.19 %, 86.56 %]`."""
    return f"{percent_text(share, 2)} [{percent_text(low, 2)}, {percent_text(high, 2)}]"


def difference_text(difference: PairedDifference, p_value: float) -> str:
    delta, low, high = (points_text(value, 2) for value in (difference.delta, difference.low, difference.high))
    return f"{delta} points [{low}, {high}] (paired exact test, Holm-corrected p {p_equals(p_value)})"


def spread_text(group: Group, decimals: int = 1) -> str:
    """How far training again moved the test top-1, as far as the seeds of the run tell."""
    if group.top1_deviation is None:
        return "one seed, so the spread of training again is not known"
    mean, deviation = percent_text(group.top1, decimals), f"{100 * group.top1_deviation:.{decimals}f}"
    return f"mean of {len(group.variants)} seeds {mean} \N{PLUS-MINUS SIGN} {deviation}"


def claim_text(value: float | None, unit: str) -> str:
    """A figure of a claim in its unit (`fraction`, `points` or `ms`, as in claims.yaml)."""
    if value is None:
        return "\N{EN DASH}"
    if unit == "points":
        return f"{points_text(value)} points"
    return f"{value:g} ms" if unit == "ms" else percent_text(value).replace("-", "\N{MINUS SIGN}")


def ms_text(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 1 else f"{_three_digits(milliseconds)} ms"


def ratio_text(ratio: float) -> str:
    return f"{_three_digits(ratio)}\N{MULTIPLICATION SIGN}"


def short_name(params: Params, variant: str) -> str:
    """Pruner and quantizer; the model stands in front only where the run has several (seeds do not count)."""
    pruner, quantizer = params.pruner_of(variant), params.variants[variant].quantizer
    name = f"{pruner}-{quantizer}"
    families = {model_family(params, model) for model in params.models}
    return name if len(families) == 1 else group_of(params, variant)


def wrapped(name: str, letters: int) -> str:
    """Lines of at most so many letters, broken after `-`, `_` or a space; a longer piece stays whole."""
    lines = [""]
    for piece in re.findall(r"[^-_ ]*[-_ ]|[^-_ ]+", name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > letters:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
