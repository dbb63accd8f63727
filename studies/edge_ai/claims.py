"""Verdicts on the sentences of a study, computed from a finished or committed report.

In:  params.yaml, whose `report.claims` names the file of claims; reports/variants.json and reports/run.json
Out: reports/claims.json and reports/claims.md
Run: python -m studies.edge_ai.claims, in the folder of params.yaml
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import read_json, write_json, write_text
from stages.params.finetune import Finetune
from stages.params.load import load_params
from stages.params.models import Model
from stages.reporting import inputs
from stages.reporting.rows import Group, Row, control_of, dense_of, extra_training, groups_of, is_control
from stages.reporting.statistics import mean_and_std, normal_quantile, wilson_interval
from stages.reporting.wording import change_text, fraction_text, ms_text, percent_text, points_text

HOLDS, ONLY_AS_COUNTED, FAILS, NOT_TESTED = "holds", "holds only as counted there", "does not hold", "not tested"
SHOWN = 20
"""Printed images in the study."""


class Params(inputs.Params):
    """What the report reads, and the epochs of fine-tuning."""

    finetune: Finetune


class Claim(BaseModel):
    """One entry of `claims.yaml`; the top of that file explains the keys."""

    model_config = ConfigDict(extra="forbid")

    id: str
    claim: str
    unit: str
    published: float | None
    """None if the sentence has no figure; its check then compares with none."""
    counted_there: str
    tolerance: float
    check: str
    pruners: list[str] = []
    quantizers: list[str] = []
    tolerance_there: float | None = None
    operating_point: float | None = None
    there: str = ""
    honest: str = ""

    @property
    def figure(self) -> float:
        if self.published is None:
            raise UserError(f"{self.id}: its check {self.check} needs a published value")
        return self.published


@dataclass(frozen=True)
class Finding:
    """What a report says about a claim."""

    verdict: str
    how: str
    there: float | None = None
    honest: float | None = None
    variants: tuple[str, ...] = ()


class Evidence:
    """A report and the params that it was made with."""

    def __init__(self, params: Params, rows: list[Row], run: dict[str, Any]):
        if unknown := [row["variant"] for row in rows if row["variant"] not in params.variants]:
            raise UserError(f"variants.json has {unknown[0]}, params.yaml has not: run `dvc repro report`")
        self.params, self.run = params, run
        self.by_name = {row["variant"]: row for row in rows}
        self.groups = groups_of(rows)

    def matching(self, claim: Claim) -> list[Group]:
        """Groups whose pruner and quantizer have one of the claim's methods."""
        pruners, quantizers = self.params.pruners, self.params.quantizers
        return [
            group
            for group in self.groups.values()
            if pruners[group.rows[0]["pruner"]].method in claim.pruners
            and quantizers[group.rows[0]["quantizer"]].method in claim.quantizers
        ]

    def reduction(self, group: Group, key: str) -> float:
        """1 - `key` / `key` of the dense float network of the same model; mean over seeds."""
        return mean_and_std([1 - row[key] / dense_of(row, self.by_name)[key] for row in group.rows])[0]

    def operating_group(self, claim: Claim) -> Group | None:
        """The group that answers: the nearest to the operating point, or the largest reduction."""
        if claim.operating_point is None:
            return max(self.matching(claim), key=lambda group: self.reduction(group, claim.there), default=None)
        point = claim.operating_point
        return min(
            self.matching(claim), key=lambda group: abs(self.reduction(group, "artifact_bytes") - point), default=None
        )

    def described(self, group: Group) -> str:
        gone, change = percent_text(self.reduction(group, "artifact_bytes")), group.change
        accuracy = "" if change is None else f"; top-1 minus dense {change_text(change)}"
        return f"Variant {group.name}, whose saved weights shrink by {gone}{accuracy}."

    def controls(self, group: Group) -> list[str]:
        """The controls of the group's variants; also for reports that do not name them."""
        found = [row.get("control") or control_of(self.params, row["variant"]) for row in group.rows]
        return [name for name in found if name is not None and name in self.by_name]


def verdict_at_least(published: float, tolerance: float, there: float, honest: float, tolerance_there: float) -> str:
    """For an effect of at least the published size, less the tolerance."""
    if honest >= published - tolerance:
        return HOLDS
    return ONLY_AS_COUNTED if there >= published - tolerance_there else FAILS


