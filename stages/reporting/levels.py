"""Pruning at several levels: what each pruner costs and keeps, at equal MACs, between libraries and at the cut."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stages.params.pruners import Continued, Importance, NonePruner, Pruner, Structured
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, compare, model_family
from stages.reporting.statistics import PairedDifference, holm, mean_and_deviation

COSTS = ("size_bytes", "macs", "latency_ms_p50")
EQUAL_MACS = 0.05
"""Two networks are compared at equal MACs where theirs differ by at most this share."""
SPEAKING = ("importance", "layer_norm", "optimizer", "pattern", "schedule", "scope")
"""Settings whose values name a method without their key."""
OF_A_LEVEL = ("group_sparsity", "params_reduction", "macs_reduction", "sparsity")
OF_THE_BUDGET = ("epochs", "learning_rate_factor", "distillation", "distillation_temperature")


@dataclass(frozen=True)
class Level:
    """One pruner at one level, over its seeds."""

    group: Group
    family: str
    """The model without its seed."""
    pruner: str
    quantizer: str
    kind: str
    """What the levels of one method share: `depgraph group_lasso`, or `oto` (see `kinds_of`)."""
    shares: dict[str, float]
    """Of each of `COSTS`, the share of the same model's dense float network in ONNX Runtime, mean over seeds."""
    sparsity: float | None
    """Share of zeros among the weights, of unstructured pruning."""


@dataclass(frozen=True)
class EqualMacs:
    """An `oto` network against another pruner's at (nearly) the same MACs."""

    ours: str
    theirs: str
    macs_ratio: float
    """Theirs over ours."""
    difference: PairedDifference
    deviation: float | None
    """Of the difference over seeds (sample standard deviation); None with one seed."""
    p_value: float
    """Holm-corrected over these comparisons."""


@dataclass(frozen=True)
class Libraries:
    """The same pruner and quantizer on one library's network against another library's."""

    one: str
    other: str
    difference: PairedDifference
    deviation: float | None
    """Of the difference over seeds (sample standard deviation); None with one seed."""
    p_value: float


@dataclass(frozen=True)
class Cut:
    """Validation top-1 around the removal of channels, mean over seeds."""

    group: str
    before: float
    """Of the network as it stood: zeroed by training for `oto`, whole for `random_structured` and `depgraph`."""
    after: float
    """Right after removal."""
    recovered: float
    difference: float
    """Largest change of a logit, relative to the logits' scale: from the zeroed network to the cut one for `oto` and
    `random_structured`, from the whole one for `depgraph`."""


def kinds_of(pruners: dict[str, Pruner]) -> dict[str, str]:
    """For each pruner by key its method, with the settings in which it stands apart from the method's others.

    Settings that all of them share go without saying, and so do defaults, level and budget: pruners of one kind are
    levels of the same line.
    """
    kinds = {key: pruner.method for key, pruner in pruners.items()}
    settings = {key: _settings_of(pruner) for key, pruner in pruners.items()}
    for speaking in (True, False):  # first importance and the like, then the settings of those that are alike in it
        told = {}
        for key, own in settings.items():
            peers = [settings[other] for other in kinds if kinds[other] == kinds[key]]
            names = sorted(name for name in own if (name in SPEAKING) == speaking)
            apart = [name for name in names if any(peer.get(name) != own[name] for peer in peers)]
            told[key] = " ".join([kinds[key], *(_words(name, own[name]) for name in apart)])
        kinds = told
    return kinds


def _settings_of(pruner: Pruner) -> dict[str, Any]:
    """Those that are not the default's."""
    defaults = {name: field.default for name, field in type(pruner).model_fields.items()}
    others = [name for name in defaults if name not in ("method", *OF_A_LEVEL, *OF_THE_BUDGET)]
    return {name: getattr(pruner, name) for name in others if getattr(pruner, name) != defaults[name]}


def _words(name: str, value: Any) -> str:
    if isinstance(value, Importance):
        weights = {score: weight for score, weight in value.model_dump().items() if weight}
        equal = len(set(weights.values())) == 1
        return "+".join(score if equal else f"{weight:g} {score}" for score, weight in weights.items())
    if name in SPEAKING:
        return str(value)
    return f"by {value}" if name == "divisible_by" else f"{name} {value:g}"


def levels_of(run: Run, rows: list[dict], groups: dict[str, Group]) -> list[Level]:
    """Every group whose pruner removes something, in the order of the params."""
    by_name = {row["variant"]: row for row in rows}
    found, kinds = [], kinds_of(run.params.pruners)
    for group in groups.values():
        row = by_name[group.variants[0]]
        pruner = run.params.pruners[row["pruner"]]
        if isinstance(pruner, NonePruner | Continued):
            continue
        shares = {
            cost: mean_and_deviation(
                [by_name[v][cost] / by_name[run.params.baseline_of(v)][cost] for v in group.variants]
            )[0]
            for cost in COSTS
        }
        family = model_family(run.params, row["model"])
        zeros = getattr(pruner, "sparsity", None)
        found.append(Level(group, family, row["pruner"], row["quantizer"], kinds[row["pruner"]], shares, zeros))
    return found


