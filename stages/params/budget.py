"""The training budget, which pruners and quantizers that train share."""

from typing import Annotated

from pydantic import Field

from stages.params.section import Count, Positive, Section


class Budget(Section):
    """A training after fine-tuning. Everything else in its recipe is `finetune`'s."""

    epochs: Count
    """Length of the training. Unit: epochs."""
    learning_rate_factor: Positive
    """Factor on `finetune`'s learning rates at the peak of the schedule."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the distillation loss (arXiv 1503.02531), which compares the softened outputs with those of the parent
    network; 0 trains on labels only."""
    distillation_temperature: Annotated[float, Field(ge=0.1, le=100)] = 2.0
    """Temperature that softens both outputs. Only with `distillation` above 0."""

    @property
    def budget(self) -> tuple[int, float, float, float]:
        """The settings that two trainings must share to be compared: epochs, factor, distillation, temperature."""
        temperature = self.distillation_temperature if self.distillation else 0.0
        return self.epochs, self.learning_rate_factor, self.distillation, temperature
