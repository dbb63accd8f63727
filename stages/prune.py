"""Make a dense classifier smaller by pruning, or train it on without pruning (the control).

In: `data/images` (train and validation parts; never test), the dense artifact `models/dense/<model>/`, the params
sections `base`, `finetune`, `pruned.<key>` and `pruners.<pruner>`. Out: the artifact `models/pruned/<key>/` and the
training curve `reports/curves/pruned/<key>.csv` (only its header where nothing is trained). Killed at any moment, the
next run goes on from the last checkpoint.

    python -m stages.prune <key>
"""

from dataclasses import replace
from pathlib import Path

from torch import nn

from stages.artifacts.artifact import load_artifact, save_artifact
from stages.artifacts.description import Description, parent_of
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.datasets.store import Info, open_part, read_info
from stages.params.budget import Budget
from stages.params.load import key_argument, load_params
from stages.params.whole import Params
from stages.pruning.methods import prune
from stages.pruning.session import Session
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.trainer import CURVE_COLUMNS


def refuse_unfit(folder: Path, parent: Description, images: Info) -> None:
    """Raise a `UserError` for a parent that is quantized, pruned or made from other images."""
    if parent.layers or parent.network.widths:
        state = "quantized" if parent.layers else "pruned"
        raise UserError(f"{folder}: is {state} already; pruning starts from a dense float artifact")
    parent.require_images(folder, images.sha256)
    parent.require_metrics(folder, "validation_top1")


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def prune_one(params: Params, key: str) -> None:
    folder = paths.dense(params.pruned[key].model)
    dense, parent = load_artifact(folder)
    refuse_unfit(folder, parent, read_info(paths.IMAGES))
    train_part, validation_part = open_part(paths.IMAGES, "train"), open_part(paths.IMAGES, "validation")
    session = Session(params, key, dense, parent, train_part, validation_part)
    before = _count(dense)
    with checkpoint_folder(paths.SCRATCH / "prune" / key, session.identity()) as session.checkpoints:
        pruned = prune(session)
        after = _count(pruned.network)
        description = replace(
            parent,
            name=key,
            stage="prune",
            network=pruned.spec,
            parameters=session.pruner.model_dump(),
            seed=session.seed,
            parent=parent_of(folder, parent),
            metrics=pruned.metrics | {"params_dense": before, "params": after},
        )
        if is_main_process():
            save_artifact(paths.pruned(key), pruned.network, description)
            write_csv(paths.pruned_curve(key), pruned.curve, CURVE_COLUMNS)
    print(
        f"{key}: {before:,} to {after:,} parameters, validation top-1 {100 * pruned.metrics['validation_top1']:.2f} %"
        f" (dense {100 * parent.metrics['validation_top1']:.2f} %)"
    )
    if pruned.metrics.get("group_sparsity") == 0 and any(session.pruner.target.values()):
        [(name, target)] = session.pruner.target.items()
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
