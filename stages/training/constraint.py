"""The interface between a pruner and the trainer: a constraint moves the weights around each step."""

from typing import Any

from torch import nn


class Constraint:
    """The trainer calls it around each optimizer step, counted from 0 over the training. This one does nothing."""

    def before_step(self, step: int) -> None:
        """Called when the gradients are computed and the optimizer has not used them yet."""

    def after_step(self, step: int) -> None:
        """Called when the optimizer has moved the weights."""

    def project(self, network: nn.Module) -> None:
        """Project another copy of the network (the EMA) onto the constraint, in place."""

    def met_after(self, step: int) -> bool:
        """True if the weights after this step meet the target; only such epochs may be chosen as the best."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
