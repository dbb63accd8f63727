"""One row for each variant, one summary for each group of seeds, and the choice of the variants to headline."""

import statistics
from dataclasses import dataclass

import numpy as np

from stages.params.budget import Budget
from stages.params.pruners import Continued
from stages.params.quantizers import Bits
from stages.params.whole import Params
from stages.reporting.inputs import EAGER, ONNX_RUNTIME, Run
from stages.reporting.statistics import (
    PairedDifference,
    calibration_error,
    front,
    holm,
    mean_and_deviation,
    paired_difference,
    wilson_interval,
)

ROW_KEYS = (
    "variant",
    "model",
    "pruner",
    "quantizer",
    "seed",
    "group",
    "run_id",
    "n_test",
    "top1",
    "top1_ci_low",
    "top1_ci_high",
    "top1_delta",
    "p_value",
    "agreement",
    "params",
    "params_nonzero",
    "params_visible",
    "macs",
    "macs_visible",
    "bops",
    "artifact_bytes",
    "size_bytes",
    "size_gzip_bytes",
    "latency_ms_p50",
    "latency_ms_p95",
    "latency_ratio",
    "peak_rss_bytes",
    "load_ms",
    "runtime",
    "calibration_error",
    "corrupted_top1",
)
"""What every row says, in this order (`variants.json`, `variants.csv`)."""

ROUNDING = dict.fromkeys(("top1_ci_low", "top1_ci_high", "top1_delta", "calibration_error", "corrupted_top1"), 6)
"""Decimals kept of computed fractions: more would be noise in a diff."""


@dataclass(frozen=True)
class Group:
    """The same settings under one or several seeds."""

    name: str
    variants: list[str]
    top1: float
    """Mean over seeds."""
    top1_deviation: float | None
    """Sample standard deviation over seeds; None for one seed."""
    delta_deviation: float | None
    difference: PairedDifference | None
    """Against the baselines of the same seeds, pooled by image; None for the baseline's own group."""
    p_value: float | None
    """Holm-corrected over all groups that are compared."""
    control: PairedDifference | None
    """Against the controls of the same seeds (`control_of`), pooled by image; None where there are none."""
    control_p_value: float | None
    """Holm-corrected over all groups that have a control."""


def model_family(params: Params, model: str) -> str:
    """The first listed model with the same settings but for the seed."""
    settings = params.models[model].model_dump(exclude={"seed"})
    return next(name for name, other in params.models.items() if other.model_dump(exclude={"seed"}) == settings)


def group_of(params: Params, variant: str) -> str:
    """The name that a variant shares with the same settings under other seeds."""
    family = model_family(params, params.model_of(variant))
    return f"{family}-{params.pruner_of(variant)}-{params.variants[variant].quantizer}"


def is_control(params: Params, variant: str) -> bool:
    """Whether it is float and trained on without pruning (`continued`): more training and nothing else."""
    pruner, variant_quantizer = params.pruners[params.pruner_of(variant)], params.variants[variant].quantizer
    return isinstance(pruner, Continued) and params.quantizers[variant_quantizer].method == "fp32"


def extra_training(params: Params, variant: str) -> tuple[int, set[tuple[float, ...]]]:
    """Epochs that a variant trained for beyond its dense network, and how: in pruning, and in a quantizer's recovery.

    Returns:
        Their sum, and the settings of each part: learning rate factor, distillation, its temperature.
    """
    parts = [params.pruners[params.pruner_of(variant)], params.quantizers[params.variants[variant].quantizer]]
    budgets = [part.budget for part in parts if isinstance(part, Budget | Bits) and part.epochs]
    return sum(epochs for epochs, *_ in budgets), {budget[1:] for budget in budgets}


def control_of(params: Params, variant: str) -> str | None:
    """The control of the same model that trained for as many extra epochs by the same settings.

    None where it is not among the variants, and for a variant that had no extra training or is itself a control.
    """
    training = extra_training(params, variant)
    if not training[0] or is_control(params, variant):
        return None
    return next(
        (
            name
            for name in params.variants
            if is_control(params, name)
            and params.model_of(name) == params.model_of(variant)
            and extra_training(params, name) == training
        ),
        None,
    )


def members(run: Run, group: str) -> list[str]:
    return [variant for variant in run.params.variants if group_of(run.params, variant) == group]


def compare(run: Run, pairs: list[tuple[str, str]]) -> PairedDifference:
    """Accuracy of the first of each pair over the second's, on the same test images, pooled over pairs (seeds)."""
    correct = {name: run.variants[name].correct.astype(np.int64) for pair in pairs for name in pair}
    differences = sum(correct[ours] - correct[theirs] for ours, theirs in pairs)
    return paired_difference(differences, len(pairs), run.params.report.confidence)


