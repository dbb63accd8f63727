"""Prune: make a dense classifier smaller, or train it on without pruning (the control), for one entry of `pruned`.

In:  `params.yaml` (`base`, `finetune`, `pruned.<key>`, `pruners.<pruner>`, `report.metric`), `models/dense/<model>/`;
     the train and validation parts of `data/images/`.
Out: `models/pruned/<key>/`; the training curve `reports/curves/pruned/<key>.csv`, empty without training.
Run: python -m stages.prune <key>

A run that was killed goes on from its last checkpoint.
"""

from dataclasses import replace
from pathlib import Path

from stages.artifacts.artifact import load_artifact, save_artifact
from stages.artifacts.description import Description, parent_of
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.datasets.store import Info, open_part, read_info
from stages.networks.predict import VALIDATION
from stages.params.base import Base
from stages.params.budget import Budget
from stages.params.finetune import Finetune
from stages.params.load import key_argument, load_params
from stages.params.metric import Metric
from stages.params.pruners import Pruner, Structured
from stages.params.section import Name, Section
from stages.params.variants import PrunedModel
from stages.pruning.methods import prune
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.session import Session
from stages.training.trainer import CURVE_COLUMNS


class Params(Section):
    base: Base
    finetune: Finetune
    pruned: dict[Name, PrunedModel]
    pruners: dict[Name, Pruner]
    report: Metric = Metric()


def refuse_unfit(folder: Path, parent: Description, images: Info) -> None:
    """Raise a `UserError` for a parent that is quantized, pruned or made from other images."""
    if parent.layers or parent.network.widths:
        state = "quantized" if parent.layers else "pruned"
        raise UserError(f"{folder}: is {state} already; pruning starts from a dense float artifact")
    parent.require_images(folder, images.sha256)
    parent.require_metrics(folder, *VALIDATION)


def prune_one(params: Params, key: str) -> None:
    entry = params.pruned[key]
    folder = paths.dense(entry.model)
    dense, parent = load_artifact(folder)
    refuse_unfit(folder, parent, read_info(paths.IMAGES))
    session = Session(
        stage="prune",
        key=key,
        network=dense,
        parent=parent,
        settings=params.pruners[entry.pruner],
        param=f"pruners.{entry.pruner}",
        base=params.base,
        finetune=params.finetune,
        metric=params.report.metric,
        train_part=open_part(paths.IMAGES, "train"),
        validation_part=open_part(paths.IMAGES, "validation"),
    )
    with checkpoint_folder(paths.SCRATCH / "prune" / key, session.identity()) as session.checkpoints:
        pruned = prune(session)
        before, after = (sum(p.numel() for p in network.parameters()) for network in (dense, pruned.network))
        description = replace(
            parent,
            name=key,
            stage="prune",
            network=pruned.spec,
            parameters=session.settings.model_dump(),
            parent=parent_of(folder, parent),
            metrics=pruned.metrics | {"params_dense": before, "params": after},
            never_right=pruned.accuracy.never_right(parent.classes) if pruned.accuracy else parent.never_right,
        )
        if is_main_process():
            save_artifact(paths.pruned(key), pruned.network, description)
            write_csv(paths.pruned_curve(key), pruned.curve, CURVE_COLUMNS)
    top1, balanced = (
        f"{100 * pruned.metrics[figure]:.2f} % (dense {100 * parent.metrics[figure]:.2f} %)" for figure in VALIDATION
    )
    print(f"{key}: {before:,} to {after:,} parameters, validation top-1 {top1}, balanced accuracy {balanced}")
    for line in pruned.accuracy.warnings(parent.classes, parent.never_right) if pruned.accuracy else ():
        print(f"{key}: warning: {line}")
    if isinstance(session.settings, Structured) and pruned.metrics["group_sparsity"] == 0:
        [(name, target)] = session.settings.target.items()
        if target:
            print(f"{key}: nothing was removed: {session.param}.{name} = {target} is less than one unit of channels")


def main() -> None:
    params = load_params(Params)
    key = key_argument("pruned", params.pruned)
    if isinstance(params.pruners[params.pruned[key].pruner], Budget):
        launch(params.base)
    with process_group(prepare_host(params.base)):
        prune_one(params, key)


if __name__ == "__main__":
    run_stage(main)