def reduction(claim: Claim, evidence: Evidence) -> Finding:
    if (group := evidence.operating_group(claim)) is None:
        return absent(claim)
    there, honest = (evidence.reduction(group, key) for key in (claim.there, claim.honest))
    wide = claim.tolerance if claim.tolerance_there is None else claim.tolerance_there
    onnx = percent_text(evidence.reduction(group, "size_bytes"))
    how = (
        f"1 - {claim.there} / {claim.there} of the dense float variant, within {wide:g}; counted honestly with"
        f" {claim.honest}, within {claim.tolerance:g}. model.onnx shrinks by {onnx}. {evidence.described(group)}"
    )
    verdict = verdict_at_least(claim.figure, claim.tolerance, there, honest, wide)
    return Finding(verdict, how, there, honest, tuple(group.variants))


def limited_reduction(claim: Claim, evidence: Evidence) -> Finding:
    """Counted as in the study by MACs, which include zeros; honestly by time."""
    if not (matching := evidence.matching(claim)):
        return absent(claim)
    there, honest = (max(evidence.reduction(group, key) for group in matching) for key in (claim.there, claim.honest))
    rows = [row for group in matching for row in group.rows]
    zeros = max(1 - row["params_nonzero"] / row["params"] for row in rows)
    how = (
        f"MACs count zeros by definition, so median latency is the honest measure: it falls by at most"
        f" {percent_text(honest)}, with up to {percent_text(zeros, 0)} of the weights zero. Limited means at most"
        f" {claim.tolerance:g}."
    )
    verdict = HOLDS if honest <= claim.tolerance else ONLY_AS_COUNTED if there <= claim.tolerance else FAILS
    return Finding(verdict, how, there, honest, tuple(row["variant"] for row in rows))


def accuracy_gain(claim: Claim, evidence: Evidence) -> Finding:
    """Counted as in the study against dense; honestly against the control that trained for the same extra epochs.

    A gain counts only if its p-value, corrected over the table of variants, is below 1 - confidence.
    """
    group = evidence.operating_group(claim)
    if group is None or group.change is None:
        return absent(claim)
    there, described = group.change.delta, evidence.described(group)
    dense = mean_and_std([dense_of(row, evidence.by_name)["top1"] for row in group.rows])[0]
    if 1 - dense < claim.figure - claim.tolerance:
        how = f"Dense has {percent_text(dense, 2)}: there is no room to gain {points_text(claim.figure)} points."
        return Finding(NOT_TESTED, f"{how} {described}", there, None, tuple(group.variants))
    controls = evidence.controls(group)
    if len(controls) < group.seeds:
        how = f"The control that trains as long without pruning is not among the variants. {described}"
        return Finding(NOT_TESTED, how, there, None, tuple(group.variants))
    honest = group.mean("top1") - mean_and_std([evidence.by_name[name]["top1"] for name in controls])[0]
    alpha = 1 - evidence.run.get("confidence", 0.95)
    tests = (there, group.change.p_value), (honest, group.control.p_value if group.control else None)
    gains = [delta if p is not None and p < alpha else min(delta, 0.0) for delta, p in tests]
    verdict = verdict_at_least(claim.figure, claim.tolerance, gains[0], gains[1], claim.tolerance)
    words = change_text(group.control) if group.control else f"{points_text(honest, 2)} points"
    how = f"Top-1 minus the control's (the same extra epochs without pruning): {words}. {described}"
    if (std := group.std("top1_delta")) is not None:
        how += f" Over {group.seeds} seeds the gain over dense has a standard deviation of {100 * std:.2f} points."
    return Finding(verdict, how, there, honest, (*group.variants, *dict.fromkeys(controls)))


def combination(claim: Claim, evidence: Evidence) -> Finding:
    """How much smaller the combination is than the smaller of its parts."""
    both = evidence.operating_group(claim)
    if both is None or both.change is None:
        return absent(claim)
    first, quantizers = both.rows[0], evidence.params.quantizers
    family = first["group"].removesuffix(f"-{first['pruner']}-{first['quantizer']}")
    floats = [f"{family}-{first['pruner']}-{name}" for name, one in quantizers.items() if one.method == "fp32"]
    names = [*[name for name in floats if name in evidence.groups][:1], f"{family}-none-{first['quantizer']}"]
    parts = [evidence.groups[name] for name in names if name in evidence.groups]
    if len(parts) < 2 or any([r["model"] for r in part.rows] != [r["model"] for r in both.rows] for part in parts):
        return absent(claim)

    def beyond(key: str) -> float:
        return 1 - both.mean(key) / min(part.mean(key) for part in parts)

    ratios = [2 ** -mean_and_std([math.log2(1 - evidence.reduction(g, claim.honest))])[0] for g in (both, *parts)]
    accuracy = both.change.delta - sum(part.change.delta for part in parts if part.change is not None)
    how = (
        f"Reduction of {claim.honest} beyond the smaller part; in model.onnx {percent_text(beyond('size_bytes'))}."
        f" The combination is {ratios[0]:.2f} times smaller than dense, its parts {ratios[1]:.2f} and {ratios[2]:.2f}"
        f" times; top-1 beyond the sum of both changes {points_text(accuracy, 2)} points. {evidence.described(both)}"
    )
    there, honest = beyond(claim.there), beyond(claim.honest)
    verdict = HOLDS if honest > claim.tolerance else ONLY_AS_COUNTED if there > claim.tolerance else FAILS
    return Finding(verdict, how, there, honest, tuple(name for group in (both, *parts) for name in group.variants))


