"""Comparisons of groups of variants on the same test images: bit searches, pruners at equal MACs, two libraries.

In:  a completed run in the folder of params.yaml (reports/profile/ and reports/edge/ from `dvc repro` or `dvc pull`)
Out: Markdown tables on the terminal
Run: python -m studies.edge_ai.comparisons
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stages.common.errors import run_stage
from stages.params.load import load_params
from stages.params.pruners import Oto, Structured
from stages.params.quantizers import AllocatedBits, LearnedBits, Quantizer, SearchedBits, UniformBits
from stages.reporting.inputs import CompletedRun, Params, read_run
from stages.reporting.rows import Group, assemble_rows, compare, groups_of, model_family
from stages.reporting.statistics import Change, corrected, mean_and_std
from stages.reporting.wording import bytes_text, interval_text, p_text, points_text, std_text

EQUAL_MACS = 0.05
"""Networks are compared at equal MACs if theirs differ by at most this fraction."""
LEARNED, UNTRAINED, UNIFORM = "policy gradient", "untrained policy", "uniform"
RECOVERY = ("learning_rate_factor", "distillation", "distillation_temperature")
CALIBRATION = ("calibration_images", "calibration_seed")


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one group minus another's, on the same seeds and test images."""

    one: Group
    other: Group
    change: Change
    std: float | None
    """Standard deviation of the seeds' own differences; None for one seed."""


def compared(run: CompletedRun, pairs: list[tuple[Group, Group]]) -> list[Comparison]:
    """Paired comparisons of groups with the same seeds, p-values Holm-corrected over all of them.

    Pairs of groups that were run with different seeds are left out.
    """
    changes, stds = {}, {}
    for one, other in pairs:
        rows = {row["seed"]: row for row in other.rows}
        if {row["seed"] for row in one.rows} == rows.keys():
            seeds = [(row, rows[row["seed"]]) for row in one.rows]
            key = f"{one.name} {other.name}"
            changes[key] = compare(run, [(ours["variant"], theirs["variant"]) for ours, theirs in seeds])
            stds[key] = mean_and_std([ours["top1"] - theirs["top1"] for ours, theirs in seeds])[1]
    changes = corrected(changes)
    keys = ((one, other, f"{one.name} {other.name}") for one, other in pairs)
    return [Comparison(one, other, changes[key], stds[key]) for one, other, key in keys if key in changes]


def at_equal_macs(run: CompletedRun, groups: dict[str, Group]) -> list[tuple[Group, Group]]:
    """Each float `oto` network with every other structured one of equal MACs and the same budget; each pair once."""
    pairs: list[tuple[Group, Group]] = []
    structured = [
        (group, pruner, model_family(run.params, group.rows[0]["model"]))
        for group in groups.values()
        if isinstance(pruner := run.params.pruners[group.rows[0]["pruner"]], Structured)
        and run.params.quantizers[group.rows[0]["quantizer"]].method == "fp32"
    ]
    for ours, pruner, family in structured:
        for theirs, other, other_family in structured:
            same = family == other_family and ours is not theirs and pruner.budget == other.budget
            close = abs(theirs.mean("macs") / ours.mean("macs") - 1) <= EQUAL_MACS
            if isinstance(pruner, Oto) and same and close and (theirs, ours) not in pairs:
                pairs.append((ours, theirs))
    return pairs


def between_libraries(run: CompletedRun, groups: dict[str, Group]) -> list[tuple[Group, Group]]:
    """The same pruner and quantizer on one network of two libraries: equal input size, parameters and MACs."""
    networks: dict[str, tuple[Any, ...]] = {}
    for group in groups.values():
        row = group.rows[0]
        family = model_family(run.params, row["model"])
        if group.change is None:
            model = run.params.models[family]
            networks[family] = (model.library, model.input_size, model.weights == "none", row["params"], row["macs"])
    pairs = []
    for one, other in combinations(networks, 2):
        if networks[one][0] != networks[other][0] and networks[one][1:] == networks[other][1:]:
            peers = {name: f"{other}{name.removeprefix(one)}" for name in groups if name.startswith(f"{one}-")}
            pairs += [(groups[name], groups[peer]) for name, peer in peers.items() if peer in groups]
    return pairs


def search_of(quantizer: Quantizer) -> str:
    """The way in which a quantizer chooses bits."""
    if isinstance(quantizer, LearnedBits):
        return LEARNED if quantizer.learning_rate > 0 else UNTRAINED
    return quantizer.search.replace("_", " ") if isinstance(quantizer, SearchedBits) else UNIFORM