def assemble_groups(run: Run) -> dict[str, Group]:
    """All groups in the order of `params.variants`, each compared with its baselines and with its controls.

    The pooled comparison takes an image as the unit (see `statistics.sign_flip_p`); with one seed it is the exact
    McNemar test. Each of the two comparisons is a family of its own for Holm's correction; baselines are not
    hypotheses, so they do not count in it.
    """
    params = run.params
    names = list(dict.fromkeys(group_of(params, variant) for variant in params.variants))
    compared: dict[str, PairedDifference] = {}
    controlled: dict[str, PairedDifference] = {}
    for name in names:
        pairs = [(variant, params.baseline_of(variant)) for variant in members(run, name)]
        if all(ours != baseline for ours, baseline in pairs):
            compared[name] = compare(run, pairs)
        controls = [(variant, control_of(params, variant)) for variant in members(run, name)]
        if all(control is not None for _, control in controls):
            controlled[name] = compare(run, controls)
    corrected = holm({name: difference.p_value for name, difference in compared.items()})
    controls_corrected = holm({name: difference.p_value for name, difference in controlled.items()})
    groups = {}
    for name in names:
        variants = members(run, name)
        top1 = [run.variants[variant].profile["top1"] for variant in variants]
        base = [run.variants[params.baseline_of(variant)].profile["top1"] for variant in variants]
        mean, deviation = mean_and_deviation(top1)
        _, delta_deviation = mean_and_deviation([ours - theirs for ours, theirs in zip(top1, base, strict=True)])
        groups[name] = Group(
            name,
            variants,
            mean,
            deviation,
            delta_deviation if name in compared else None,
            compared.get(name),
            corrected.get(name),
            controlled.get(name),
            controls_corrected.get(name),
        )
    return groups


def assemble_rows(run: Run, groups: dict[str, Group]) -> list[dict]:
    """One flat object for each listed variant, with exactly `ROW_KEYS`. Accuracies are fractions."""
    rows = []
    for variant, measured in run.variants.items():
        group = group_of(run.params, variant)
        baseline = run.params.baseline_of(variant)
        n, correct = len(run.labels), int(measured.correct.sum())
        low, high = wilson_interval(correct, n, run.params.report.confidence)
        computed = {
            "group": group,
            "run_id": run.run_id,
            "top1": correct / n,
            "top1_ci_low": low,
            "top1_ci_high": high,
            "top1_delta": None if variant == baseline else (correct - int(run.variants[baseline].correct.sum())) / n,
            "p_value": groups[group].p_value,
            "calibration_error": calibration_error(measured.confidence, measured.correct),
            "corrupted_top1": measured.corrupted.top1(run.labels),
        }
        found = measured.edge | measured.profile | computed
        row = {key: found[key] for key in ROW_KEYS}
        for key, decimals in ROUNDING.items():
            row[key] = None if row[key] is None else round(row[key], decimals)
        rows.append(row)
    return rows


def validation_top1(run: Run, variant: str) -> float:
    return run.variants[variant].profile["validation_top1"]


def best_dense_top1(run: Run) -> float:
    """The best baseline's validation top-1, over all models: a poor network that compresses well is no bargain."""
    return max(validation_top1(run, run.params.baseline_of(variant)) for variant in run.params.variants)


def least_top1(run: Run, max_drop: float) -> float:
    """The validation top-1 that a variant needs to be within `max_drop` (a fraction) of the best baseline."""
    return best_dense_top1(run) - max_drop - 1e-12  # what rounding may take from an exact difference


def smallest(run: Run, variants: list[str]) -> str:
    """The smallest `model.onnx`; ties go to the higher validation top-1, then to the earlier name."""
    return min(variants, key=lambda name: (run.variants[name].profile["size_bytes"], -validation_top1(run, name)))


def most_accurate(run: Run, variants: list[str]) -> str:
    """The highest validation top-1; ties go to the smaller `model.onnx`, then to the earlier name."""
    return min(variants, key=lambda name: (-validation_top1(run, name), run.variants[name].profile["size_bytes"]))


@dataclass(frozen=True)
class Choices:
    """The variants a person would choose between, found on validation figures only."""

    headline: str
    """The smallest file within the allowed drop under the best baseline."""
    fastest: str
    """The lowest median latency within the allowed drop."""
    most_accurate: str


