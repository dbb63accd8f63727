"""The training loop: epochs over stored images, best epoch by validation, resumable after any kill.

Everything random in an epoch is drawn from generators seeded by (seed, epoch), so an epoch does not depend on how
the process came to it: a resumed training ends, on the CPU, bit for bit where the uninterrupted one does. Several
processes (`training.processes`) take the same steps together as one would, up to rounding and dropout's draws.
"""

import copy
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.errors import UserError
from stages.common.progress import EpochProgress, epoch_progress
from stages.datasets.store import Part
from stages.networks.architectures import more_than_logits
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier, Preprocess
from stages.networks.tensors import load_tensors
from stages.params.base import Base
from stages.params.budget import Budget
from stages.params.finetune import Finetune
from stages.params.quantizers import Bits
from stages.training import distributed
from stages.training.augment import Augmentation, share_of
from stages.training.average import WeightAverage
from stages.training.batches import Images
from stages.training.checkpoint import Spacing, load_checkpoint, save_checkpoint
from stages.training.constraint import Constraint
from stages.training.convolutions import mended_convolutions
from stages.training.cuda_graphs import Graphed
from stages.training.distillation import Distillation, freeze, soft_loss
from stages.training.host import clear_compile_errors, clear_memory_errors, prepare_host, use_bfloat16
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


MUON_RATE = "finetune.muon_learning_rate"


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


