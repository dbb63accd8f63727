"""Searches for bits at one budget: what each found, how it did, and the learned allocation against every other."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stages.params.quantizers import AllocatedBits, Bits, LearnedBits, Quantizer, UniformBits
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, compare, model_family
from stages.reporting.statistics import PairedDifference, holm, mean_and_deviation

LEARNED, UNTRAINED, UNIFORM = "policy gradient", "untrained policy", "uniform"
CALIBRATION = ("calibration_images", "calibration_seed")
RECOVERY = ("learning_rate_factor", "distillation", "distillation_temperature")
"""Settings of the training after rounding, where there is any."""
SEARCH = (*CALIBRATION, "evaluations", "objective", "choices")
"""What a search is given; a uniform allocation has none of it."""
WORDS = {
    "epochs": "{} epochs of recovery",
    "calibration_images": "{} calibration images",
    "evaluations": "{} evaluations",
}
"""How a title says a setting; the others by name and value."""


@dataclass(frozen=True)
class Allocation:
    """What one way to choose bits did with one network at one budget, over its seeds."""

    group: Group
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
class Contest:
    """Allocations that differ by how their bits were chosen and by nothing else."""

    number: int
    """From 1; in the names of its pictures."""
    title: str
    """The budget, and what tells the contest from the others."""
    allocations: list[Allocation]
    """In the order of the params; a uniform one may stand in several contests."""


@dataclass(frozen=True)
class Duel:
    """The learned allocation against another one of its contest."""

    learned: str
    other: str
    search: str
    """How the other was found."""
    seeds: int
    deviation: float | None
    """Sample standard deviation of the seeds' own differences; None for one seed."""
    difference: PairedDifference
    """Pooled over seeds, an image being the unit."""
    p_value: float
    """Holm-corrected over all duels."""


@dataclass(frozen=True)
class Unpaired:
    """Two of a contest that were not run on the same networks, so that there is no duel."""

    learned: str
    other: str
    learned_models: list[str]
    other_models: list[str]


def contests_of(run: Run, groups: dict[str, Group]) -> list[Contest]:
    """All searches by what they share, each with the uniform allocations that share it too; in the order of the params.

    Empty where no search was run.
    """
    bits = [group for group in groups.values() if isinstance(_quantizer(run, group), Bits)]
    found = [(_terms(run, group), _allocation(run, group)) for group in bits]
    contests: list[dict[str, object]] = []
    for terms, one in found:
        if one.search != UNIFORM and terms not in contests:
            contests.append(terms)
    return [
        Contest(number, _title(terms, contests), [one for own, one in found if own.items() <= terms.items()])
        for number, terms in enumerate(contests, 1)
    ]


def duels_of(run: Run, contests: list[Contest]) -> list[Duel]:
    """Each learned allocation against its competitors, on the same networks (one for each seed) and test images."""
    found: list[tuple[Allocation, Allocation, list[float], PairedDifference]] = []
    for learned, other in _opponents(contests):
        ours, theirs = _by_model(run, learned.group), _by_model(run, other.group)
        if ours.keys() == theirs.keys():
            pairs = [(ours[model], theirs[model]) for model in ours]
            single = [run.variants[one].correct.mean() - run.variants[two].correct.mean() for one, two in pairs]
            found.append((learned, other, single, compare(run, pairs)))
    corrected = holm({f"{one.group.name} {two.group.name}": pooled.p_value for one, two, _, pooled in found})
    return [
        Duel(
            learned.group.name,
            other.group.name,
            other.search,
            len(single),
            mean_and_deviation(single)[1],
            pooled,
            corrected[f"{learned.group.name} {other.group.name}"],
        )
        for learned, other, single, pooled in found
    ]


def unpaired_of(run: Run, contests: list[Contest]) -> list[Unpaired]:
    """The duels that cannot be: the two were not run on the same networks."""
    found = []
    for learned, other in _opponents(contests):
        ours, theirs = _by_model(run, learned.group), _by_model(run, other.group)
        if ours.keys() != theirs.keys():
            found.append(Unpaired(learned.group.name, other.group.name, list(ours), list(theirs)))
    return found


