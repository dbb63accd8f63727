"""Verdicts on the sentences of the study, computed from the rows of one run (the list itself: `claims.yaml`)."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from stages.params.pruners import SmallDense
from stages.params.whole import Params
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, control_of, is_control, model_family
from stages.reporting.statistics import PairedDifference, holm, mean_and_deviation, paired_difference, wilson_interval
from stages.reporting.text import p_text, percent_text

HOLDS = "holds"
ONLY_AS_COUNTED = "holds only as counted there"
FAILS = "does not hold"
NOT_TESTED = "not tested"


@dataclass(frozen=True)
class Claim:
    """One entry of `claims.yaml`; the keys are explained at its top."""

    id: str
    claim: str
    unit: str
    published: float | None
    counted_there: str
    tolerance: float
    check: str
    pruners: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = ()
    tolerance_there: float | None = None
    operating_point: float | None = None
    there: str = ""
    honest: str = ""


@dataclass(frozen=True)
class Finding:
    """What a run says of a claim."""

    verdict: str
    how: str
    as_counted_there: float | None = None
    honest: float | None = None
    variants: tuple[str, ...] = ()


def read_claims() -> list[Claim]:
    entries = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text(encoding="utf-8"))
    return [Claim(**entry | {key: tuple(entry.get(key, ())) for key in ("pruners", "quantizers")}) for entry in entries]


def assess(claims: list[Claim], run: Run, rows: list[dict], groups: dict[str, Group]) -> list[dict]:
    """Entries of `claims.json`, in the order of the list."""
    checks = {
        "reduction": _reduction,
        "limited_reduction": _limited_reduction,
        "accuracy_gain": _accuracy_gain,
        "combination": _combination,
        "pretraining": _pretraining,
        "printed": _printed,
        "camera": _camera,
    }
    entries = []
    for claim in claims:
        finding = checks[claim.check](claim, run, {row["variant"]: row for row in rows}, groups)
        entries.append(
            {
                "id": claim.id,
                "claim": claim.claim,
                "published": claim.published,
                "ours_as_counted_there": _rounded(finding.as_counted_there),
                "ours_honest": _rounded(finding.honest),
                "verdict": finding.verdict,
                "how": finding.how,
                "run_id": run.run_id,
                "variants": list(finding.variants),
            }
        )
    return entries


def verdict_at_least(
    published: float, tolerance: float, as_counted_there: float, honest: float, tolerance_there: float | None = None
) -> str:
    """An effect of at least the published size, less the tolerance (`tolerance_there` where it is given)."""
    if honest >= published - tolerance:
        return HOLDS
    least = published - (tolerance if tolerance_there is None else tolerance_there)
    return ONLY_AS_COUNTED if as_counted_there >= least else FAILS


def verdict_at_most(limit: float, as_counted_there: float, honest: float) -> str:
    """An effect of at most `limit`."""
    if honest <= limit:
        return HOLDS
    return ONLY_AS_COUNTED if as_counted_there <= limit else FAILS


def _matching(claim: Claim, run: Run, groups: dict[str, Group]) -> list[Group]:
    """Groups whose pruner and quantizer have one of the claim's methods."""
    params = run.params

    def fits(variant: str) -> bool:
        pruner = params.pruners[params.pruner_of(variant)].method
        quantizer = params.quantizers[params.variants[variant].quantizer].method
        return pruner in claim.pruners and quantizer in claim.quantizers

    return [group for group in groups.values() if fits(group.variants[0])]


def _mean_reduction(group: Group, key: str, params: Params, rows: dict[str, dict]) -> float:
    """Share of `key` that is gone, against the dense float network of the same model; mean over seeds."""
    return float(np.mean([1 - rows[v][key] / rows[params.baseline_of(v)][key] for v in group.variants]))