def choose(run: Run) -> Choices:
    """Choose on validation top-1, so that the test figure is reported for a choice that it had no part in.

    The allowed drop is `report.headline_max_drop` under the best baseline's validation top-1. Baselines are candidates,
    so there is always one. Ties go to the higher validation top-1, then to the earlier name.
    """
    variants, least = list(run.params.variants), least_top1(run, run.params.report.headline_max_drop)
    allowed = [variant for variant in variants if validation_top1(run, variant) >= least]

    def by_latency(variant: str) -> tuple[float, float]:
        return run.variants[variant].edge["latency_ms_p50"], -validation_top1(run, variant)

    return Choices(smallest(run, allowed), min(allowed, key=by_latency), most_accurate(run, variants))


def headline_metrics(run: Run, rows: list[dict], choices: Choices) -> dict[str, float | int | str]:
    """At most ten flat keys for `dvc exp show` and `dvc metrics diff`; to choose between runs, the validation one."""
    by_name = {row["variant"]: row for row in rows}
    chosen = by_name[choices.headline]
    dense = by_name[run.params.baseline_of(choices.headline)]
    metrics = {
        "n_test": dense["n_test"],
        "dense_top1": dense["top1"],
        "dense_size_bytes": dense["size_bytes"],
        "headline_variant": choices.headline,
        "headline_validation_top1": validation_top1(run, choices.headline),
        "headline_top1": chosen["top1"],
        "headline_top1_delta": chosen["top1_delta"] or 0.0,
        "headline_size_ratio": round(dense["size_bytes"] / chosen["size_bytes"], 4),
        "headline_latency_ratio": round(chosen["latency_ratio"], 4),
    }
    small = small_dense(run)
    if small is not None:
        metrics["small_dense_top1"] = by_name[small]["top1"]
    return metrics


def describe_run(run: Run) -> dict:
    """Where and on what the run was made: data, machine, timing protocol and versions, for `run.json`."""
    measured = next(iter(run.variants.values()))
    data = {key: value for key, value in measured.profile.items() if key.startswith("data_")}
    counts = {key: measured.profile[key] for key in ("n_test", "n_validation") if key in measured.profile}
    baseline = {
        "baseline_runtime": baseline_words(run),
        "baseline_latency_ms_p50": {model: row["latency_ms_p50"] for model, row in run.baselines.items()},
    }
    versions = {"versions": measured.description["versions"]}
    return {**run.edge, **data, **counts, **baseline, "printed": run.printed, **versions}


def baseline_words(run: Run) -> str:
    """What the dense networks ran in that speed-ups refer to: the same for all models of a run."""
    return {ONNX_RUNTIME: "ONNX Runtime", EAGER: "PyTorch eager"}[next(iter(run.baselines.values()))["runtime"]]


def small_dense(run: Run) -> str | None:
    """The `small_dense` variant with the best validation top-1: a smaller network simply trained; None without one."""
    listed = [
        variant
        for variant in run.params.variants
        if run.params.pruners[run.params.pruner_of(variant)].method == "small_dense"
    ]
    return max(listed, key=lambda variant: validation_top1(run, variant), default=None)


@dataclass(frozen=True)
class Point:
    """What a picture of accuracy against a cost shows of one variant, or of one group of seeds: then their means."""

    variants: list[str]
    """One for each seed."""
    model: str
    pruner: str
    quantizer: str
    cost: float
    top1: float
    low: float
    high: float
    """Of one variant its Wilson interval; of several seeds one sample standard deviation to either side."""
    on_front: bool
    """Whether no other point costs no more, is at least as accurate, and differs."""


def points_of(rows: list[dict], cost: str) -> list[Point]:
    """One for each group, in the rows' order; on the front by means, lest a lucky seed stand there for the others."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    costs = [
        statistics.mean([row[cost] for row in group]) for group in groups.values()
    ]  # bytes of equal size stay whole
    top1s = [mean_and_deviation([row["top1"] for row in group]) for group in groups.values()]
    flags = front(costs, [top1 for top1, _ in top1s])
    points = []
    for group, mean_cost, (top1, deviation), on_front in zip(groups.values(), costs, top1s, flags, strict=True):
        first = group[0]
        low, high = first["top1_ci_low"], first["top1_ci_high"]
        if deviation is not None:
            low, high = top1 - deviation, top1 + deviation
        names, looks = [row["variant"] for row in group], (first[key] for key in ("model", "pruner", "quantizer"))
        points.append(Point(names, *looks, mean_cost, top1, low, high, on_front))
    return points
