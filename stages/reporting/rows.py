"""One flat row for each variant (`variants.json`), groups of rows that differ by seed, and the headline's choice."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.params.budget import Budget
from stages.params.pruners import Continued
from stages.reporting.inputs import CompletedRun, Measured, Params
from stages.reporting.statistics import (
    Change,
    calibration_error,
    corrected,
    front,
    mean_and_std,
    paired_difference,
    recall_interval,
    wilson_interval,
)

Row = dict[str, Any]
ROW_KEYS = (
    *("variant", "model", "pruner", "quantizer", "seed", "group", "run_id", "n_test"),
    *("top1", "top1_ci_low", "top1_ci_high", "top1_delta", "delta_ci_low", "delta_ci_high", "p_value"),
    *("control", "control_delta", "control_ci_low", "control_ci_high", "control_p_value"),
    *("balanced_accuracy", "balanced_accuracy_ci_low", "balanced_accuracy_ci_high", "balanced_accuracy_delta"),
    *("balanced_delta_ci_low", "balanced_delta_ci_high", "balanced_p_value"),
    *("balanced_control_delta", "balanced_control_ci_low", "balanced_control_ci_high", "balanced_control_p_value"),
    *("worst_class", "worst_recall", "worst_images", "classes_at_zero"),
    *("metric", "validation_top1", "validation_balanced_accuracy", "agreement"),
    *("params", "params_nonzero", "params_visible", "macs", "macs_visible", "bops"),
    *("artifact_bytes", "size_bytes", "size_gzip_bytes"),
    *("latency_ms_p50", "latency_ms_p95", "latency_ratio", "peak_rss_bytes", "load_ms", "runtime"),
    *("calibration_error", "corrupted_top1"),
)
"""The keys of every row, in this order. Intervals and p-values of differences pool all seeds of the row's group."""
COMPUTED = (
    *("top1_ci", "top1_delta", "delta_ci", "control_delta", "control_ci", "calibration_error", "corrupted_top1"),
    *("balanced_accuracy", "balanced_delta", "balanced_control_delta", "balanced_control_ci", "worst_recall"),
)
"""Prefixes of the computed fractions, which are rounded to six decimals so that a diff shows no noise."""
PREFIXES = {"top1": "", "balanced_accuracy": "balanced_"}
"""For each figure of accuracy, the prefix of the keys of its comparisons."""


def metric_of(row: Row) -> str:
    """The figure by which the run chooses; reports of older code know only top-1."""
    return row.get("metric", "top1")


def validation(row: Row) -> float:
    """The validation figure that chooses."""
    return row[f"validation_{metric_of(row)}"]


def model_family(params: Params, model: str) -> str:
    """The first listed model with the same settings except the seed."""
    settings = params.models[model].model_dump(exclude={"seed"})
    return next(name for name, other in params.models.items() if other.model_dump(exclude={"seed"}) == settings)


def group_of(params: Params, variant: str) -> str:
    """The name that a variant shares with the same settings under other seeds."""
    family = model_family(params, params.model_of(variant))
    return f"{family}-{params.pruner_of(variant)}-{params.variants[variant].quantizer}"


def is_control(params: Params, variant: str) -> bool:
    """True for the float network that trained longer without any compression (`continued`)."""
    pruner = params.pruners[params.pruner_of(variant)]
    return isinstance(pruner, Continued) and params.quantizers[params.variants[variant].quantizer].method == "fp32"


def extra_training(params: Params, variant: str) -> tuple[int, set[tuple[float, ...]]]:
    """Epochs that a variant trained beyond its dense network, in pruning and in a quantizer's recovery.

    Returns:
        Their sum, and the distinct settings: learning rate factor, distillation, its temperature.
    """
    parts = [params.pruners[params.pruner_of(variant)], params.quantizers[params.variants[variant].quantizer]]
    budgets = [part.budget for part in parts if isinstance(part, Budget) and part.epochs]
    return sum(epochs for epochs, *_ in budgets), {budget[1:] for budget in budgets}


def control_of(params: Params, variant: str) -> str | None:
    """The control of the same model that trained for as many extra epochs with the same settings.

    None if it is not among the variants, and for a variant without extra training or that is itself a control.
    """
    training = extra_training(params, variant)
    if not training[0] or is_control(params, variant):
        return None
    same_model = (name for name in params.variants if params.model_of(name) == params.model_of(variant))
    return next((n for n in same_model if is_control(params, n) and extra_training(params, n) == training), None)


def compare(run: CompletedRun, pairs: list[tuple[str, str]], figure: str = "top1") -> Change:
    """A figure of the first of each pair minus the second's on the same test images, pooled over pairs (seeds)."""
    correct = {name: run.variants[name].correct.astype(np.int64) for pair in pairs for name in pair}
    differences = np.sum([correct[ours] - correct[theirs] for ours, theirs in pairs], axis=0)
    labels = None if figure == "top1" else run.labels
    return paired_difference(differences, len(pairs), run.params.report.confidence, labels)