def pretraining(claim: Claim, evidence: Evidence) -> Finding:
    """Whether compression costs a pretrained network less accuracy than the same network trained from scratch.

    `small_dense` is left out, since it always starts from fresh weights.
    """
    pairs = twins(evidence, lambda model, twin: model.weights != "none" == twin.weights and model.epochs != 0)
    pairs = [pair for pair in pairs if evidence.params.pruners[pair[0]["pruner"]].method != "small_dense"]
    return difference(
        pairs,
        "top1_delta",
        ("delta_ci_low", "delta_ci_high"),
        evidence,
        "Change of top-1 under compression, pretrained minus from scratch",
        "Needs the same network with pretrained weights and from scratch.",
    )


def fine_tuning(claim: Claim, evidence: Evidence) -> Finding:
    """Whether a compressed network is more accurate if some of its epochs fine-tuned it before its compression.

    The other network is compressed from the same given weights, with as many epochs in all: otherwise the longer
    training, not its order, would be compared.
    """
    rows, params = evidence.by_name.values(), evidence.params
    pairs = [(ours, other) for ours in rows for other in rows if only_differ_in_fine_tuning(params, ours, other)]
    return difference(
        pairs,
        "top1",
        ("top1_ci_low", "top1_ci_high"),
        evidence,
        "Top-1 of compressed networks, fine-tuned before minus compressed from the given weights, with as many epochs"
        " in all",
        "Needs the same network and weights with fine-tuning and with epochs: 0, compressed in the same way and with as"
        " many epochs in all.",
    )


def only_differ_in_fine_tuning(params: Params, ours: Row, other: Row) -> bool:
    """True if both are compressed alike, in as many epochs in all, and only the first was fine-tuned before."""
    tuned, given = (params.models[row["model"]] for row in (ours, other))
    epochs = params.finetune.epochs if tuned.epochs is None else tuned.epochs
    totals = epochs + extra_training(params, ours["variant"])[0], extra_training(params, other["variant"])[0]
    budget = {"epochs", "learning_rate_factor"}
    networks = [model.model_dump(exclude={"epochs"}) for model in (tuned, given)]
    prunings = [params.pruners[row["pruner"]].model_dump(exclude=budget) for row in (ours, other)]
    return (
        (epochs != 0 == given.epochs and totals[0] == totals[1])
        and (networks[0] == networks[1] and prunings[0] == prunings[1] and ours["quantizer"] == other["quantizer"])
        and not is_control(params, ours["variant"])
    )


def twins(evidence: Evidence, are_twins: Callable[[Model, Model], bool]) -> list[tuple[Row, Row]]:
    """Compressed variants of two models that differ only in weights or epochs; controls are left out."""
    models, pairs = evidence.params.models, []
    settings = {name: model.model_dump(exclude={"weights", "epochs"}) for name, model in models.items()}
    for row in evidence.by_name.values():
        name = row["model"]
        alike = (n for n in models if settings[n] == settings[name] and are_twins(models[name], models[n]))
        other = evidence.by_name.get(f"{next(alike, '')}-{row['pruner']}-{row['quantizer']}")
        if row["top1_delta"] is not None and other is not None and not is_control(evidence.params, row["variant"]):
            pairs.append((row, other))
    return pairs


def difference(
    pairs: list[tuple[Row, Row]], key: str, limits: tuple[str, str], evidence: Evidence, what: str, needs: str
) -> Finding:
    """The mean difference of a figure over pairs of variants.

    The p-value is approximate: normal, from the intervals of both figures as if they were independent.

    Args:
        limits: keys of the interval.
        what: the figure, for the text.
        needs: what a report without pairs lacks.
    """
    if not pairs:
        return Finding(NOT_TESTED, needs)
    low, high = limits
    gain = mean_and_std([ours[key] - other[key] for ours, other in pairs])[0]
    z = normal_quantile(evidence.run.get("confidence", 0.95))
    widths = [(row[high] - row[low]) / 2 / z for pair in pairs for row in pair]
    error = math.sqrt(sum(width**2 for width in widths)) / len(pairs)
    p = math.erfc(abs(gain) / error / math.sqrt(2))
    how = f"{what}, mean of {len(pairs)} pairs: {points_text(gain, 2)} points, p = {p:.3f} (approximate)."
    sure = p < 1 - evidence.run.get("confidence", 0.95)
    names = tuple(dict.fromkeys(row["variant"] for pair in pairs for row in pair))
    return Finding(HOLDS if gain > 0 and sure else FAILS, how, gain, gain, names)


