"""Accuracy on corrupted test images, compared with the dense networks on the same pixels."""

from dataclasses import dataclass

import numpy as np

from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import Choices, Group
from stages.reporting.statistics import Change, corrected, paired_difference


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
    changes: dict[str, Change] = {}
    for group in groups.values():
        if group.change is not None:
            by_image = sum(
                found[variant].sum(0, dtype=np.int64) - found[run.params.baseline_of(variant)].sum(0, dtype=np.int64)
                for variant in group.variants
            )
            repeats = len(group.variants) * len(first.cells)
            changes[group.name] = paired_difference(by_image, repeats, run.params.report.confidence)
    changes = corrected(changes)
    return {
        name: Robustness(
            group,
            float(np.mean([run.variants[variant].correct[first.position].mean() for variant in group.variants])),
            float(np.mean([found[variant] for variant in group.variants])),
            changes.get(name),
        )
        for name, group in groups.items()
    }


def headline_variants(run: CompletedRun, choices: Choices) -> list[str]:
    """At most five: the three choices, the headline's dense network, and the best smaller dense network."""
    dense = run.params.baseline_of(choices.headline)
    wanted = [dense, choices.headline, choices.fastest, choices.most_accurate, choices.small_dense]
    return list(dict.fromkeys(variant for variant in wanted if variant is not None))