def _operating_group(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Group | None:
    """The one group that answers: nearest the study's operating point, else the largest reduction; None without any."""
    matching, params = _matching(claim, run, groups), run.params
    if claim.operating_point is None:
        return max(matching, key=lambda group: _mean_reduction(group, claim.there, params, rows), default=None)

    def distance(group: Group) -> float:
        return abs(_mean_reduction(group, "artifact_bytes", params, rows) - claim.operating_point)

    return min(matching, key=distance, default=None)


def _choice(claim: Claim, group: Group, run: Run, rows: dict[str, dict]) -> str:
    """In a sentence: which variant answers, why this one, and what it does to accuracy."""
    weights = _mean_reduction(group, "artifact_bytes", run.params, rows)
    why = (
        "the largest reduction in the run"
        if claim.operating_point is None
        else f"whose saved weights shrink by {percent_text(weights)}, the nearest to the study's"
        f" {percent_text(claim.operating_point)}"
    )
    return f"Variant: {group.name}{_over_seeds(group)}, {why}; its top-1 less that of dense: {_of(group.difference)}."


def _reduction(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    group = _operating_group(claim, run, rows, groups)
    if group is None:
        return _absent(claim)
    there, honest, onnx = (
        _mean_reduction(group, key, run.params, rows) for key in (claim.there, claim.honest, "size_bytes")
    )
    how = f"1 - {claim.there} / {claim.there} of the dense float variant ({claim.counted_there}), which"
    if claim.there == claim.honest:
        how += f" may fall short by {claim.tolerance:g}; model.onnx shrinks by {percent_text(onnx)}."
    else:
        how += (
            f" may fall short by {claim.tolerance_there or claim.tolerance:g}; honestly the same with {claim.honest},"
            f" which may fall short by {claim.tolerance:g}."
        )
    verdict = verdict_at_least(claim.published, claim.tolerance, there, honest, claim.tolerance_there)
    return Finding(verdict, f"{how} {_choice(claim, group, run, rows)}", there, honest, tuple(group.variants))


def _limited_reduction(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """As counted there by MACs, which cannot fall; honestly by time."""
    matching = _matching(claim, run, groups)
    if not matching:
        return _absent(claim)
    there = max(_mean_reduction(group, claim.there, run.params, rows) for group in matching)
    honest = max(_mean_reduction(group, claim.honest, run.params, rows) for group in matching)
    variants = tuple(variant for group in matching for variant in group.variants)
    zeros = max(1 - rows[v]["params_nonzero"] / rows[v]["params"] for v in variants)
    how = (
        f"As counted there the share of {claim.there} gone, which says little: MACs count zeros by definition. Honestly"
        f" the share of median latency gone, {percent_text(honest)} at most, with up to {percent_text(zeros, 0)} of the"
        f" weights zero. Limited is read as at most {claim.tolerance:g}."
    )
    return Finding(verdict_at_most(claim.tolerance, there, honest), how, there, honest, variants)


def _accuracy_gain(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """Against dense as counted there; honestly against the control that trained for the same extra steps."""
    group = _operating_group(claim, run, rows, groups)
    if group is None:
        return _absent(claim)
    params, dense, control = run.params, group.difference, group.control
    choice = _choice(claim, group, run, rows)
    dense_top1 = float(np.mean([rows[params.baseline_of(v)]["top1"] for v in group.variants]))
    if 1 - dense_top1 < claim.published - claim.tolerance:
        room = f"so there is no room to gain {_signed(claim.published)}"
        how = f"Dense has top-1 {percent_text(dense_top1, 2)}, {room}. {choice}"
        return Finding(NOT_TESTED, how, dense.delta, None, tuple(group.variants))
    if control is None:
        how = f"The control that trains as long without pruning is not among the variants. {choice}"
        return Finding(NOT_TESTED, how, dense.delta, None, tuple(group.variants))
    corrected = holm({"dense": dense.p_value, "control": control.p_value})

    def sure(difference: PairedDifference, p_value: float) -> float:
        """The gain; one that may be chance is none."""
        return difference.delta if p_value < 1 - params.report.confidence else min(difference.delta, 0.0)

    verdict = verdict_at_least(
        claim.published, claim.tolerance, sure(dense, corrected["dense"]), sure(control, corrected["control"])
    )
    how = (
        f"Top-1 less that of dense, {claim.counted_there}: {_of(dense)}, p = {p_text(corrected['dense'])}. Honestly"
        f" less that of the control (continued, the same extra steps without pruning): {_of(control)},"
        f" p = {p_text(corrected['control'])}. n = {dense.n} test images, paired, exact, Holm over the two. Either gain"
        f" counts only with p below {1 - params.report.confidence:.2g}, and may fall short by {claim.tolerance:g}."
    )
    how += " The test covers other test images, not training again"
    if len(group.variants) == 1:
        how += ": this is one seed."
    else:
        gains = [rows[v]["top1"] - rows[params.baseline_of(v)]["top1"] for v in group.variants]
        deviation = 100 * mean_and_deviation(gains)[1]
        how += f": over {len(gains)} seeds the gain over dense has a standard deviation of {deviation:.2f} points."
    controls = dict.fromkeys(control_of(params, variant) for variant in group.variants)
    return Finding(verdict, f"{how} {choice}", dense.delta, control.delta, (*group.variants, *controls))


def _combination(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """How much smaller the combination is than the smaller of its parts, and what it costs beyond the two.

    The p-value of the accuracy's interaction is approximate: an image's contrast of four outcomes runs from -2 to 2,
    and that its sign is as likely either way does not follow from there being no interaction.
    """
    params = run.params
    both = _operating_group(claim, run, rows, groups)
    parts = None if both is None else _parts(both, params, groups)
    if parts is None:
        return _absent(claim, "each technique alone")
    pruned, quantized = parts

    def beyond(key: str) -> float:
        sizes = [float(np.mean([rows[v][key] for v in group.variants])) for group in (both, pruned, quantized)]
        return 1 - sizes[0] / min(sizes[1:])

    def log_ratio(group: Group) -> float:
        return float(
            np.mean(
                [math.log2(rows[params.baseline_of(v)][claim.honest] / rows[v][claim.honest]) for v in group.variants]
            )
        )

    extra = log_ratio(both) - log_ratio(pruned) - log_ratio(quantized)
    correct = {v: m.correct.astype(np.int64) for v, m in run.variants.items()}
    interaction = sum(
        correct[b] - correct[p] - correct[q] + correct[params.baseline_of(b)]
        for b, p, q in zip(both.variants, pruned.variants, quantized.variants, strict=True)
    )
    accuracy = paired_difference(interaction, len(both.variants), params.report.confidence)
    there, honest = beyond(claim.there), beyond(claim.honest)
    how = (
        f"Share by which the combination's {claim.honest} are fewer than those of the smaller of its parts; in bytes of"
        f" model.onnx {percent_text(beyond('size_bytes'))}. In log size it gives"
        f" {2 ** log_ratio(both):.2f}x, its parts {2 ** log_ratio(pruned):.2f}x and {2 ** log_ratio(quantized):.2f}x:"
        f" {abs(extra):.2f} bits {'more' if extra > 0 else 'less'} than their sum. Top-1 beyond the sum of both"
        f" changes: {_of(accuracy)}, p = {p_text(accuracy.p_value)} (approximate). {_choice(claim, both, run, rows)}"
    )
    verdict = HOLDS if honest > claim.tolerance else ONLY_AS_COUNTED if there > claim.tolerance else FAILS
    return Finding(verdict, how, there, honest, (*both.variants, *pruned.variants, *quantized.variants))


def _parts(both: Group, params: Params, groups: dict[str, Group]) -> tuple[Group, Group] | None:
    """The groups with only its pruner and with only its quantizer, of the same models; None where one is missing."""
    first = both.variants[0]
    family, pruner = model_family(params, params.model_of(first)), params.pruner_of(first)
    floats = [
        f"{family}-{pruner}-{name}" for name, quantizer in params.quantizers.items() if quantizer.method == "fp32"
    ]
    pruned = next((name for name in floats if name in groups), None)
    quantized = f"{family}-none-{params.variants[first].quantizer}"
    if pruned is None or quantized not in groups or not _same_models(params, groups, both, pruned, quantized):
        return None
    return groups[pruned], groups[quantized]


def _pretraining(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """Does compression cost a pre-trained network less accuracy than the same network trained from scratch?

    The controls (`continued`, float) are left out: nothing is compressed in them; and `small_dense`, which begins
    with fresh weights in either. The p-value is approximate, as
    an image's contrast of four outcomes runs from -2 to 2 for each pair.
    """
    params = run.params
    pairs = []
    for variant in run.variants:
        model = params.model_of(variant)
        if params.models[model].weights == "none" or variant == params.baseline_of(variant):
            continue
        if is_control(params, variant) or isinstance(params.pruners[params.pruner_of(variant)], SmallDense):
            continue
        for scratch in params.models:
            other = f"{scratch}-{params.pruner_of(variant)}-{params.variants[variant].quantizer}"
            if _same_but_weights(params, model, scratch) and other in run.variants:
                pairs.append((variant, other))
                break
    if not pairs:
        how = "Needs the same network with pre-trained weights and from scratch among the models; here is no such pair."
        return Finding(NOT_TESTED, how)
    correct = {v: m.correct.astype(np.int64) for v, m in run.variants.items()}
    differences = sum(
        (correct[ours] - correct[params.baseline_of(ours)]) - (correct[other] - correct[params.baseline_of(other)])
        for ours, other in pairs
    )
    gain = paired_difference(differences, len(pairs), params.report.confidence)
    sure = gain.p_value < 1 - params.report.confidence
    how = (
        f"Change of top-1 under compression, pre-trained less from scratch, mean of {len(pairs)} pairs: {_of(gain)},"
        f" p = {p_text(gain.p_value)} (approximate); holds if above 0 and sure."
    )
    verdict = HOLDS if gain.delta > 0 and sure else FAILS
    return Finding(verdict, how, gain.delta, gain.delta, tuple(dict.fromkeys(name for pair in pairs for name in pair)))


def _printed(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """By the simulation of printed and filmed images; too few to tell where the published figure is above theirs, and
    within its interval."""
    if run.printed is None:
        how = f"Published for {claim.counted_there}; this run simulated no printed images (edge_benchmark.printed)."
        return Finding(NOT_TESTED, how)
    found, shown = run.printed, 20
    low, high = wilson_interval(round(claim.published * shown), shown, run.params.report.confidence)
    top1, n = found["top1_printed"], found["n_images"]
    how = (
        f"Published for {claim.counted_there}: no count of {shown} gives {percent_text(claim.published)}, and the"
        f" nearest, {round(claim.published * shown)}, leaves anything from {percent_text(low)} to {percent_text(high)}"
        f" possible. Here {n:,} test images through a simulation of print, light and camera, no paper:"
        f" {percent_text(top1)}"
        f" [{percent_text(found['top1_printed_ci_low'])}, {percent_text(found['top1_printed_ci_high'])}], against"
        f" {percent_text(found['top1_clean'])} on the same images as they are."
    )
    least = claim.published - claim.tolerance
    verdict = HOLDS if top1 >= least else FAILS if found["top1_printed_ci_high"] < least else NOT_TESTED
    if verdict == NOT_TESTED:
        how += " Too few images to tell."
    return Finding(verdict, how, top1, top1, (found["variant"],))


def _camera(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    return Finding(NOT_TESTED, f"Published for {claim.counted_there}; this run used stored test images and no camera.")


def _same_models(params: Params, groups: dict[str, Group], group: Group, *others: str) -> bool:
    models = [params.model_of(v) for v in group.variants]
    return all([params.model_of(v) for v in groups[name].variants] == models for name in others)


def _same_but_weights(params: Params, model: str, scratch: str) -> bool:
    one, other = (params.models[name].model_dump(exclude={"weights"}) for name in (model, scratch))
    return params.models[scratch].weights == "none" and one == other


def _absent(claim: Claim, beside: str = "") -> Finding:
    needed = f"a variant with pruner {' or '.join(claim.pruners)} and quantizer {' or '.join(claim.quantizers)}"
    return Finding(NOT_TESTED, f"Needs {needed}{f' and {beside}' if beside else ''} among the variants of the run.")


def _over_seeds(group: Group) -> str:
    return f" (mean of {len(group.variants)} seeds)" if len(group.variants) > 1 else ""


def _signed(fraction: float) -> str:
    return f"{100 * fraction:+.2f} points"


def _of(difference: PairedDifference) -> str:
    return f"{_signed(difference.delta)} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
