"""The trainer that fine-tuning, pruning and recovery share: epochs over stored images, resumable after any kill.

All random numbers of an epoch come from generators seeded by (seed, epoch), so that a resumed training ends, on the
CPU, bit for bit where the uninterrupted one does. Several processes (`training.distributed`) together take the steps
of one process, up to rounding and the random numbers of dropout.
"""

import copy
import random
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.errors import Interruption, UserError
from stages.common.progress import EpochProgress, epoch_progress
from stages.datasets.store import Part
from stages.networks.architectures import more_than_logits
from stages.networks.modules import channels_of, load_tensors, norms_of_one_value
from stages.networks.predict import EVALUATION_BATCH, Accuracy, accuracy_of, predict_logits
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.finetune import Finetune
from stages.training import distributed
from stages.training.augment import Augmentation, positions_of
from stages.training.batches import Images, steps_per_epoch
from stages.training.checkpoint import Spacing, load_checkpoint, save_checkpoint
from stages.training.class_weights import balanced_weights, weighted
from stages.training.constraint import Constraint
from stages.training.convolutions import mended_convolutions
from stages.training.distillation import Distillation, soft_loss
from stages.training.ema import Ema
from stages.training.host import clear_training_errors, use_bfloat16
from stages.training.optimizers import Optimizers, schedule

CURVE_COLUMNS = (
    *("epoch", "learning_rate", "training_loss", "validation_loss", "validation_top1"),
    *("validation_balanced_accuracy", "images_per_second", "seconds"),
)
PROGRESS = ("training_loss", "validation_top1", "validation_balanced_accuracy", "images_per_second")


@dataclass(frozen=True)
class TrainingData:
    """The images of a training and the preprocessing of its network."""

    train: Part
    validation: Part
    preprocess: Preprocess


@dataclass
class Trained:
    """A trained network and the history of its training."""

    network: nn.Module
    """The network on the CPU, in evaluation mode, with the weights of the chosen epoch."""
    curve: list[dict[str, float]]
    """One row of `CURVE_COLUMNS` for each epoch."""
    accuracy: Accuracy
    """Accuracy of the chosen weights on validation images, in float32."""
    epoch: int
    """The chosen epoch, counted from 1."""

    @property
    def validation_top1(self) -> float:
        return self.accuracy.top1


