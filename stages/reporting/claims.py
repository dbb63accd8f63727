"""Verdicts on the sentences of the study, computed from the rows of one run (the list itself: `claims.yaml`)."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from stages.common.params import NoneContinued, Params, Training
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, compare, model_family
from stages.reporting.statistics import holm, paired_difference
from stages.reporting.text import p_text

HOLDS = "holds"
ONLY_AS_COUNTED = "holds only as counted there"
FAILS = "does not hold"
NOT_TESTED = "not tested"
VERDICTS = (HOLDS, ONLY_AS_COUNTED, FAILS, NOT_TESTED)


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


def verdict_at_least(published: float, tolerance: float, as_counted_there: float, honest: float) -> str:
    """An effect of at least the published size, less the tolerance."""
    if honest >= published - tolerance:
        return HOLDS
    return ONLY_AS_COUNTED if as_counted_there >= published - tolerance else FAILS


def verdict_at_most(limit: float, as_counted_there: float, honest: float) -> str:
    """An effect of at most `limit`."""
    if honest <= limit:
        return HOLDS
    return ONLY_AS_COUNTED if as_counted_there <= limit else FAILS


def _matching(claim: Claim, run: Run, groups: dict[str, Group]) -> list[Group]:
    """Groups whose pruner and quantizer have one of the claim's methods."""
    params = run.params

    def fits(variant: str) -> bool:
        pruner = params.prune[params.pruner_of(variant)].method
        quantizer = params.quantize[params.variants[variant].quantizer].method
        return pruner in claim.pruners and quantizer in claim.quantizers

    return [group for group in groups.values() if fits(group.variants[0])]


def _mean_reduction(group: Group, key: str, params: Params, rows: dict[str, dict]) -> float:
    """Share of `key` that is gone, against the dense float network of the same model; mean over seeds."""
    return float(np.mean([1 - rows[v][key] / rows[params.baseline_of(v)][key] for v in group.variants]))


