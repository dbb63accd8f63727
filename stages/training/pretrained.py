"""Train a network that starts from weights: a fresh head alone first, then all tensors but the frozen ones."""

import difflib
import fnmatch
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from stages.common.errors import UserError
from stages.params.finetune import Finetune
from stages.training.trainer import Trained, Trainer, TrainingData


def train_from_weights(
    network: nn.Module,
    data: TrainingData,
    recipe: Finetune,
    device: torch.device,
    *,
    fresh: Collection[str],
    seed: int,
    checkpoints: Path,
    title: str,
    metric: str = "top1",
) -> Trained:
    """Train in place by `recipe` and `recipe.pretrained`.

    Args:
        fresh: names of the tensors that did not come from the weights.
        checkpoints: a folder of this training from `checkpoint_folder`.

    Raises:
        UserError: if `freeze` does not fit the network, and as `Trainer` does.
    """
    settings = recipe.pretrained
    frozen = freeze(network, settings.freeze)
    body = [p for name, p in network.named_parameters() if name not in frozen and name not in fresh]
    head_epochs = min(settings.head_epochs, recipe.epochs - 1) if fresh else 0
    curve: list[dict[str, float]] = []
    if head_epochs:
        for parameter in body:
            parameter.requires_grad_(False)
        (folder := checkpoints / "head").mkdir(exist_ok=True)
        head = Trainer(network, data, recipe, device, seed=seed, title=title, fresh=fresh, frozen_batch_norm=True)
        curve = head.fit((0, head_epochs), "last", folder).curve
        for parameter in body:
            parameter.requires_grad_(True)
    keep = settings.batch_norm == "frozen"
    trainer = Trainer(
        network, data, recipe, device, seed=seed, metric=metric, title=title, fresh=fresh, frozen_batch_norm=keep
    )
    trained = trainer.fit((head_epochs, recipe.epochs), checkpoints=checkpoints)
    trained.curve = curve + trained.curve
    return trained


def freeze(network: nn.Module, patterns: list[str]) -> set[str]:
    """Exclude the parameters whose names match a pattern from training, and return their names.

    Raises:
        UserError: if a pattern matches none, or if all parameters match.
    """
    parameters, frozen = dict(network.named_parameters()), set()
    for pattern in patterns:
        if not (found := fnmatch.filter(parameters, pattern)):
            near = ", ".join(difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.3))
            raise UserError(f"finetune.pretrained.freeze: {pattern!r} matches no tensor; nearest: {near}")
        frozen |= set(found)
    if frozen == parameters.keys():
        raise UserError("finetune.pretrained.freeze matches all tensors: set epochs: 0 to train none")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen
