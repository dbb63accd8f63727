"""Make a dense classifier smaller by pruning, or train it on without pruning (the control).

In: `data/images` (train and validation parts; never test), the dense artifact `models/dense/<model>/`, the params
sections `base`, `finetune`, `prunings.<key>` and `prune.<pruner>`. Out: the artifact `models/pruned/<key>/` and the
training curve `reports/curves/pruned/<key>.csv` (only its header where nothing is trained). Killed at any moment, the
next run goes on from the last finished epoch.

    python -m stages.prune <key>
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.artifacts.artifact import Description, load_artifact, parent_of, save_artifact
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.common.params import (
    NoneContinued,
    NonePruner,
    Oto,
    Params,
    Training,
    Unstructured,
    key_argument,
    load_params,
)
from stages.datasets.store import Info, Part, open_part, read_info
from stages.networks.build import NetworkSpec
from stages.networks.layer_scale import fold_layer_scale
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier, Preprocess
from stages.pruning.costs import costs_of
from stages.pruning.dhspg import Dhspg
from stages.pruning.groups import check_exact, cut_channels, relative_difference
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import channel_groups
from stages.pruning.unstructured import KeepZeros, sparsity_of, zeros_of
from stages.training.checkpoint import checkpoint_folder
from stages.training.constraint import Constraint
from stages.training.loop import CURVE_COLUMNS, Trained, recipe_for, steps_in, train
from stages.training.optimizers import schedule

CUT_TOLERANCE = 1e-3
"""Largest difference between zeroed network and subnet, relative to the logits' scale."""
COMPARED_IMAGES = 8


@dataclass
class Pruned:
    """What a pruner leaves."""

    network: nn.Module
    spec: NetworkSpec
    metrics: dict[str, float]
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Session:
    """One pruning: what it starts from and how it trains."""

    params: Params
    key: str
    dense: nn.Module
    parent: Description
    train_part: Part
    validation_part: Part
    checkpoints: Path | None = None

    @property
    def pruner_name(self) -> str:
        return self.params.prunings[self.key].pruner

    @property
    def pruner(self) -> NonePruner | NoneContinued | Oto | Unstructured:
        return self.params.prune[self.pruner_name]

    @property
    def trained_spec(self) -> NetworkSpec:
        """What a pruner that trains starts from: the dense network with its layer scale folded."""
        return replace(self.parent.network, layer_scale_folded=True)

    @property
    def seed(self) -> int:
        return self.params.seed_of(self.parent.model)

    def identity(self) -> dict[str, Any]:
        """All that determines the result."""
        return {
            "parent": self.parent.tensors,
            "data": self.parent.data,
            "pruner": self.pruner.model_dump(),
            "finetune": self.params.finetune.model_dump(),
            "base": self.params.base.model_dump(),
            "seed": self.seed,
        }

    def train(self, network: nn.Module, constraint: Constraint | None) -> Trained:
        return train(
            network,
            self.train_part,
            self.validation_part,
            self.parent.preprocess(),
            recipe_for(self.params.finetune, self.pruner),
            base=self.params.base,
            seed=self.seed,
            title=f"prune {self.key}",
            constraint=constraint,
            checkpoints=self.checkpoints,
        )


def prune(session: Session) -> Pruned:
    """Prune `session.dense` as its pruner says.

    Raises:
        UserError: if the network cannot be pruned exactly or the target cannot be met.
    """
    if isinstance(session.pruner, Training):
        fold_layer_scale(session.dense)  # for all that train, or the control would have other parameters
    match session.pruner:
        case NonePruner():
            metrics = {"validation_top1": session.parent.metrics["validation_top1"]}
            return Pruned(session.dense, session.parent.network, metrics)
        case NoneContinued():
            trained = session.train(session.dense, None)
            return Pruned(trained.network, session.trained_spec, _metrics(trained), trained.curve)
        case Unstructured():
            return prune_unstructured(session)
        case Oto():
            return prune_oto(session)