def _reduction(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    matching = _matching(claim, run, groups)
    if not matching:
        return _absent(claim)
    largest = max(matching, key=lambda group: _mean_reduction(group, claim.there, run.params, rows))
    there = _mean_reduction(largest, claim.there, run.params, rows)
    honest = _mean_reduction(largest, claim.honest, run.params, rows)
    how = (
        f"1 - {claim.there} / {claim.there} of the dense float variant ({claim.counted_there}); honestly the same with"
        f" {claim.honest}. The largest reduction in the run{_over_seeds(largest)}; may fall short by"
        f" {claim.tolerance:g}."
    )
    verdict = verdict_at_least(claim.published, claim.tolerance, there, honest)
    return Finding(verdict, how, there, honest, tuple(largest.variants))


def _limited_reduction(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    matching = _matching(claim, run, groups)
    if not matching:
        return _absent(claim)
    there = max(_mean_reduction(group, claim.there, run.params, rows) for group in matching)
    honest = max(_mean_reduction(group, claim.honest, run.params, rows) for group in matching)
    variants = tuple(variant for group in matching for variant in group.variants)
    zeros = max(1 - rows[v]["params_nonzero"] / rows[v]["params"] for v in variants)
    times = [rows[v]["latency_ms_p50"] / rows[run.params.baseline_of(v)]["latency_ms_p50"] for v in variants]
    how = (
        f"Share of {claim.honest} gone: dense hardware multiplies zeros too. Up to {zeros:.0%} of the weights are zero,"
        f" and median latency is {min(times):.2f} to {max(times):.2f} times the dense variant's. Limited is read as at"
        f" most {claim.tolerance:g}."
    )
    return Finding(verdict_at_most(claim.tolerance, there, honest), how, there, honest, variants)


def _accuracy_gain(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """Against dense as counted there; honestly against the control that trained for the same extra steps."""
    matching = _matching(claim, run, groups)
    if not matching:
        return _absent(claim)
    params = run.params
    smallest = min(matching, key=lambda group: float(np.mean([rows[v]["size_bytes"] for v in group.variants])))
    dense = compare(run, [(v, params.baseline_of(v)) for v in smallest.variants])
    controls = {variant: _control_of(params, variant) for variant in smallest.variants}
    if not all(controls.values()):
        how = (
            "Top-1 of the smallest such variant less that of dense"
            f" ({_signed(dense.delta)}); the control that trains as long without pruning is not among the variants."
        )
        return Finding(NOT_TESTED, how, dense.delta, None, tuple(smallest.variants))
    control = compare(run, list(controls.items()))
    corrected = holm({"dense": dense.p_value, "control": control.p_value})
    sure = corrected["control"] < 1 - params.report.confidence
    honest = control.delta if sure else min(control.delta, 0.0)  # a gain that may be chance is none
    holds = verdict_at_least(claim.published, claim.tolerance, dense.delta, honest)
    how = (
        f"Top-1 less that of dense, {claim.counted_there}: {_signed(dense.delta)}"
        f" [{_signed(dense.low)}, {_signed(dense.high)}], p = {p_text(corrected['dense'])}. Honestly less that of the"
        f" control (none_continued, the same extra steps without pruning): {_signed(control.delta)}"
        f" [{_signed(control.low)}, {_signed(control.high)}], p = {p_text(corrected['control'])}."
        f" n = {dense.n} test images, paired, exact, Holm over the two; the smallest such variant"
        f"{_over_seeds(smallest)}; may fall short by {claim.tolerance:g}."
    )
    return Finding(holds, how, dense.delta, control.delta, (*smallest.variants, *dict.fromkeys(controls.values())))


def _combination(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """How much smaller the combination is than the smaller of its parts, and what it costs beyond the two."""
    params, found = run.params, []
    for group in _matching(claim, run, groups):
        pruner = params.pruner_of(group.variants[0])
        family = model_family(params, params.model_of(group.variants[0]))
        floats = [name for name, q in params.quantize.items() if q.method == "fp32"]
        quantizer = params.variants[group.variants[0]].quantizer
        pruned = next((f"{family}-{pruner}-{q}" for q in floats if f"{family}-{pruner}-{q}" in groups), None)
        quantized = f"{family}-none-{quantizer}"
        if pruned and quantized in groups and _same_models(params, groups, group, pruned, quantized):
            found.append((group, groups[pruned], groups[quantized]))
    if not found:
        return _absent(claim, "each technique alone")
    both, pruned, quantized = min(
        found, key=lambda parts: float(np.mean([rows[v][claim.honest] for v in parts[0].variants]))
    )

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
        f"Share by which the combination is smaller than the smaller of its parts. In log size it gives"
        f" {2 ** log_ratio(both):.2f}x, its parts {2 ** log_ratio(pruned):.2f}x and {2 ** log_ratio(quantized):.2f}x:"
        f" {abs(extra):.2f} bits {'more' if extra > 0 else 'less'} than their sum. Top-1 beyond the sum of both"
        f" changes:"
        f" {_signed(accuracy.delta)} [{_signed(accuracy.low)}, {_signed(accuracy.high)}], p ="
        f" {p_text(accuracy.p_value)}{_over_seeds(both)}."
    )
    verdict = HOLDS if honest > claim.tolerance else ONLY_AS_COUNTED if there > claim.tolerance else FAILS
    return Finding(verdict, how, there, honest, (*both.variants, *pruned.variants, *quantized.variants))


def _pretraining(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    """Does compression cost a pre-trained network less accuracy than the same network trained from scratch?"""
    params = run.params
    pairs = []
    for variant in run.variants:
        model = params.model_of(variant)
        if params.models[model].weights == "none" or variant == params.baseline_of(variant):
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
        f"Change of top-1 under compression, pre-trained less from scratch, mean of {len(pairs)} pairs:"
        f" {_signed(gain.delta)} [{_signed(gain.low)}, {_signed(gain.high)}], p = {p_text(gain.p_value)}; holds if"
        " above 0 and sure."
    )
    verdict = HOLDS if gain.delta > 0 and sure else FAILS
    return Finding(verdict, how, gain.delta, gain.delta, tuple(dict.fromkeys(name for pair in pairs for name in pair)))


def _camera(claim: Claim, run: Run, rows: dict[str, dict], groups: dict[str, Group]) -> Finding:
    return Finding(NOT_TESTED, f"Published for {claim.counted_there}; this run used stored test images and no camera.")


def _control_of(params: Params, variant: str) -> str | None:
    """The float `none_continued` variant of the same model that trained for as many extra epochs; None without one."""
    model, pruner = params.model_of(variant), params.prune[params.pruner_of(variant)]
    for name in params.variants:
        control = params.prune[params.pruner_of(name)]
        if (
            params.model_of(name) == model
            and isinstance(control, NoneContinued)
            and isinstance(pruner, Training)
            and control.epochs == pruner.epochs
            and params.quantize[params.variants[name].quantizer].method == "fp32"
        ):
            return name
    return None


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


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