def contests_of(run: CompletedRun, groups: dict[str, Group]) -> list[list[Group]]:
    """Groups that differ only by how their bits were chosen, with the uniform ones at the same budget."""
    found: list[tuple[dict[str, Any], Group]] = []
    for group in groups.values():
        row = group.rows[0]
        quantizer = run.params.quantizers[row["quantizer"]]
        if isinstance(quantizer, UniformBits | AllocatedBits):
            found.append((_terms(quantizer) | {"network": model_family(run.params, row["model"])}, group))
            found[-1][0]["pruner"] = row["pruner"]
    contests: list[dict[str, Any]] = []
    for terms, group in found:
        if isinstance(run.params.quantizers[group.rows[0]["quantizer"]], AllocatedBits) and terms not in contests:
            contests.append(terms)
    return [[group for own, group in found if own.items() <= terms.items()] for terms in contests]


def _terms(quantizer: UniformBits | AllocatedBits) -> dict[str, Any]:
    """Everything that competitors share; a search's terms include those of the uniform bits beside it."""
    names = ["rounding", "epochs", *(RECOVERY if quantizer.epochs else ())]
    if isinstance(quantizer, AllocatedBits):
        names += [*CALIBRATION, "evaluations", "choices"]
    elif quantizer.rounding == "gptq":
        names += CALIBRATION  # its rounding depends on these images
    bits = float(quantizer.bits if isinstance(quantizer, UniformBits) else quantizer.average_bits)
    return {"average_bits": bits} | {name: str(getattr(quantizer, name)) for name in names}


def duels_of(run: CompletedRun, contests: list[list[Group]]) -> Iterator[tuple[Group, Group]]:
    """Each learned allocation with every other of its contest; two learned ones meet once."""
    for contest in contests:
        ways = [search_of(run.params.quantizers[group.rows[0]["quantizer"]]) for group in contest]
        for place, learned in enumerate(contest):
            if ways[place] == LEARNED:
                earlier = [group for group, way in zip(contest[:place], ways, strict=False) if way != LEARNED]
                yield from ((learned, other) for other in (*earlier, *contest[place + 1 :]))


def search_lines(run: CompletedRun, contest: list[Group]) -> list[list[str]]:
    """For each allocation of a contest: search, average bits, evaluations, objective, top-1, size."""
    lines = []
    for group in contest:
        quantizer = run.params.quantizers[group.rows[0]["quantizer"]]
        searches = [found for name in group.variants if (found := run.variants[name].artifact.search)]
        bits, objective = f"{getattr(quantizer, 'bits', 0):.3f}", "\N{EN DASH}"
        if searches:
            bits = f"{mean_and_std([one['used_bits'] / one['weights'] for one in searches])[0]:.3f}"
            mean, std = mean_and_std([one["best"] for one in searches])
            objective = f"{mean:.4f}{std_text(std, 4, 1)}"
        tried = max((one["evaluations"] for one in searches), default=0)
        top1 = f"{100 * group.mean('top1'):.2f}{std_text(group.std('top1'))}"
        size = bytes_text(group.mean("artifact_bytes"))
        lines.append([group.name, search_of(quantizer), bits, str(tried), objective, top1, size])
    return lines


def _table(title: str, heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def _comparison_table(title: str, found: list[Comparison]) -> str:
    heads = ["network", "against", "MACs, against / network", "difference (points)", "interval", "p"]
    lines = [
        [
            one.one.name,
            one.other.name,
            f"{one.other.mean('macs') / one.one.mean('macs'):.3f}",
            points_text(one.change.delta, 2) + std_text(one.std),
            interval_text(one.change),
            "" if one.change.p_value is None else p_text(one.change.p_value),
        ]
        for one in found
    ]
    return _table(title, heads, lines)


def report(run: CompletedRun) -> str:
    """All tables that the run has variants for. Intervals and p-values cover other test images, ± covers seeds."""
    groups = groups_of(assemble_rows(run))
    contests = contests_of(run, groups)
    heads = ["variant", "search", "average bits", "evaluations", "objective", "top-1 (%)", "model.safetensors"]
    parts = []
    for contest in contests:
        quantizer = run.params.quantizers[contest[-1].rows[0]["quantizer"]]
        title = f"Searches for bits, {getattr(quantizer, 'epochs', 0)} epochs of recovery ({contest[-1].name})"
        parts.append(_table(title, heads, search_lines(run, contest)))
    for title, pairs in (
        ("The policy gradient against other searches", list(duels_of(run, contests))),
        ("Structured pruners at equal MACs", at_equal_macs(run, groups)),
        ("The same pruner in two libraries", between_libraries(run, groups)),
    ):
        if found := compared(run, pairs):
            parts.append(_comparison_table(title, found))
        paired = [(one.one, one.other) for one in found]
        left_out = [f"{one.name} against {other.name}" for one, other in pairs if (one, other) not in paired]
        if left_out:
            parts.append(f"Left out because the seeds differ: {', '.join(left_out)}.\n")
    return "\n".join(parts) or "This run has no bit searches, no pruners at equal MACs and no two libraries.\n"


def main() -> None:
    print(report(read_run(load_params(Params))), end="")


if __name__ == "__main__":
    run_stage(main)
