"""What corrupted test images do to each variant, against the dense baselines on the very same pixels."""

from dataclasses import dataclass

import numpy as np

from stages.reporting.inputs import Run
from stages.reporting.rows import Choices, Group, small_dense
from stages.reporting.statistics import PairedDifference, holm, paired_difference


@dataclass(frozen=True)
class Robustness:
    """Of one group, means over its seeds; accuracies are fractions."""

    group: Group
    clean: float
    """Top-1 on the same images as they are."""
    corrupted: float
    """Mean top-1 over all corruptions and severities."""
    difference: PairedDifference | None
    """Of the corrupted top-1 against the baselines', an image being the unit; None for the baselines themselves."""
    p_value: float | None
    """Holm-corrected over the groups."""


def robustness_of(run: Run, groups: dict[str, Group]) -> list[Robustness]:
    """In the order of the groups; empty where the run tried no corruptions."""
    first = next(iter(run.variants.values())).corrupted
    if not first.cells:
        return []
    found = {name: measured.corrupted.correct(run.labels) for name, measured in run.variants.items()}
    rows, differences = {}, {}
    for group in groups.values():
        clean = [run.variants[variant].correct[first.position].mean() for variant in group.variants]
        rows[group.name] = float(np.mean(clean)), float(np.mean([found[variant] for variant in group.variants]))
        if group.difference is not None:
            by_image = sum(
                found[variant].sum(0, dtype=np.int64) - found[run.params.baseline_of(variant)].sum(0, dtype=np.int64)
                for variant in group.variants
            )
            repeats = len(group.variants) * len(first.cells)
            differences[group.name] = paired_difference(by_image, repeats, run.params.report.confidence)
    corrected = holm({name: difference.p_value for name, difference in differences.items()})
    return [
        Robustness(groups[name], *figures, differences.get(name), corrected.get(name)) for name, figures in rows.items()
    ]


def curves_of(run: Run, variant: str) -> dict[str, list[float]]:
    """For each corruption the top-1 at severity 0, which is none, 1, 2 and 3."""
    corrupted = run.variants[variant].corrupted
    clean = run.variants[variant].correct[corrupted.position]
    curves: dict[str, list[float]] = {}
    for (name, _), outcomes in zip(corrupted.cells, corrupted.correct(run.labels), strict=True):
        curves.setdefault(name, [float(clean.mean())]).append(float(outcomes.mean()))
    return curves


def headline_variants(run: Run, choices: Choices) -> list[str]:
    """At most five: the three choices, the first's dense baseline, and a smaller network that was simply trained."""
    wanted = [
        run.params.baseline_of(choices.headline),
        choices.headline,
        choices.fastest,
        choices.most_accurate,
        small_dense(run),
    ]
    return list(dict.fromkeys(variant for variant in wanted if variant is not None))
