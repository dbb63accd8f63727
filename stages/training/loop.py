"""The training loop: epochs over memory-mapped images, best epoch by validation, resumable after any kill.

Everything random in an epoch is drawn from generators seeded by (seed, epoch), so an epoch does not depend on how
the process came to it: a resumed training ends, on the CPU, bit for bit where the uninterrupted one does.
"""

import copy
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stages.common.errors import UserError
from stages.common.params import Base, Finetune, Training
from stages.common.progress import epoch_progress
from stages.datasets.store import Part
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier, Preprocess
from stages.training.augment import AlternatingFlip, BatchMixing, flip_and_crop
from stages.training.checkpoint import load_checkpoint, save_checkpoint
from stages.training.constraint import Constraint
from stages.training.host import clear_memory_errors, prepare_host, use_bfloat16
from stages.training.optimizers import Optimizers, schedule

CURVE_COLUMNS = (
    "epoch",
    "learning_rate",
    "training_loss",
    "validation_loss",
    "validation_top1",
    "images_per_second",
    "seconds",
)


@dataclass
class Trained:
    """A trained network and how it went."""

    network: nn.Module
    """On the CPU, in evaluation mode, with the weights of the chosen epoch."""
    curve: list[dict[str, float]]
    """One row of `CURVE_COLUMNS` for each epoch."""
    validation_top1: float
    """Of the chosen weights, in float32."""
    epoch: int
    """The chosen epoch, counted from 1."""


def recipe_for(finetune: Finetune, pruner: Training) -> Finetune:
    """The recipe of finetune with a pruner's own budget: its epochs, and learning rates times its factor."""
    factor = pruner.learning_rate_factor
    return finetune.model_copy(
        update={
            "epochs": pruner.epochs,
            "learning_rate": finetune.learning_rate * factor,
            "muon_learning_rate": finetune.muon_learning_rate * factor,
        }
    )