def _compare_groups(run: CompletedRun, others: dict[str, str | None], figure: str) -> dict[str, Change]:
    """Each group against the given other variants, with p-values corrected over the groups.

    Args:
        others: for each variant the one to compare with; a group is left out if one of its variants has none.
    """
    groups: dict[str, list[tuple[str, str | None]]] = {}
    for pair in others.items():
        groups.setdefault(group_of(run.params, pair[0]), []).append(pair)
    whole = {group: [(ours, other) for ours, other in pairs if other] for group, pairs in groups.items()}
    complete = {group: pairs for group, pairs in whole.items() if len(pairs) == len(groups[group])}
    return corrected({group: compare(run, pairs, figure) for group, pairs in complete.items()})


def assemble_rows(run: CompletedRun) -> list[Row]:
    """One flat object for each listed variant with exactly `ROW_KEYS`. Accuracies are fractions.

    For each figure, the comparison with the dense networks and the one with the controls are two families for Holm's
    correction.
    """
    params = run.params
    dense = {v: None if v == params.baseline_of(v) else params.baseline_of(v) for v in params.variants}
    controls = {variant: control_of(params, variant) for variant in params.variants}
    against = {"delta": dense, "control": controls}
    by_group = {(f, kind): _compare_groups(run, others, f) for f in PREFIXES for kind, others in against.items()}
    accuracy = {variant: _accuracy(measured, params) for variant, measured in run.variants.items()}
    rows = []
    for variant, measured in run.variants.items():
        computed: Row = {
            "group": group_of(params, variant),
            "run_id": run.run_id,
            **accuracy[variant],
            "metric": params.report.metric,
            "control": controls[variant],
            "calibration_error": calibration_error(measured.confidence, measured.correct),
            "corrupted_top1": measured.corrupted.top1(run.labels),
        }
        for figure, prefix in PREFIXES.items():
            for kind, others in against.items():
                other, (key, p_key) = others[variant], _keys(figure, kind)
                computed[key] = None if other is None else accuracy[variant][figure] - accuracy[other][figure]
                change = by_group[figure, kind].get(computed["group"], Change(0.0, None, None, None))
                computed[f"{prefix}{kind}_ci_low"], computed[f"{prefix}{kind}_ci_high"] = change.low, change.high
                computed[p_key] = change.p_value
        found = measured.edge.model_dump() | measured.profile.model_dump() | computed
        rounded = {key: round(found[key], 6) for key in ROW_KEYS if key.startswith(COMPUTED) and found[key] is not None}
        rows.append({key: rounded.get(key, found[key]) for key in ROW_KEYS})
    return rows


def _keys(figure: str, kind: str) -> tuple[str, str]:
    """The keys of a difference and its p-value; the kinds are `delta` (from the dense network) and `control`."""
    prefix = PREFIXES[figure]
    if kind == "delta":
        return f"{figure}_delta", f"{prefix}p_value"
    return f"{prefix}control_delta", f"{prefix}control_p_value"


def _accuracy(measured: Measured, params: Params) -> Row:
    """The figures of accuracy of one variant, with intervals, and its worst class."""
    right, images = measured.by_class
    present, worst, confidence = images > 0, measured.worst_classes[0], params.report.confidence
    intervals = {
        "top1": wilson_interval(int(right.sum()), int(images.sum()), confidence),
        "balanced_accuracy": recall_interval(right[present], images[present], confidence),
    }
    return {
        "top1": float(right.sum() / images.sum()),
        "balanced_accuracy": float((right[present] / images[present]).mean()),
        **{f"{figure}_ci_low": low for figure, (low, _) in intervals.items()},
        **{f"{figure}_ci_high": high for figure, (_, high) in intervals.items()},
        "worst_class": measured.profile.classes[worst],
        "worst_recall": float(right[worst] / images[worst]),
        "worst_images": int(images[worst]),
        "classes_at_zero": int((right[present] == 0).sum()),
    }


@dataclass(frozen=True)
class Group:
    """Rows of the same settings under one or several seeds."""

    rows: list[Row]

    @property
    def name(self) -> str:
        return self.rows[0]["group"]

    @property
    def variants(self) -> list[str]:
        return [row["variant"] for row in self.rows]

    @property
    def seeds(self) -> int:
        return len(self.rows)

    def mean(self, key: str) -> float:
        return statistics.mean([row[key] for row in self.rows])  # equal integers stay whole

    def std(self, key: str) -> float | None:
        """Sample standard deviation over seeds; None for one seed or an unknown value."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return mean_and_std(values)[1] if len(values) == self.seeds else None

    @property
    def change(self) -> Change | None:
        """Of top-1 against the dense networks of the same seeds; None for the dense networks themselves."""
        return self.change_of("top1", "delta")

    @property
    def control(self) -> Change | None:
        """Of top-1 against the controls of the same seeds; None if there are none."""
        return self.change_of("top1", "control")

    def change_of(self, figure: str, kind: str) -> Change | None:
        """Of a figure of accuracy, against the dense networks (`delta`) or the controls (`control`)."""
        (key, p_key), ends = _keys(figure, kind), f"{PREFIXES[figure]}{kind}"
        if any(row.get(key) is None for row in self.rows):
            return None
        first = self.rows[0]
        return Change(self.mean(key), first.get(f"{ends}_ci_low"), first.get(f"{ends}_ci_high"), first.get(p_key))


def groups_of(rows: list[Row]) -> dict[str, Group]:
    """All groups by name, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return {name: Group(members) for name, members in found.items()}