def printed(claim: Claim, evidence: Evidence) -> Finding:
    """By the simulation of printed and filmed images; not tested if its interval includes the published value."""
    if (found := evidence.run.get("printed")) is None:
        return Finding(NOT_TESTED, "This run simulated no printed images (edge_benchmark.printed).")
    right = round(claim.figure * SHOWN)
    low, high = wilson_interval(right, SHOWN, evidence.run.get("confidence", 0.95))
    top1, upper = found["top1_printed"], found["top1_printed_ci_high"]
    how = (
        f"The study showed {SHOWN} images; {right} of them leave {percent_text(low)} to {percent_text(high)}."
        f" Here {found['n_images']:,} test images pass a simulation of print, light and camera:"
        f" {fraction_text(top1, found['top1_printed_ci_low'], upper)}, against {percent_text(found['top1_clean'])} on"
        " the original images."
    )
    least = claim.figure - claim.tolerance
    verdict = HOLDS if top1 >= least else FAILS if upper < least else NOT_TESTED
    if verdict == NOT_TESTED:
        how += " Too few images to tell."
    return Finding(verdict, how, top1, top1, (found["variant"],))


def not_tested(claim: Claim, evidence: Evidence) -> Finding:
    return Finding(NOT_TESTED, f"Published for {claim.counted_there}; this run used stored test images and no camera.")


def absent(claim: Claim) -> Finding:
    wanted = f"pruner {' or '.join(claim.pruners)} and quantizer {' or '.join(claim.quantizers)}"
    return Finding(NOT_TESTED, f"Needs a variant with {wanted} (for a combination also each part alone).")


CHECKS = (reduction, limited_reduction, accuracy_gain, combination, pretraining, fine_tuning, printed, not_tested)


def assess(claims: list[Claim], evidence: Evidence) -> list[dict[str, Any]]:
    """The entries of `claims.json`, in the order of the claims."""
    checks = {check.__name__: check for check in CHECKS}
    entries = []
    for claim in claims:
        found = checks[claim.check](claim, evidence)
        entries.append(
            {
                "id": claim.id,
                "claim": claim.claim,
                "unit": claim.unit,
                "published": claim.published,
                "ours_as_counted_there": None if found.there is None else round(found.there, 6),
                "ours_honest": None if found.honest is None else round(found.honest, 6),
                "verdict": found.verdict,
                "how": found.how,
                "run_id": evidence.run["run_id"],
                "variants": list(found.variants),
            }
        )
    return entries


def markdown(entries: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """A table of the verdicts, and below it how each was found."""

    def value(entry: dict[str, Any], key: str) -> str:
        if (number := entry[key]) is None:
            return "\N{EN DASH}"
        write = {"points": lambda points: f"{points_text(points)} points", "ms": ms_text}
        return write.get(entry["unit"], percent_text)(number)

    keys = ("published", "ours_as_counted_there", "ours_honest")
    lines = ["| claim | published | ours, counted as there | ours, counted honestly | verdict |"]
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    lines += [
        f"| {entry['claim']} | {' | '.join(value(entry, key) for key in keys)} | **{entry['verdict']}** |"
        for entry in entries
    ]
    hows = [f"- {entry['claim']}: {entry['how']}" for entry in entries]
    return "\n".join([*lines, "", f"{run['data_name']}, run `{run['run_id']}`.", "", *hows, ""])


def read_claims(path: Path) -> list[Claim]:
    return [Claim.model_validate(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def main() -> None:
    params = load_params(Params)
    if params.report.claims is None:
        raise UserError("params.yaml: report.claims names no file: set it to the file of a study's claims")
    rows, run = (read_json(paths.REPORTS / f"{name}.json") for name in ("variants", "run"))
    entries = assess(read_claims(Path(params.report.claims)), Evidence(params, rows, run))
    write_json(paths.REPORTS / "claims.json", entries)
    write_text(paths.REPORTS / "claims.md", markdown(entries, run))


if __name__ == "__main__":
    run_stage(main)
