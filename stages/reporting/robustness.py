"""Accuracy on corrupted test images, compared with the dense networks on the same pixels."""

from dataclasses import dataclass

import numpy as np

from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import Change, Choices, Group
from stages.reporting.statistics import PairedDifference, holm, paired_difference


@dataclass(frozen=True)
class Robustness:
    """Means of one group over its seeds; accuracies are fractions."""

    group: Group
    clean: float
    """Top-1 on the same images without corruption."""
    corrupted: float
    """Mean top-1 over all corruptions and severities."""
    change: Change | None
    """Corrupted top-1 minus the dense networks', with an image as the unit and p-values Holm-corrected over the
    groups; None for the dense networks themselves."""


def robustness_of(run: CompletedRun, groups: dict[str, Group]) -> dict[str, Robustness]:
    """In the order of the groups; empty if the run tried no corruptions."""
    first = run.first.corrupted
    if not first.cells:
        return {}
    found = {name: measured.corrupted.correct(run.labels) for name, measured in run.variants.items()}
    differences: dict[str, PairedDifference] = {}
    for group in groups.values():
        if group.change is not None:
            by_image = sum(
                found[variant].sum(0, dtype=np.int64) - found[run.params.baseline_of(variant)].sum(0, dtype=np.int64)
                for variant in group.variants
            )
            repeats = len(group.variants) * len(first.cells)
            differences[group.name] = paired_difference(by_image, repeats, run.params.report.confidence)
    corrected = holm({name: difference.p_value for name, difference in differences.items()})

    def change(name: str) -> Change | None:
        one = differences.get(name)
        return None if one is None else Change(one.delta, one.low, one.high, corrected[name])

    return {
        name: Robustness(
            group,
            float(np.mean([run.variants[variant].correct[first.position].mean() for variant in group.variants])),
            float(np.mean([found[variant] for variant in group.variants])),
            change(name),
        )
        for name, group in groups.items()
    }


def curves_of(run: CompletedRun, variant: str) -> dict[str, list[float]]:
    """For each corruption the top-1 by severity; severity 0 is the clean image."""
    corrupted = run.variants[variant].corrupted
    clean = run.variants[variant].correct[corrupted.position]
    curves: dict[str, list[float]] = {}
    for (name, _), outcomes in zip(corrupted.cells, corrupted.correct(run.labels), strict=True):
        curves.setdefault(name, [float(clean.mean())]).append(float(outcomes.mean()))
    return curves


def headline_variants(run: CompletedRun, choices: Choices) -> list[str]:
    """At most five: the three choices, the headline's dense network, and the best smaller dense network."""
    dense = run.params.baseline_of(choices.headline)
    wanted = [dense, choices.headline, choices.fastest, choices.most_accurate, choices.small_dense]
    return list(dict.fromkeys(variant for variant in wanted if variant is not None))