class Trainer:
    """Trains a network in place: the network, the optimizers that move it, and the batches that it sees.

    Args:
        network: maps `[N, C, S, S]` to logits `[N, classes]`; it is moved to `device`.
        constraint: a pruner's; only an epoch at whose end it is met may be chosen.
        distillation: its teacher shares no parameter with the network. It is moved to `device`, frozen, and sees the
            same batches as the network.
        fresh: names of the parameters that did not come from weights; None if none were loaded (see `Optimizers`).
        frozen_batch_norm: batch norm normalizes by its running statistics, and keeps them.
        metric: the validation figure that chooses the epoch, as `report.metric`.
        title: names the training in messages.
        rate_key: names the learning rate in messages.

    Raises:
        UserError: if the network does not take images of this size, does not return logits or does not fit into memory.
    """

    def __init__(
        self,
        network: nn.Module,
        data: TrainingData,
        recipe: Finetune,
        device: torch.device,
        *,
        seed: int = 0,
        constraint: Constraint | None = None,
        distillation: Distillation | None = None,
        fresh: Collection[str] | None = None,
        frozen_batch_norm: bool = False,
        metric: str = "top1",
        title: str = "training",
        rate_key: str = "finetune.learning_rate",
    ) -> None:
        self.network, self.data, self.recipe, self.device, self.seed = network, data, recipe, device, seed
        self.constraint, self.distillation = constraint or Constraint(), distillation
        self.fresh, self.frozen_batch_norm = fresh, frozen_batch_norm
        self.metric, self.title, self.rate_key = metric, title, rate_key
        self.bfloat16 = use_bfloat16(recipe.precision, device)
        self.steps_per_epoch = steps_per_epoch(recipe, len(data.train))
        self.steps = recipe.epochs * self.steps_per_epoch
        with clear_training_errors(title, recipe.batch_size):
            self._prepare()

    def _prepare(self) -> None:
        """Create on the device all that the steps use."""
        network, recipe, device, small = self.network, self.recipe, self.device, self.recipe.progressive_resize
        _to_channels_last(network.train().to(device))
        if self.distillation is not None:
            _to_channels_last(self.distillation.teacher.eval().requires_grad_(False).to(device))
        self.preprocess = copy.deepcopy(self.data.preprocess).to(device)
        self.optimizers = Optimizers(network, recipe, self.fresh)
        self.ema = Ema(network, recipe.ema_decay) if recipe.ema_decay else None
        self.images = Images(self.data.train, device)
        if small:
            _count_classes(network, small.input_size, self.title, "finetune.progressive_resize.input_size")
        self.classes = _count_classes(network, self.preprocess.input_size, self.title, "input_size")
        self._refuse_batches_of_one()
        self.class_weights: torch.Tensor | None = None
        if recipe.class_weights == "balanced":
            self.class_weights = balanced_weights(self.data.train.labels, self.classes).to(device)
        self.augment = Augmentation(recipe, len(self.data.train), self.classes, self.seed)
        self.call = distributed.data_parallel(network, device)
        if recipe.compile:
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # it gives constants
            # CUDA graphs start the hundreds of small kernels of a network on small images in one launch.
            graphs = device.type == "cuda" and distributed.world_size() == 1
            mode = "reduce-overhead" if graphs else "default"
            self.call = torch.compile(self.call, dynamic=False, mode=mode)  # progressive_resize has two fixed shapes

    def fit(
        self,
        epochs: tuple[int, int] | None = None,
        keep: Literal["best", "last"] = "best",
        checkpoints: Path | None = None,
    ) -> Trained:
        """Train and return the weights of the best epoch by the validation metric; the lower loss breaks ties.

        Args:
            epochs: `(first, last)` trains only the epochs [first, last) of the recipe, counted from 0, with the
                learning rates, images and step numbers of an uninterrupted training. A caller may so train in phases
                and change the network in between; each phase has a new trainer, hence a new optimizer and EMA.
            keep: `last` returns the weights after the last epoch, from which training would continue, not their EMA.
            checkpoints: a folder of this training from `checkpoint_folder`; training resumes from its checkpoint.

        Raises:
            UserError: if the loss becomes NaN or infinite, if no epoch meets the constraint, if memory runs out, if
                `torch.compile` fails, or if a checkpoint cannot be written.
        """
        first, last = epochs or (0, self.recipe.epochs)
        if not 0 <= first < last <= self.recipe.epochs:
            raise ValueError(f"epochs [{first}, {last}) do not lie within the recipe's {self.recipe.epochs}")
        curve: list[dict[str, float]] = []
        chosen: dict[str, Any] = {}
        if checkpoints is not None and (saved := load_checkpoint(checkpoints)):
            if saved["epochs"] != [first, last]:
                raise ValueError(f"{checkpoints} belongs to epochs {saved['epochs']}: each phase needs its own folder")
            curve, chosen = saved["curve"], saved["chosen"]
            self.load_state_dict(saved["trainer"])

        done, spacing = first + len(curve), Spacing()
        small, images = self.recipe.progressive_resize, (0.0, 1.0)
        if small:
            images = small.fraction * self.recipe.epochs, (small.input_size / self.preprocess.input_size) ** 2
        with (
            epoch_progress(self.title, self.recipe.epochs, self.steps_per_epoch, done, images) as progress,
            _interruption_names_progress(progress),
            clear_training_errors(self.title, self.recipe.batch_size),
        ):
            for epoch in range(done, last):
                row, candidate = self._run_epoch(epoch, progress)
                curve.append(row)
                finished, end = epoch + 1 == last, (epoch + 1) * self.steps_per_epoch - 1
                score = [row[f"validation_{self.metric}"], -row["validation_loss"]]
                wanted = finished if keep == "last" else not chosen or score > chosen["score"]
                if wanted and self.constraint.met_after(end):
                    kept = self.network if keep == "last" else candidate
                    weights = {name: tensor.detach().cpu().clone() for name, tensor in kept.state_dict().items()}
                    chosen = {"epoch": epoch + 1, "score": score, "weights": weights}
                if checkpoints is not None and distributed.is_main_process() and (finished or spacing.due()):
                    state = {"epochs": [first, last], "curve": curve, "chosen": chosen}
                    with spacing.measured():
                        save_checkpoint(checkpoints, state | {"trainer": self.state_dict(finished)})
                    progress.kept = epoch + 1
                progress.epoch(*(row[key] for key in PROGRESS))

        if not chosen:
            raise UserError(
                f"{self.title}: no epoch ended with the pruning target met: use more epochs or an earlier end_fraction"
            )
        load_tensors(self.network, chosen["weights"])
        self.network.to(memory_format=torch.contiguous_format).eval()
        with clear_training_errors(self.title, self.recipe.batch_size):
            logits = self.predict(self.network, self.data.validation)
        return Trained(self.network.cpu(), curve, accuracy_of(logits, self.data.validation.labels), chosen["epoch"])

    def _run_epoch(self, epoch: int, progress: EpochProgress) -> tuple[dict[str, float], nn.Module]:
        """Train one epoch and validate: the row of `CURVE_COLUMNS`, and the network (or its EMA) that it describes."""
        started = time.perf_counter()
        first = epoch * self.steps_per_epoch
        self._set_training_mode()
        total = torch.zeros((), device=self.device)
        for step, (x, targets) in enumerate(self.batches_of(epoch), first):
            total += self.step(step, x, targets)
            progress.step()
        loss = distributed.all_reduce(total).item() / distributed.world_size() / self.steps_per_epoch
        if not np.isfinite(loss):
            muon = " or finetune.muon_learning_rate" if self.recipe.optimizer == "muon" else ""
            raise UserError(
                f"{self.title}: the loss became {loss} in epoch {epoch + 1}: lower {self.rate_key}{muon}; nothing was"
                " saved"
            )
        seconds = time.perf_counter() - started
        candidate, labels = self._candidate(), self.data.validation.labels
        logits = self.predict(candidate, self.data.validation, self.bfloat16)
        validation_loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
        images = self.steps_per_epoch * min(self.recipe.batch_size, len(self.data.train))
        factor = schedule(first + self.steps_per_epoch - 1, self.steps, self.recipe)
        row = {
            "epoch": epoch + 1,
            "learning_rate": round(self.recipe.learning_rate * factor, 8),
            "training_loss": round(loss, 6),
            "validation_loss": round(validation_loss, 6),
            **{key: round(figure, 6) for key, figure in accuracy_of(logits, labels).metrics.items()},
            "images_per_second": round(images / seconds, 1),
            "seconds": round(time.perf_counter() - started, 2),
        }
        return row, candidate

    def batches_of(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's part of every batch of an epoch, augmented, in the random order of that epoch.

        Images `[N, C, H, W]`, and labels `[N]` or mixed `[N, classes]`; N is the batch size over the world size.
        """
        generator = seed_epoch(self.seed, epoch)
        order, size = torch.randperm(len(self.data.train), generator=generator).numpy(), self.recipe.batch_size
        indices = [order[batch * size : (batch + 1) * size] for batch in range(self.steps_per_epoch)]
        positions = positions_of(len(indices[0]), distributed.rank(), distributed.world_size())
        batches = self.images.batches(index[positions.numpy()] for index in indices)
        for index, (pixels, labels) in zip(indices, batches, strict=True):
            yield self.augment(pixels, labels, self.preprocess, index, positions, epoch, generator)

    def step(self, step: int, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Take one optimizer step on a batch of `batches_of`; return the loss, still on the device."""
        self.optimizers.set_factor(schedule(step, self.steps, self.recipe))
        self.network.zero_grad(set_to_none=True)
        loss = self.loss(x, targets, self.input_size(step))
        loss.backward()
        if self.recipe.gradient_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.gradient_clip)
        self.constraint.before_step(step)
        self.optimizers.step()
        self.constraint.after_step(step)
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        return loss.detach()

    def loss(self, x: torch.Tensor, targets: torch.Tensor, input_size: int) -> torch.Tensor:
        """Cross entropy with the targets, and with a teacher also the distillation loss."""
        distillation = self.distillation
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)
        with autocast, mended_convolutions(self.device):
            x = self.preprocess.resize(x, input_size)
            with torch.no_grad():
                teacher_logits = None if distillation is None else distillation.teacher(x)
            logits = self.call(x)
        smoothing = self.recipe.label_smoothing if targets.dim() == 1 else 0.0  # mixed targets are smoothed already
        if self.class_weights is not None:
            targets, smoothing = weighted(targets, self.class_weights, self.recipe.label_smoothing), 0.0
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        if distillation is None:
            return loss
        soft = soft_loss(logits, teacher_logits, distillation.temperature)
        return (1 - distillation.weight) * loss + distillation.weight * soft

    def _refuse_batches_of_one(self) -> None:
        """Raise a `UserError` if each process trains on one image and batch norm sees one value of each channel."""
        if self.recipe.batch_size > distributed.world_size() or self.frozen_batch_norm:
            return
        if norms := norms_of_one_value(self.network, self.preprocess.input_size):
            raise UserError(
                f"{self.title}: finetune.batch_size = {self.recipe.batch_size}: batch norm ({norms[0]}) sees one value"
                " of each channel and cannot train on one image: use 2 or more"
            )

    def _set_training_mode(self) -> None:
        self.network.train()
        for module in self.network.modules() if self.frozen_batch_norm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def input_size(self, step: int) -> int:
        """Side in pixels to which the images of this step are scaled."""
        small = self.recipe.progressive_resize
        return small.input_size if small and step < small.fraction * self.steps else self.preprocess.input_size

    def _candidate(self) -> nn.Module:
        """The network as an epoch would be kept now: the weights, or their EMA put on the constraint."""
        if self.ema is None:
            return self.network
        average = copy.deepcopy(self.ema.module)
        self.constraint.project(average)
        return average

    def predict(self, network: nn.Module, part: Part, bfloat16: bool = False) -> np.ndarray:
        """Logits `[N, classes]` of a part; the processes share its images, and each returns all logits."""
        classifier, world_size = Classifier(self.preprocess, network), distributed.world_size()
        start, stop = (len(part) * rank // world_size for rank in (distributed.rank(), distributed.rank() + 1))
        batch_size = EVALUATION_BATCH * (4 if self.device.type == "cuda" else 1)  # kernel launches take the time there
        logits = torch.zeros(len(part), self.classes, device=self.device)
        if start < stop:
            found = predict_logits(classifier, part.images[start:stop], batch_size, self.device, bfloat16)
            logits[start:stop] = torch.from_numpy(found).to(self.device)
        return distributed.all_reduce(logits).cpu().numpy()

    def state_dict(self, finished: bool = False) -> dict[str, Any]:
        """The state from which training resumes; a finished training needs only the constraint's."""
        parts: dict[str, Any] = {"constraint": self.constraint}
        if not finished:
            parts |= {"network": self.network, "optimizers": self.optimizers, "ema": self.ema}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


@contextmanager
def _interruption_names_progress(progress: EpochProgress) -> Iterator[None]:
    """Give an interruption, also one that a library turned into another error, the message that ends the stage."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, KeyboardInterrupt) or Interruption.noted):
            raise
        kept = f"{progress.title}: {progress.kept} of {progress.epochs} epochs are finished and kept"
        raise KeyboardInterrupt(kept) from None


def _to_channels_last(network: nn.Module) -> None:
    """Convert 4-D weights to channels-last memory; `Module.to` fails on networks with 3-D convolutions."""
    for weights in network.parameters():
        if weights.dim() == 4:
            weights.data = weights.data.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _count_classes(network: nn.Module, input_size: int, title: str, key: str) -> int:
    """The number of logits, from one pass in evaluation mode, which does not move running statistics.

    Raises:
        UserError: if the network does not take images of this size, or does not return logits.
    """
    network.eval()
    device = next(network.parameters()).device
    try:
        logits = network(torch.zeros(2, channels_of(network), input_size, input_size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{title}: the network does not take {key} {input_size} ({reason}): choose another") from None
    network.train()
    if problem := more_than_logits(network, logits):
        raise UserError(f"{title}: the network {problem}")
    return logits.shape[1]


def seed_epoch(seed: int, epoch: int) -> torch.Generator:
    """Seed all global generators (dropout, timm's mixing) and return one for order and augmentation.

    All draws are the same in every process but for those of dropout.
    """
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed + distributed.rank())
    return torch.Generator().manual_seed(mixed)