def steps_per_epoch(recipe: Finetune, images: int) -> int:
    """Full batches in one pass; the images of an incomplete one fall to the next epoch's new order."""
    return max(1, images // recipe.batch_size)


def steps_in(recipe: Finetune, images: int) -> int:
    """Optimizer steps in the whole training."""
    return recipe.epochs * steps_per_epoch(recipe, images)


def train(
    network: nn.Module,
    train_part: Part,
    validation_part: Part,
    preprocess: Preprocess,
    recipe: Finetune,
    *,
    base: Base,
    seed: int,
    title: str,
    constraint: Constraint | None = None,
    checkpoints: Path | None = None,
) -> Trained:
    """Train `network` in place and give back the weights of the best epoch by validation top-1 (loss breaks ties).

    Args:
        network: takes `[N, 3, S, S]`, gives logits `[N, classes]`.
        constraint: a pruner's; only epochs at whose end it is met may be chosen.
        checkpoints: a folder from `checkpoint_folder`; the last finished epoch in it is continued.

    Raises:
        UserError: if the loss becomes NaN or infinite, if no epoch meets the constraint, if memory or disk run out, or
            if the network does not take images of this size.
    """
    device = prepare_host(base)
    with clear_memory_errors(f"{title}: batch_size {recipe.batch_size}"):
        return _train(
            network, train_part, validation_part, preprocess, recipe, device, seed, title, constraint, checkpoints
        )


def _train(
    network: nn.Module,
    train_part: Part,
    validation_part: Part,
    preprocess: Preprocess,
    recipe: Finetune,
    device: torch.device,
    seed: int,
    title: str,
    constraint: Constraint | None,
    checkpoints: Path | None,
) -> Trained:
    bfloat16 = use_bfloat16(recipe.precision, device)
    network.train().to(device, memory_format=torch.channels_last)
    preprocess = copy.deepcopy(preprocess).to(device)
    batches, steps = steps_per_epoch(recipe, len(train_part)), steps_in(recipe, len(train_part))
    optimizers = Optimizers(network, recipe)
    average = _average_of(network, recipe) if recipe.average_decay else None
    flip = AlternatingFlip(len(train_part), recipe.horizontal_flip, seed)
    mixing = BatchMixing(recipe, _classes(network, preprocess.input_size, title), device)
    curve: list[dict[str, float]] = []
    best: dict[str, Any] = {}

    if checkpoints is not None and (saved := load_checkpoint(checkpoints)):
        curve, best = saved["curve"], saved["best"]
        if constraint is not None:
            constraint.load_state_dict(saved["constraint"])
        if len(curve) < recipe.epochs:
            network.load_state_dict(saved["network"])
            optimizers.load_state_dict(saved["optimizers"])
            if average is not None:
                average.load_state_dict(saved["average"])

    with epoch_progress(title, recipe.epochs, batches, done=len(curve)) as progress:
        for epoch in range(len(curve), recipe.epochs):
            started = time.perf_counter()
            generator = _seed_epoch(seed, epoch)
            order = torch.randperm(len(train_part), generator=generator).numpy()
            total = torch.zeros((), device=device)
            for batch in range(batches):
                step = epoch * batches + batch
                index = np.sort(order[batch * recipe.batch_size : (batch + 1) * recipe.batch_size])
                pixels = torch.from_numpy(train_part.images[index]).to(device, non_blocking=True)
                labels = torch.from_numpy(train_part.labels[index]).to(device, non_blocking=True)
                pixels = flip_and_crop(pixels, flip(index, epoch), recipe.crop_padding, generator)
                x, targets = mixing(preprocess.normalise(pixels), labels)
                smoothing = recipe.label_smoothing if targets.dim() == 1 else 0.0  # mixed targets are smooth already
                factor = schedule(step, steps, recipe)
                optimizers.set_factor(factor)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                    logits = network(preprocess.resize(x))
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                network.zero_grad(set_to_none=True)
                loss.backward()
                if constraint is not None:
                    constraint.before_step(step)
                optimizers.step()
                if constraint is not None:
                    constraint.after_step(step)
                if average is not None:
                    average.update_parameters(network)
                total += loss.detach()
                progress.step()

            mean_loss = total.item() / batches
            seconds = time.perf_counter() - started
            if not np.isfinite(mean_loss):
                raise UserError(
                    f"{title}: the loss became {mean_loss} in epoch {epoch + 1}: lower the learning rate;"
                    " nothing was saved"
                )
            candidate = network if average is None else average.module
            if average is not None and constraint is not None:
                candidate = copy.deepcopy(candidate)
                constraint.project(candidate)
            logits = predict_logits(
                Classifier(preprocess, candidate), validation_part.images, EVALUATION_BATCH, device, autocast=bfloat16
            )
            validation_loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(validation_part.labels)).item()
            curve.append(
                {
                    "epoch": epoch + 1,
                    "learning_rate": round(recipe.learning_rate * factor, 8),
                    "training_loss": round(mean_loss, 6),
                    "validation_loss": round(validation_loss, 6),
                    "validation_top1": round(top1(logits, validation_part.labels), 6),
                    "images_per_second": round(batches * min(recipe.batch_size, len(train_part)) / seconds, 1),
                    "seconds": round(time.perf_counter() - started, 2),
                }
            )
            score = (curve[-1]["validation_top1"], -validation_loss)
            if (constraint is None or constraint.met_after(step)) and (not best or score > tuple(best["score"])):
                weights = {name: tensor.detach().cpu().clone() for name, tensor in candidate.state_dict().items()}
                best = {"epoch": epoch + 1, "score": list(score), "weights": weights}
            if checkpoints is not None:
                state = {"curve": curve, "best": best}
                if constraint is not None:
                    state["constraint"] = constraint.state_dict()
                if len(curve) < recipe.epochs:  # nothing goes on from the last one
                    state |= {"network": network.state_dict(), "optimizers": optimizers.state_dict()}
                    if average is not None:
                        state["average"] = average.state_dict()
                save_checkpoint(checkpoints, state)
            progress.epoch(mean_loss, curve[-1]["validation_top1"], curve[-1]["images_per_second"])

    if not best:
        raise UserError(
            f"{title}: no epoch ended with the pruning target met: give it more epochs or an earlier end_fraction"
        )
    network.load_state_dict(best["weights"])
    network.cpu().to(memory_format=torch.contiguous_format).eval()
    logits = predict_logits(Classifier(preprocess.cpu(), network), validation_part.images, EVALUATION_BATCH)
    return Trained(network, curve, top1(logits, validation_part.labels), best["epoch"])


@torch.no_grad()
def _classes(network: nn.Module, input_size: int, title: str) -> int:
    """The number of logits, by one pass in evaluation mode: in training mode it would move running statistics.

    Raises:
        UserError: if the network does not take images of this size, or gives something other than logits.
    """
    network.eval()
    try:
        logits = network(torch.zeros(2, 3, input_size, input_size, device=next(network.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{title}: the network does not take input_size {input_size} ({reason}): choose another"
        ) from None
    network.train()
    if getattr(network, "aux_logits", False) or not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UserError(
            f"{title}: the network gives more than logits; networks with auxiliary outputs cannot be trained"
        )
    return logits.shape[1]


def _average_of(network: nn.Module, recipe: Finetune) -> AveragedModel:
    """An exponential moving average whose decay grows with the steps, so that short trainings are averaged too."""

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], steps: torch.Tensor) -> None:
        seen = int(steps)
        torch._foreach_lerp_(averaged, current, 1 - min(recipe.average_decay, (1 + seen) / (10 + seen)))

    average = AveragedModel(network, multi_avg_fn=update, use_buffers=False)
    return average


def _seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed all global generators (dropout, timm's mixing) and give one for order and crops."""
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    return torch.Generator().manual_seed(mixed)
