"""Searches for bits at one budget: what each found, how it did, and the learned allocation against every other."""

from dataclasses import dataclass

import numpy as np

from stages.common.params import AllocatedBits, Bits, UniformBits
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, compare
from stages.reporting.statistics import PairedDifference, holm, mean_and_deviation

LEARNED = "policy gradient"
SHARED = ("rounding", "epochs", "learning_rate_factor", "distillation", "distillation_temperature")
"""Settings that two quantizers must share to differ by their bits alone."""


@dataclass(frozen=True)
class Allocation:
    """What one way to choose bits did with one network at one budget, over its seeds."""

    group: Group
    contest: tuple
    """What competitors share: the network and its pruner, the budget, and how weights are rounded and recovered."""
    search: str
    average_bits: float
    """Of all weights with integers, mean over seeds; never above the budget."""
    evaluations: int
    """The most that a seed used."""
    objective: float | None
    """Of the best allocation tried, on the calibration images: mean over seeds."""
    objective_deviation: float | None
    artifact_bytes: float
    """Mean over seeds."""


@dataclass(frozen=True)
class Duel:
    """The learned allocation against another one at the same budget."""

    learned: str
    other: str
    difference: PairedDifference
    p_value: float
    """Holm-corrected over all duels."""


def allocations_of(run: Run, groups: dict[str, Group]) -> list[Allocation]:
    """Every group whose layers have chosen bits, and the uniform ones at the same budgets; in the order of the params.

    Empty where no search was run.
    """
    found = []
    for group in groups.values():
        first = group.variants[0]
        quantizer = run.params.quantize[run.params.variants[first].quantizer]
        if not isinstance(quantizer, Bits):
            continue
        searches = [run.variants[name].description.get("search", {}) for name in group.variants]
        tried = [search["best"] for search in searches if search]
        mean, deviation = mean_and_deviation(tried) if tried else (None, None)
        uniform = isinstance(quantizer, UniformBits)
        budget = float(quantizer.bits if uniform else quantizer.average_bits)
        pruning = group.name.rsplit("-", 1)[0]
        found.append(
            Allocation(
                group,
                (pruning, budget, *(getattr(quantizer, name) for name in SHARED)),
                "uniform" if uniform else _words(quantizer),
                float(np.mean([average_bits(run, name) for name in group.variants])),
                max((search.get("evaluations", 0) for search in searches), default=0),
                mean,
                deviation,
                float(np.mean([run.variants[name].profile["artifact_bytes"] for name in group.variants])),
            )
        )
    contested = {one.contest for one in found if one.search != "uniform"}
    return [one for one in found if one.contest in contested]


def duels_of(run: Run, allocations: list[Allocation]) -> list[Duel]:
    """Each learned allocation against its competitors, on the same seeds and test images."""
    pairs: dict[tuple[str, str], PairedDifference] = {}
    for learned in (one for one in allocations if one.search == LEARNED):
        for other in allocations:
            same = other.contest == learned.contest and len(other.group.variants) == len(learned.group.variants)
            if same and other is not learned:
                both = list(zip(learned.group.variants, other.group.variants, strict=True))
                pairs[learned.group.name, other.group.name] = compare(run, both)
    corrected = holm({f"{ours} {theirs}": difference.p_value for (ours, theirs), difference in pairs.items()})
    return [
        Duel(ours, theirs, difference, corrected[f"{ours} {theirs}"]) for (ours, theirs), difference in pairs.items()
    ]


def average_bits(run: Run, variant: str) -> float:
    """Bits of all weights with integers over their number."""
    search = run.variants[variant].description.get("search", {})
    if search:
        return search["used_bits"] / search["weights"]
    return float(run.params.quantize[run.params.variants[variant].quantizer].bits)


def bits_by_layer(run: Run, variant: str) -> dict[str, int]:
    """The bits of each layer with integers by name, in the order in which the network runs them."""
    return {name: layer["weight_bits"] for name, layer in run.variants[variant].description["layers"].items()}


def objectives_of(run: Run, allocation: Allocation) -> np.ndarray | None:
    """The objective of each allocation tried, in order: `[seeds, tried]`, cut to the shortest; None for one or none."""
    tried = [run.variants[name].description.get("search", {}).get("tried", []) for name in allocation.group.variants]
    shortest = min((len(one) for one in tried), default=0)
    return np.array([one[:shortest] for one in tried]) if shortest > 1 else None


def _words(quantizer: AllocatedBits) -> str:
    return getattr(quantizer, "search", LEARNED).replace("_", " ")
