"""One pruning: what it starts from, how it trains, and what it leaves."""

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from stages.artifacts.description import Description
from stages.datasets.store import Part
from stages.networks.build import NetworkSpec
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier
from stages.networks.reparameterize import fold_layer_scale
from stages.params.finetune import Finetune
from stages.params.pruners import Pruner
from stages.params.whole import Params
from stages.training.constraint import Constraint
from stages.training.distillation import Distillation
from stages.training.host import prepare_host
from stages.training.recipe import recipe_for, schedule, steps_in, steps_per_epoch
from stages.training.trainer import Trained, train


@dataclass
class Pruned:
    """What a pruner leaves."""

    network: nn.Module
    spec: NetworkSpec
    metrics: dict[str, float]
    """Figures on validation images, and counts of what was removed."""
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Session:
    """One pruning of one dense network."""

    params: Params
    key: str
    dense: nn.Module
    """As the dense artifact has it; left as it is."""
    parent: Description
    train_part: Part
    validation_part: Part
    checkpoints: Path | None = None

    @property
    def pruner_name(self) -> str:
        return self.params.pruned[self.key].pruner

    @property
    def pruner(self) -> Pruner:
        return self.params.pruners[self.pruner_name]

    @property
    def param(self) -> str:
        """The pruner's place in params.yaml, for messages."""
        return f"pruners.{self.pruner_name}"

    @property
    def seed(self) -> int:
        return self.params.seed_of(self.parent.model)

    @property
    def input_size(self) -> int:
        return self.parent.input_size

    @cached_property
    def folded(self) -> nn.Module:
        """A copy of the dense network with its layer scale folded: what every pruner that trains starts from, the
        control too, or it would have other parameters."""
        network = copy.deepcopy(self.dense)
        fold_layer_scale(network)
        return network

    @property
    def folded_spec(self) -> NetworkSpec:
        return replace(self.parent.network, layer_scale_folded=True)

    @cached_property
    def recipe(self) -> Finetune:
        return recipe_for(self.params.finetune, self.pruner)

    @property
    def steps(self) -> int:
        """Optimizer steps in the pruner's whole budget."""
        return steps_in(self.recipe, len(self.train_part))

    def learning_rate(self, step: int) -> float:
        return self.recipe.learning_rate * schedule(step, self.steps, self.recipe)

    def epochs_until(self, step: int) -> int:
        """Whole epochs after which `step` steps are done."""
        return -(-step // steps_per_epoch(self.recipe, len(self.train_part)))

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
        """Train `network` in place by the pruner's recipe, or another one (see `training.trainer.train`).

        Args:
            phase: names the checkpoints of a training that is one of several.
        """
        pruner, distillation = self.pruner, None
        if pruner.distillation:
            teacher = copy.deepcopy(self.dense)
            distillation = Distillation(teacher, pruner.distillation, pruner.distillation_temperature)
        checkpoints = self.checkpoints and self.checkpoints / phase
        if checkpoints is not None:
            checkpoints.mkdir(exist_ok=True)
        return train(
            network,
            self.train_part,
            self.validation_part,
            self.parent.preprocess(),
            recipe or self.recipe,
            base=self.params.base,
            seed=self.seed,
            title=f"prune {self.key}",
            constraint=constraint,
            distillation=distillation,
            epochs=epochs,
            keep=keep,
            checkpoints=checkpoints,
            rate_key="finetune.learning_rate" if recipe else f"{self.param}.learning_rate_factor",
        )

    def validation_top1(self, network: nn.Module) -> float:
        """In float32; the network, on the CPU, is left as it is."""
        device = prepare_host(self.params.base)
        classifier = copy.deepcopy(Classifier(self.parent.preprocess(), network)).to(device)
        logits = predict_logits(classifier, self.validation_part.images, EVALUATION_BATCH, device)
        return top1(logits, self.validation_part.labels)