def prune_unstructured(session: Session) -> Pruned:
    """Zero single weights, then train while they stay zero."""
    keep = KeepZeros(session.dense, zeros_of(session.dense, session.pruner, session.seed))
    keep.project(session.dense)
    trained = session.train(session.dense, keep)
    metrics = _metrics(trained) | {"sparsity": sparsity_of(trained.network)}
    return Pruned(trained.network, session.trained_spec, metrics, trained.curve)


def prune_oto(session: Session) -> Pruned:
    """Drive channel groups to zero while training (HESSO, DHSPG), cut them, and make sure that nothing changed."""
    network, pruner, spec = session.dense, session.pruner, session.trained_spec
    groups = channel_groups(network, session.parent.input_size)
    check_exact(network, spec, groups, session.parent.input_size)
    recipe = recipe_for(session.params.finetune, pruner)
    steps = steps_in(recipe, len(session.train_part))
    settings = network, groups, costs_of(network, groups, session.parent.input_size), pruner, steps
    key = f"prune.{session.pruner_name}"
    if pruner.optimizer == "hesso":
        sparse = Hesso(*settings, key)
    else:
        sparse = Dhspg(*settings, key, lambda step: recipe.learning_rate * schedule(step, steps, recipe))
    trained = session.train(network, sparse)
    subnet, spec = cut_channels(trained.network, spec, groups, sparse.pruned_channels())
    preprocess = session.parent.preprocess()
    check_cut(session.key, trained.network, subnet, preprocess, session.validation_part)
    logits = predict_logits(Classifier(preprocess, subnet), session.validation_part.images, EVALUATION_BATCH)
    metrics = _metrics(trained) | {
        "validation_top1": top1(logits, session.validation_part.labels),
        "group_sparsity": float(sparse.pruned.double().mean()),
        "channels_dense": sum(group.channels for group in groups),
        "channels": int((~sparse.pruned).sum()),
    }
    return Pruned(subnet, spec, metrics, trained.curve)


def check_cut(key: str, zeroed: nn.Module, subnet: nn.Module, preprocess: Preprocess, validation: Part) -> None:
    """Compare the two networks on random inputs and on validation images.

    Raises:
        UserError: if their logits differ.
    """
    size = preprocess.input_size
    random = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = preprocess(torch.from_numpy(validation.images[:COMPARED_IMAGES].copy()))
    for name, x in [("random inputs", random), ("validation images", images)]:
        difference = relative_difference(zeroed, subnet, x)
        if not difference <= CUT_TOLERANCE:
            raise UserError(
                f"{key}: after cutting, the logits on {name} differ by {difference:.2g} of their scale from the zeroed"
                f" network's (allowed: {CUT_TOLERANCE:g}): not saved; please report this network"
            )


def refuse_unfit(folder: Path, dense: nn.Module, parent: Description, images: Info) -> None:
    """Raise a `UserError` for a parent that is quantized, pruned, broken or made from other images."""
    if parent.layers or parent.network.widths:
        state = "quantized" if parent.layers else "pruned"
        raise UserError(f"{folder}: is {state} already; pruning starts from a dense float artifact")
    if broken := [name for name, tensor in dense.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinite values: make it again with `dvc repro`")
    parent.require_images(folder, images.sha256)


def _metrics(trained: Trained) -> dict[str, float]:
    return {"validation_top1": trained.validation_top1, "epoch": trained.epoch}


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def main() -> None:
    params = load_params()
    key = key_argument("prunings", params.prunings)
    folder = paths.dense(params.prunings[key].model)
    dense, parent = load_artifact(folder)
    refuse_unfit(folder, dense, parent, read_info(paths.IMAGES))
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
        save_artifact(paths.pruned(key), pruned.network, description)
        write_csv(paths.pruned_curve(key), pruned.curve, CURVE_COLUMNS)
    print(
        f"{key}: {before:,} to {after:,} parameters, validation top-1 {100 * pruned.metrics['validation_top1']:.2f} %"
        f" (dense {100 * parent.metrics['validation_top1']:.2f} %)"
    )


if __name__ == "__main__":
    run_stage(main)