def dense_of(row: Row, by_name: dict[str, Row]) -> Row:
    """The row of the same model's dense float network."""
    return by_name[f"{row['model']}-none-fp32"]


def best_dense(rows: list[Row], figure: str) -> float:
    """The best dense network's validation figure over all models: compressing a poor network well is no bargain."""
    return max(row[f"validation_{figure}"] for row in rows if row["top1_delta"] is None)


def least_accuracy(rows: list[Row], max_drop: float) -> float:
    """The `validation` that a variant needs to be within `max_drop` (a fraction) of the best dense network."""
    return best_dense(rows, metric_of(rows[0])) - max_drop - 1e-12  # the tolerance of rounding


def smallest(rows: list[Row]) -> Row:
    """The smallest `model.onnx`; ties go to the higher `validation`, then to the earlier row."""
    return min(rows, key=lambda row: (row["size_bytes"], -validation(row)))


def most_accurate(rows: list[Row]) -> Row:
    """The highest `validation`; ties go to the smaller `model.onnx`, then to the earlier row."""
    return min(rows, key=lambda row: (-validation(row), row["size_bytes"]))


@dataclass(frozen=True)
class Choices:
    """The variants that a person would choose between, selected by validation figures only."""

    headline: str
    """The smallest file within the allowed drop below the best dense network."""
    fastest: str
    """The lowest median latency within the allowed drop."""
    most_accurate: str
    small_dense: str | None
    """The best `small_dense` variant: a smaller network that was simply trained; None if there is none."""


def choose(run: CompletedRun, rows: list[Row]) -> Choices:
    """Choose by `validation`, so that the test figure is reported for a choice that it had no part in.

    The allowed drop is `report.headline_max_drop`. Dense networks are candidates, so there is always a choice. Ties go
    to the higher validation figure, then to the earlier name.
    """
    least = least_accuracy(rows, run.params.report.headline_max_drop)
    allowed = [row for row in rows if validation(row) >= least]
    fastest = min(allowed, key=lambda row: (row["latency_ms_p50"], -validation(row)))
    narrow = [row for row in rows if run.params.pruners[row["pruner"]].method == "small_dense"]
    small = max(narrow, key=validation, default=None)
    return Choices(
        smallest(allowed)["variant"],
        fastest["variant"],
        most_accurate(rows)["variant"],
        None if small is None else small["variant"],
    )


def headline_metrics(rows: list[Row], choices: Choices) -> dict[str, float | int | str]:
    """A dozen flat keys for `dvc exp show` and `dvc metrics diff`; compare runs by the validation one."""
    by_name = {row["variant"]: row for row in rows}
    chosen = by_name[choices.headline]
    dense = dense_of(chosen, by_name)
    metrics = {
        "n_test": dense["n_test"],
        "dense_top1": dense["top1"],
        "dense_size_bytes": dense["size_bytes"],
        "headline_variant": choices.headline,
        "headline_validation_top1": chosen["validation_top1"],
        "headline_validation_balanced_accuracy": chosen["validation_balanced_accuracy"],
        "headline_top1": chosen["top1"],
        "headline_balanced_accuracy": chosen["balanced_accuracy"],
        "headline_top1_delta": chosen["top1_delta"] or 0.0,
        "headline_size_ratio": round(dense["size_bytes"] / chosen["size_bytes"], 4),
        "headline_latency_ratio": round(chosen["latency_ratio"], 4),
    }
    if choices.small_dense is not None:
        metrics["small_dense_top1"] = by_name[choices.small_dense]["top1"]
    return metrics


@dataclass(frozen=True)
class Point:
    """One variant or group of seeds in a picture of accuracy against a cost; means over the seeds."""

    group: Group
    cost: float
    accuracy: float
    """Top-1, or balanced accuracy if the run chooses by it."""
    low: float
    high: float
    """The interval of one variant; one standard deviation to either side for several seeds."""
    on_front: bool
    """No other point is at least as cheap and as accurate and differs."""

    @property
    def first(self) -> Row:
        return self.group.rows[0]


def points_of(rows: list[Row], cost: str) -> list[Point]:
    """One point for each group. The front is that of the means, so that a lucky seed does not define it."""
    groups, figure = list(groups_of(rows).values()), metric_of(rows[0])
    costs, means = [group.mean(cost) for group in groups], [group.mean(figure) for group in groups]
    points = []
    for group, mean_cost, mean, on_front in zip(groups, costs, means, front(costs, means), strict=True):
        std, first = group.std(figure), group.rows[0]
        interval = first[f"{figure}_ci_low"], first[f"{figure}_ci_high"]
        low, high = interval if std is None else (mean - std, mean + std)
        points.append(Point(group, mean_cost, mean, low, high, on_front))
    return points
