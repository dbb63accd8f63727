"""The model card of a variant: Markdown with the Hugging Face hub's metadata in front (the template: `card.md.j2`)."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stages.reporting import wording
from stages.reporting.edge import describe_run, marks_of
from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import Group, Row, dense_of


@cache
def environment(autoescape: bool) -> Any:
    """Jinja's templates of this folder, with the functions of `wording` as filters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {name.removesuffix("_text"): value for name, value in vars(wording).items() if callable(value)}
    return found


def card(run: CompletedRun, row: Row, groups: dict[str, Group]) -> str:
    """The card of the variant of `row`; it ends in a newline."""
    rows = {one["variant"]: one for group in groups.values() for one in group.rows}
    lost = wording.lost_text(row, dense_of(row, rows))
    params, variant = run.params, row["variant"]
    measured, model = run.variants[variant], params.models[row["model"]]
    quantizer = params.variants[variant].quantizer
    template = environment(autoescape=False).get_template("card.md.j2")
    return template.render(
        metadata=yaml.safe_dump(_metadata(run, row), sort_keys=False, allow_unicode=True, width=1000),
        row=row,
        group=groups[row["group"]],
        baseline=params.baseline_of(variant),
        profile=measured.profile,
        artifact=measured.artifact,
        cells=measured.corrupted.cells,
        corrupted_images=len(measured.corrupted.position),
        classes=run.classes,
        model=model,
        pruner=wording.describe(row["pruner"], params.pruners[row["pruner"]]),
        quantizer=wording.describe(quantizer, params.quantizers[quantizer]),
        confidence=params.report.confidence,
        batch=run.batch,
        run=describe_run(run),
        machine=wording.machine_text(run.edge),
        lost=lost,
        marks=marks_of(run, [variant]),
    )


def _metadata(run: CompletedRun, row: Row) -> dict[str, Any]:
    """Keys of the hub's card metadata (its model card specification), for search and leaderboards."""
    profile = run.variants[row["variant"]].profile
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": profile.data_name, "type": profile.data_name, "split": "test"},
        "metrics": [
            {"type": "accuracy", "value": round(row["top1"], 6), "name": "top-1"},
            {"type": "balanced_accuracy", "value": row["balanced_accuracy"], "name": "balanced accuracy"},
        ],
    }
    return {
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "license": "other",
        "license_name": "see-the-section-licences",
        "tags": ["edge", "model-compression", "onnxruntime", row["pruner"], row["quantizer"]],
        "metrics": ["accuracy", "balanced_accuracy"],
        "model-index": [{"name": row["variant"], "results": [result]}],
    }