def recipe_for(finetune: Finetune, budget: Budget | Bits) -> Finetune:
    """The recipe of finetune with a pruner's or quantizer's own budget: epochs, and a factor of learning rates."""
    factor = budget.learning_rate_factor
    return finetune.model_copy(
        update={
            "epochs": budget.epochs,
            "learning_rate": finetune.learning_rate * factor,
            "muon_learning_rate": finetune.muon_learning_rate * factor,
            "early_input_size": None,  # the weights are used to the full size
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
    distillation: Distillation | None = None,
    epochs: tuple[int, int] | None = None,
    keep: Literal["best", "last"] = "best",
    checkpoints: Path | None = None,
    rate_key: str = "finetune.learning_rate",
) -> Trained:
    """Train `network` in place and give back the weights of the best epoch by validation top-1 (loss breaks ties).

    Args:
        network: takes `[N, 3, S, S]`, gives logits `[N, classes]`.
        constraint: a pruner's; only epochs at whose end it is met may be chosen.
        distillation: its teacher is moved to the device, frozen, and sees the very batches that the network sees.
        epochs: `(first, last)` trains only the epochs [first, last) of the whole, counted from 0: their learning
            rates, images and steps are those of an uninterrupted training; the optimizer's state and the weight average
            begin afresh. A training in two phases may so change the network in between.
        keep: `last` gives back the weights from which training would go on after the last epoch, not their average.
        checkpoints: a folder of this very training, from `checkpoint_folder`; the last epoch in it is
            continued.
        rate_key: of the learning rate in the params, for messages.

    Raises:
        UserError: if the loss becomes NaN or infinite, if no epoch meets the constraint, if memory or disk run out, or
            if the network does not take images of this size.
    """
    first, last = epochs or (0, recipe.epochs)
    if not 0 <= first < last <= recipe.epochs:
        raise ValueError(f"epochs [{first}, {last}) do not lie within the recipe's {recipe.epochs}")
    device = prepare_host(base)
    with clear_memory_errors(f"{title}: batch_size {recipe.batch_size}"), clear_compile_errors(title):
        run = _Run(network, train_part, preprocess, recipe, device, seed, title, constraint, distillation, rate_key)
        curve: list[dict[str, float]] = []
        chosen: dict[str, Any] = {}
        if checkpoints is not None and (saved := load_checkpoint(checkpoints)):
            if saved["epochs"] != [first, last]:
                raise ValueError(f"{checkpoints} belongs to epochs {saved['epochs']}: each phase needs its own folder")
            curve, chosen = saved["curve"], saved["chosen"]
            run.load_state_dict(saved["run"])

        done, spacing, small = first + len(curve), Spacing(), run.early_epochs()
        with epoch_progress(title, recipe.epochs, run.batches, done, small) as progress, _told_what_is_kept(progress):
            for epoch in range(done, last):
                started = time.perf_counter()
                loss = run.train_epoch(epoch, progress)
                seconds = time.perf_counter() - started
                candidate = run.candidate()
                logits = run.predict(candidate, validation_part, run.bfloat16)
                validation_loss = _cross_entropy(logits, validation_part.labels)
                curve.append(
                    {
                        "epoch": epoch + 1,
                        "learning_rate": round(recipe.learning_rate * run.factor(run.last_step(epoch)), 8),
                        "training_loss": round(loss, 6),
                        "validation_loss": round(validation_loss, 6),
                        "validation_top1": round(top1(logits, validation_part.labels), 6),
                        "images_per_second": round(run.batches * min(recipe.batch_size, len(train_part)) / seconds, 1),
                        "seconds": round(time.perf_counter() - started, 2),
                    }
                )
                score = [curve[-1]["validation_top1"], -validation_loss]
                if keep == "last":
                    candidate, wanted = network, epoch + 1 == last
                else:
                    wanted = not chosen or score > chosen["score"]
                if wanted and (constraint is None or constraint.met_after(run.last_step(epoch))):
                    weights = {name: tensor.detach().cpu().clone() for name, tensor in candidate.state_dict().items()}
                    chosen = {"epoch": epoch + 1, "score": score, "weights": weights}
                finished = epoch + 1 == last
                if checkpoints is not None and distributed.is_main_process() and (finished or spacing.due()):
                    state = {"epochs": [first, last], "curve": curve, "chosen": chosen}
                    with spacing.measured():
                        save_checkpoint(checkpoints, state | {"run": run.state_dict(finished)})
                    progress.kept = epoch + 1
                progress.epoch(loss, curve[-1]["validation_top1"], curve[-1]["images_per_second"])

        if not chosen:
            raise UserError(
                f"{title}: no epoch ended with the pruning target met: give it more epochs or an earlier end_fraction"
            )
        load_tensors(network, chosen["weights"])
        network.to(memory_format=torch.contiguous_format).eval()
        logits = run.predict(network, validation_part, autocast=False)
        network.cpu()
    return Trained(network, curve, top1(logits, validation_part.labels), chosen["epoch"])


@contextmanager
def _told_what_is_kept(progress: EpochProgress) -> Iterator[None]:
    """Give an interruption the words in which the stage ends."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{progress.title}: {progress.kept} of {progress.epochs} epochs are finished and kept"
        raise KeyboardInterrupt(kept) from None


class _Run:
    """A training under way: the network, what moves it, and the batches that it sees."""

    def __init__(
        self,
        network: nn.Module,
        part: Part,
        preprocess: Preprocess,
        recipe: Finetune,
        device: torch.device,
        seed: int,
        title: str,
        constraint: Constraint | None,
        distillation: Distillation | None,
        rate_key: str,
    ) -> None:
        self.network, self.part, self.recipe, self.device = network, part, recipe, device
        self.seed, self.title, self.rate_key, self.constraint = seed, title, rate_key, constraint
        self.distillation = distillation if distillation is not None and distillation.weight else None
        self.bfloat16 = use_bfloat16(recipe.precision, device)
        _channels_last(network.train().to(device))
        if self.distillation is not None:
            freeze(self.distillation.teacher, network)
            _channels_last(self.distillation.teacher.to(device))
        self.preprocess = copy.deepcopy(preprocess).to(device)
        self.batches, self.steps = steps_per_epoch(recipe, len(part)), steps_in(recipe, len(part))
        self.optimizers = Optimizers(network, recipe)
        self.average = WeightAverage(network, recipe.ema_decay) if recipe.ema_decay else None
        self.images = Images(part, device)
        if recipe.early_input_size:
            _classes(network, recipe.early_input_size, title, "finetune.early_input_size")
        self.classes = _classes(network, preprocess.input_size, title)
        self.augment = Augmentation(recipe, len(part), self.classes, seed)
        self.call = distributed.data_parallel(network, device)
        if recipe.compile:
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # it gives constants
            self.call = torch.compile(self.call, dynamic=False)  # early_input_size makes two sizes: code for each
        elif device.type == "cuda" and distributed.world_size() == 1:
            self.call = Graphed(network, title)

    def train_epoch(self, epoch: int, progress: EpochProgress) -> float:
        """One step for each batch; gives back the mean loss.

        Raises:
            UserError: if it is NaN or infinite.
        """
        total = torch.zeros((), device=self.device)
        for batch, (x, targets) in enumerate(self.batches_of(epoch)):
            total += self.step(epoch * self.batches + batch, x, targets)
            progress.step()
        mean = distributed.all_reduce(total).item() / distributed.world_size() / self.batches
        if not np.isfinite(mean):
            rates = f"{self.rate_key} or {MUON_RATE}" if self.recipe.optimizer == "muon" else self.rate_key
            raise UserError(
                f"{self.title}: the loss became {mean} in epoch {epoch + 1}: lower {rates}; nothing was saved"
            )
        return mean

    def batches_of(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's share of the epoch's images, augmented and in the epoch's own order.

        Images `[N, 3, H, W]`; labels `[N]`, or mixed `[N, classes]`; N is the batch size over the number of processes.
        """
        generator = _seed_epoch(self.seed, epoch)
        order = torch.randperm(len(self.part), generator=generator).numpy()
        size = self.recipe.batch_size
        indices = [order[batch * size : (batch + 1) * size] for batch in range(self.batches)]
        share = share_of(len(indices[0]), distributed.rank(), distributed.world_size())
        batches = self.images.batches(index[share.numpy()] for index in indices)
        for index, (pixels, labels) in zip(indices, batches, strict=True):
            more = {"index": index, "share": share, "epoch": epoch, "generator": generator}
            yield self.augment(pixels, labels, self.preprocess, **more)

    def step(self, step: int, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Move the weights once; gives back the loss, still on the device."""
        self.optimizers.set_factor(self.factor(step))
        loss = self.loss(x, targets, self.input_size(step))
        self.network.zero_grad(set_to_none=True)
        loss.backward()
        if self.constraint is not None:
            self.constraint.before_step(step)
        self.optimizers.step()
        if self.constraint is not None:
            self.constraint.after_step(step)
        if self.average is not None:
            self.average.update_parameters(self.network)
        return loss.detach()

    def loss(self, x: torch.Tensor, targets: torch.Tensor, input_size: int) -> torch.Tensor:
        """Cross entropy with the targets, and where there is a teacher, its softened outputs."""
        teacher_logits = None
        kind = self.device.type  # no layer is called twice, and in a CUDA graph autocast's cache would go stale
        autocast = torch.autocast(kind, dtype=torch.bfloat16, enabled=self.bfloat16, cache_enabled=kind != "cuda")
        with autocast, mended_convolutions(self.device):
            x = self.preprocess.resize(x, input_size)
            if self.distillation is not None:
                with torch.no_grad():
                    teacher_logits = self.distillation.teacher(x)
            logits = self.call(x)
        smoothing = self.recipe.label_smoothing if targets.dim() == 1 else 0.0  # mixed targets are smooth already
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if teacher_logits is None:
            return loss
        weight, temperature = self.distillation.weight, self.distillation.temperature
        return (1 - weight) * loss + weight * soft_loss(logits, teacher_logits, temperature)

    def input_size(self, step: int) -> int:
        """To which the step's images are scaled."""
        early = self.recipe.early_input_size
        return early if early and step < self.recipe.early_fraction * self.steps else self.preprocess.input_size

    def early_epochs(self) -> tuple[float, float]:
        """How many epochs see smaller images, and what share of the others' pixels those have."""
        early = self.recipe.early_input_size
        if not early:
            return 0, 1
        return self.recipe.early_fraction * self.recipe.epochs, (early / self.preprocess.input_size) ** 2

    def factor(self, step: int) -> float:
        """Of the peak learning rates."""
        return schedule(step, self.steps, self.recipe)

    def last_step(self, epoch: int) -> int:
        return (epoch + 1) * self.batches - 1

    def candidate(self) -> nn.Module:
        """What would be kept now: the network, or its average put on the constraint."""
        if self.average is None:
            return self.network
        if self.constraint is None:
            return self.average.module
        average = copy.deepcopy(self.average.module)
        self.constraint.project(average)
        return average

    def predict(self, network: nn.Module, part: Part, autocast: bool) -> np.ndarray:
        """Logits `[N, classes]`, in bfloat16 or in float32; every process computes some of them and gets all."""
        classifier = Classifier(self.preprocess, network)
        bounds = [len(part) * rank // distributed.world_size() for rank in range(distributed.world_size() + 1)]
        mine = slice(bounds[distributed.rank()], bounds[distributed.rank() + 1])
        batch_size = EVALUATION_BATCH * (4 if self.device.type == "cuda" else 1)  # there launches take the time
        logits = torch.zeros(len(part), self.classes, device=self.device)
        if mine.start < mine.stop:
            found = predict_logits(classifier, part.images[mine], batch_size, self.device, autocast)
            logits[mine] = torch.from_numpy(found).to(self.device)
        return distributed.all_reduce(logits).cpu().numpy()

    def state_dict(self, finished: bool) -> dict[str, Any]:
        """All that an unfinished training goes on from; of a finished one only where the constraint came to."""
        state: dict[str, Any] = {}
        if self.constraint is not None:
            state["constraint"] = self.constraint.state_dict()
        if not finished:
            state |= {"network": self.network.state_dict(), "optimizers": self.optimizers.state_dict()}
            if self.average is not None:
                state["average"] = self.average.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


def _channels_last(network: nn.Module) -> None:
    """Lay out its weights for images; torch's own `to` stumbles over three-dimensional convolutions."""
    for weights in network.parameters():
        if weights.dim() == 4:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _classes(network: nn.Module, input_size: int, title: str, key: str = "input_size") -> int:
    """The number of logits, by one pass in evaluation mode: in training mode it would move running statistics.

    Raises:
        UserError: if the network does not take images of this size, or gives something other than logits.
    """
    network.eval()
    try:
        logits = network(torch.zeros(2, 3, input_size, input_size, device=next(network.parameters()).device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{title}: the network does not take {key} {input_size} ({reason}): choose another") from None
    network.train()
    if problem := more_than_logits(network, logits):
        raise UserError(f"{title}: the network {problem}")
    return logits.shape[1]


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    return F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()


def _seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed all global generators (dropout, timm's mixing) and give one for order and augmentation.

    Dropout's draws are each process's own; all others are the same in all.
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed + distributed.rank())
    return torch.Generator().manual_seed(mixed)