def average_bits(run: Run, variant: str) -> float:
    """Bits of all weights with integers over their number."""
    search = run.variants[variant].description.get("search", {})
    if search:
        return search["used_bits"] / search["weights"]
    return float(run.params.quantizers[run.params.variants[variant].quantizer].bits)


def bits_by_layer(run: Run, variant: str) -> dict[str, int]:
    """The bits of each layer with integers by name, in the order in which the network runs them."""
    return {name: layer["weight_bits"] for name, layer in run.variants[variant].description["layers"].items()}


def float_layers(run: Run, variant: str) -> list[str]:
    """Names of the layers with weights that the quantizer left in float."""
    return run.variants[variant].description.get("float_layers", [])


def objectives_of(run: Run, allocation: Allocation) -> np.ndarray | None:
    """The objective of each allocation tried, in order: `[seeds, tried]`, cut to the shortest; None for one or none."""
    tried = [run.variants[name].description.get("search", {}).get("tried", []) for name in allocation.group.variants]
    shortest = min((len(one) for one in tried), default=0)
    return np.array([one[:shortest] for one in tried]) if shortest > 1 else None


def _quantizer(run: Run, group: Group) -> Quantizer:
    return run.params.quantizers[run.params.variants[group.variants[0]].quantizer]


def _allocation(run: Run, group: Group) -> Allocation:
    searches = [run.variants[name].description.get("search", {}) for name in group.variants]
    best = [search["best"] for search in searches if search]
    mean, deviation = mean_and_deviation(best) if best else (None, None)
    return Allocation(
        group,
        _words(_quantizer(run, group)),
        float(np.mean([average_bits(run, name) for name in group.variants])),
        max((search.get("evaluations", 0) for search in searches), default=0),
        mean,
        deviation,
        float(np.mean([run.variants[name].profile["artifact_bytes"] for name in group.variants])),
    )


def _terms(run: Run, group: Group) -> dict[str, object]:
    """All that competitors must share, by name: a search's terms hold those of the uniform allocations beside it."""
    quantizer, first = _quantizer(run, group), group.variants[0]
    names = ["rounding", "epochs", *(RECOVERY if quantizer.epochs else ())]
    if isinstance(quantizer, AllocatedBits):
        names += SEARCH
    elif quantizer.rounding == "gptq":
        names += CALIBRATION  # the images shape its rounding
    return {
        "network": model_family(run.params, run.params.model_of(first)),
        "pruner": run.params.pruner_of(first),
        "average_bits": float(quantizer.bits if isinstance(quantizer, UniformBits) else quantizer.average_bits),
        **{name: getattr(quantizer, name) for name in names},
    }


def _title(terms: dict[str, object], contests: list[dict[str, object]]) -> str:
    words = [f"{terms['average_bits']:g} bits on average"]
    for key, value in terms.items():
        if key != "average_bits" and any(other.get(key, value) != value for other in contests):
            words.append(WORDS.get(key, f"{key.replace('_', ' ')} {{}}").format(value))
    return ", ".join(words)


def _opponents(contests: list[Contest]) -> Iterator[tuple[Allocation, Allocation]]:
    """Each learned allocation with every other of its contest; two learned ones meet once."""
    for contest in contests:
        for place, learned in enumerate(contest.allocations):
            if learned.search == LEARNED:
                earlier = [one for one in contest.allocations[:place] if one.search != LEARNED]
                yield from ((learned, other) for other in (*earlier, *contest.allocations[place + 1 :]))


def _by_model(run: Run, group: Group) -> dict[str, str]:
    """The group's variant of each model; models of one group differ by their seed."""
    return {run.params.model_of(variant): variant for variant in group.variants}


def _words(quantizer: Bits) -> str:
    if isinstance(quantizer, UniformBits):
        return UNIFORM
    if isinstance(quantizer, LearnedBits):
        return LEARNED if quantizer.learning_rate > 0 else UNTRAINED
    return quantizer.search.replace("_", " ")