def at_equal_macs(run: Run, levels: list[Level]) -> list[EqualMacs]:
    """Each float `oto` level against every other structured one of the same network, of the same seeds, with the same
    budget and within `EQUAL_MACS`."""
    structured = [
        level
        for level in levels
        if isinstance(run.params.pruners[level.pruner], Structured)
        and run.params.quantizers[level.quantizer].method == "fp32"
    ]
    pairs: dict[str, tuple[Level, Level, PairedDifference, float | None]] = {}
    for ours in structured:
        if run.params.pruners[ours.pruner].method != "oto":
            continue
        for theirs in structured:
            same = theirs.family == ours.family and theirs.kind != ours.kind
            same = same and run.params.pruners[theirs.pruner].budget == run.params.pruners[ours.pruner].budget
            ratio = theirs.shares["macs"] / ours.shares["macs"]
            seen = f"{theirs.group.name} {ours.group.name}" in pairs  # both are `oto`
            if not same or seen or abs(ratio - 1) > EQUAL_MACS:
                continue
            seeds = _of_the_same_seeds(run, ours.group, theirs.group)
            if not len(seeds) == len(ours.group.variants) == len(theirs.group.variants):
                continue
            found = ours, theirs, compare(run, seeds), _deviation(run, seeds)
            pairs[f"{ours.group.name} {theirs.group.name}"] = found
    corrected = holm({name: difference.p_value for name, (_, _, difference, _) in pairs.items()})
    return [
        EqualMacs(
            ours.group.name,
            theirs.group.name,
            theirs.shares["macs"] / ours.shares["macs"],
            difference,
            deviation,
            corrected[name],
        )
        for name, (ours, theirs, difference, deviation) in pairs.items()
    ]


def _of_the_same_seeds(run: Run, one: Group, other: Group) -> list[tuple[str, str]]:
    """Their variants of each seed that both have, in the first one's order."""
    of_one, of_other = (
        {run.variants[variant].profile["seed"]: variant for variant in group.variants} for group in (one, other)
    )
    return [(variant, of_other[seed]) for seed, variant in of_one.items() if seed in of_other]


def _deviation(run: Run, pairs: list[tuple[str, str]]) -> float | None:
    """Of the differences of test top-1, the first's of each pair (seed) less the second's."""
    top1 = {name: run.variants[name].profile["top1"] for pair in pairs for name in pair}
    return mean_and_deviation([top1[ours] - top1[theirs] for ours, theirs in pairs])[1]


def between_libraries(run: Run, rows: list[dict], groups: dict[str, Group]) -> list[Libraries]:
    """Each group against the same pruner and quantizer on the same network of another library."""
    params = run.params
    found: dict[str, tuple[Group, Group, PairedDifference, float | None]] = {}
    for one, other in _same_networks(run, rows):
        for group in groups.values():
            rest = group.name.removeprefix(f"{one}-")
            peer = groups.get(f"{other}-{rest}")
            if model_family(params, params.model_of(group.variants[0])) != one or peer is None:
                continue
            if pairs := _of_the_same_seeds(run, group, peer):
                found[group.name] = (group, peer, compare(run, pairs), _deviation(run, pairs))
    corrected = holm({name: difference.p_value for name, (_, _, difference, _) in found.items()})
    return [
        Libraries(group.name, peer.name, difference, deviation, corrected[name])
        for name, (group, peer, difference, deviation) in found.items()
    ]


def _same_networks(run: Run, rows: list[dict]) -> list[tuple[str, str]]:
    """Model families of two libraries that are one network: the same input size, parameters and MACs, and both
    pre-trained or neither."""
    params, by_name = run.params, {row["variant"]: row for row in rows}
    known = {}
    for variant in dict.fromkeys(run.params.baseline_of(row["variant"]) for row in rows):
        family, row = model_family(params, params.model_of(variant)), by_name[variant]
        model = params.models[family]
        known[family] = model.library, (model.input_size, model.weights == "none", row["params"], row["macs"])
    return [
        (one, other)
        for (one, (library, network)), (other, (other_library, other_network)) in combinations(known.items(), 2)
        if library != other_library and network == other_network
    ]


def cuts_of(run: Run, levels: list[Level]) -> list[Cut]:
    """What removal did to every float level whose channels were removed."""
    found = []
    for level in levels:
        if run.params.quantizers[level.quantizer].method != "fp32":
            continue
        metrics = [run.variants[name].description["parent"].get("metrics", {}) for name in level.group.variants]
        if not all("validation_top1_cut" in one for one in metrics):
            continue
        before, after, recovered = (
            mean_and_deviation([one[key] for one in metrics])[0]
            for key in ("validation_top1_uncut", "validation_top1_cut", "validation_top1")
        )
        found.append(Cut(level.group.name, before, after, recovered, max(one["cut_difference"] for one in metrics)))
    return found
