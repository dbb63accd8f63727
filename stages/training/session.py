"""A session changes one network: it prunes the network of a dense artifact, or quantizes that of a pruned one."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stages.artifacts.description import Description
from stages.datasets.store import Part
from stages.networks.predict import EVALUATION_BATCH, Accuracy, accuracy_of, predict_logits
from stages.networks.preprocess import Classifier
from stages.params.base import Base
from stages.params.budget import Budget
from stages.params.finetune import Finetune
from stages.params.section import Section
from stages.training.batches import steps_per_epoch
from stages.training.class_weights import refuse_empty_classes
from stages.training.constraint import Constraint
from stages.training.distillation import Distillation
from stages.training.host import prepare_host
from stages.training.optimizers import schedule
from stages.training.trainer import Trained, Trainer, TrainingData


@dataclass
class Session:
    """One network from its parent artifact, and one entry of params.yaml that says how to change it."""

    stage: Literal["prune", "quantize"]
    key: str
    """Name of the artifact that the session makes: an entry of `pruned` or `variants`."""
    network: nn.Module
    """The parent's network, on the CPU. Nothing changes it: sessions work on copies."""
    parent: Description
    settings: Section
    """The entry of `pruners` or `quantizers`; a session trains only if it is a `Budget`."""
    param: str
    """The place of `settings` in params.yaml, for messages: `pruners.oto50`."""
    base: Base
    finetune: Finetune
    train_part: Part
    validation_part: Part
    checkpoints: Path | None = None
    metric: str = "top1"
    """The validation figure that chooses, as `report.metric`."""

    @property
    def seed(self) -> int:
        return self.parent.seed

    @property
    def input_size(self) -> int:
        return self.parent.input_size

    @property
    def classifier(self) -> Classifier:
        return Classifier(self.parent.preprocess(), self.network).eval()

    @property
    def _budget(self) -> Budget:
        assert isinstance(self.settings, Budget), f"{self.param} does not train"
        return self.settings

    @cached_property
    def recipe(self) -> Finetune:
        """The recipe of `finetune` with the epochs and the learning rate factor of `settings`."""
        budget = self._budget
        changes: dict[str, Any] = {"epochs": budget.epochs, "progressive_resize": None}  # trained for the full size
        for name in ("learning_rate", "muon_learning_rate"):
            changes[name] = getattr(self.finetune, name) * budget.learning_rate_factor
        return self.finetune.model_copy(update=changes)

    @property
    def frozen_batch_norm(self) -> bool:
        """True if batch norm keeps the statistics of the network's initial weights, in pruning as in fine-tuning."""
        return self.parent.fresh is not None and self.finetune.pretrained.batch_norm == "frozen"

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole recipe."""
        return self.recipe.epochs * steps_per_epoch(self.recipe, len(self.train_part))

    def learning_rate(self, step: int) -> float:
        return self.recipe.learning_rate * schedule(step, self.steps, self.recipe)

    def epochs_until(self, step: int) -> int:
        """Number of whole epochs after which `step` steps are done."""
        return -(-step // steps_per_epoch(self.recipe, len(self.train_part)))

    def identity(self) -> dict[str, Any]:
        """All that determines the result: a checkpoint of another identity is not continued."""
        return {
            "parent": self.parent.tensors,
            "data": self.parent.data,
            "settings": self.settings.model_dump(),
            "finetune": self.finetune.model_dump(),
            "base": self.base.model_dump(),
            "metric": self.metric,
            "seed": self.seed,
        }

    def train(
        self,
        network: nn.Module,
        constraint: Constraint | None = None,
        *,
        epochs: tuple[int, int] | None = None,
        keep: Literal["best", "last"] = "best",
        phase: str = "",
        recipe: Finetune | None = None,
    ) -> Trained:
        """Train `network` in place (see `training.trainer`), with the parent's network as the teacher of distillation.

        Args:
            phase: Names the checkpoints of a training that is one of several.
            recipe: Replaces the session's recipe.
        """
        budget, distillation = self._budget, None
        if self.finetune.class_weights == "balanced":
            refuse_empty_classes(self.train_part.labels, self.parent.classes)
        if budget.distillation:
            teacher = copy.deepcopy(self.network)
            distillation = Distillation(teacher, budget.distillation, budget.distillation_temperature)
        checkpoints = self.checkpoints and self.checkpoints / phase
        if checkpoints is not None:
            checkpoints.mkdir(exist_ok=True)
        trainer = Trainer(
            network,
            TrainingData(self.train_part, self.validation_part, self.parent.preprocess()),
            recipe or self.recipe,
            prepare_host(self.base),
            seed=self.seed,
            constraint=constraint,
            distillation=distillation,
            fresh=None if recipe else self.parent.fresh,
            frozen_batch_norm=recipe is None and self.frozen_batch_norm,
            metric=self.metric,
            title=f"{self.stage} {self.key}",
            rate_key="finetune.learning_rate" if recipe else f"{self.param}.learning_rate_factor",
        )
        return trainer.fit(epochs, keep, checkpoints)

    def accuracy(self, network: nn.Module) -> Accuracy:
        """Accuracy on the validation images in float32. The network, on the CPU, stays as it is."""
        device = prepare_host(self.base)
        classifier = copy.deepcopy(Classifier(self.parent.preprocess(), network)).to(device)
        logits = predict_logits(classifier, self.validation_part.images, EVALUATION_BATCH, device)
        return accuracy_of(logits, self.validation_part.labels)
