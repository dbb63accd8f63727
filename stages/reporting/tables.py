"""The flat tables that DVC's own plots read (`reports/plots/*.csv`)."""

from dataclasses import dataclass

from stages.reporting.inputs import Run
from stages.reporting.plots import CONFUSION_CLASSES, confusion_counts, worst_classes
from stages.reporting.rows import Choices, points_of

CONFUSED_WITH = 3
"""So many wrong answers stand for each class in a `confusion.csv` that does not hold the whole matrix."""


@dataclass(frozen=True)
class Table:
    """Rows of one CSV; the columns stand apart because a table may be empty."""

    columns: tuple[str, ...]
    rows: list[dict]


def plot_tables(run: Run, rows: list[dict], choices: Choices) -> dict[str, Table]:
    """By file name without its ending."""
    return {
        "pareto_size": _pareto(rows, "size_bytes"),
        "pareto_latency": _pareto(rows, "latency_ms_p50"),
        "pareto_macs": _pareto(rows, "macs"),
        "size": _sizes(rows),
        "params": _params(rows),
        "training": _training(run),
        "confusion": _confusion(run, choices.headline),
    }


def _pareto(rows: list[dict], cost: str) -> Table:
    """One line for each variant, or for each group of seeds under its first one's name."""
    return Table(
        ("variant", "model", "pruner", "quantizer", "seeds", cost, "top1", "top1_low", "top1_high", "front"),
        [
            {
                "variant": point.variants[0],
                "model": point.model,
                "pruner": point.pruner,
                "quantizer": point.quantizer,
                "seeds": len(point.variants),
                cost: round(point.cost, 6),
                "top1": round(point.top1, 6),
                "top1_low": round(point.low, 6),
                "top1_high": round(point.high, 6),
                "front": int(point.on_front),
            }
            for point in points_of(rows, cost)
        ],
    )


def _sizes(rows: list[dict]) -> Table:
    columns = ("variant", "size_bytes", "size_gzip_bytes", "artifact_bytes")
    return Table(columns, [{column: row[column] for column in columns} for row in rows])


def _params(rows: list[dict]) -> Table:
    """Long form: one line for each variant and way of counting."""
    counts = (("true", "params"), ("not zero", "params_nonzero"), ("visible", "params_visible"))
    return Table(
        ("variant", "count", "params"),
        [{"variant": row["variant"], "count": words, "params": row[key]} for row in rows for words, key in counts],
    )


def _training(run: Run) -> Table:
    """Long form: dense and pruned models by epoch."""
    return Table(
        ("run", "stage", "epoch", "validation_top1", "training_loss"),
        [
            {
                "run": name,
                "stage": "finetune" if name in run.params.models else "prune",
                "epoch": int(row["epoch"]),
                "validation_top1": row["validation_top1"],
                "training_loss": row["training_loss"],
            }
            for name, curve in run.curves.items()
            for row in curve
        ],
    )


def _confusion(run: Run, variant: str) -> Table:
    """Test images of the headline variant by true and predicted class, with the share of the true class.

    Every cell up to `CONFUSION_CLASSES` classes. Beyond that a whole matrix is neither drawn nor read, so only errors
    stand here: of the `CONFUSION_CLASSES` classes found least often, the most frequent wrong answers, at most
    `CONFUSED_WITH` each, none of them zero.
    """
    counts = confusion_counts(run, variant)
    classes = range(len(counts))
    if len(counts) <= CONFUSION_CLASSES:
        cells = [(actual, said) for actual in classes for said in classes]
    else:
        cells = []
        for actual in worst_classes(counts, CONFUSION_CLASSES):
            order = (-counts[actual]).argsort(kind="stable").tolist()
            wrong = [said for said in order if said != actual and counts[actual, said]]
            cells += [(actual, said) for said in wrong[:CONFUSED_WITH]]
    images = counts.sum(axis=1)
    return Table(
        ("actual", "predicted", "images", "share"),
        [
            {
                "actual": run.classes[actual],
                "predicted": run.classes[said],
                "images": int(counts[actual, said]),
                "share": round(counts[actual, said].item() / max(1, images[actual].item()), 4),
            }
            for actual, said in cells
        ],
    )


def confusion_rows(run: Run, variant: str) -> list[dict]:
    """For each true class its name, counts by predicted class, and the share found (recall; None without images)."""
    counts = confusion_counts(run, variant)
    images = counts.sum(axis=1)
    return [
        {"name": name, "counts": counts[k].tolist(), "recall": counts[k, k] / images[k] if images[k] else None}
        for k, name in enumerate(run.classes)
    ]
