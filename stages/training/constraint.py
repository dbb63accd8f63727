"""What a pruner adds to training: it steers the weights after each step and says from when on its target is met."""

from typing import Any, Protocol

from torch import nn


class Constraint(Protocol):
    """Called by the loop around each optimizer step; steps count from 0 over the whole training."""

    def before_step(self, step: int) -> None:
        """Gradients are there, the optimizer has not used them yet."""

    def after_step(self, step: int) -> None:
        """The optimizer has moved the weights."""

    def project(self, network: nn.Module) -> None:
        """Put another copy of the network (the weight average) on the constraint, in place."""

    def met_after(self, step: int) -> bool:
        """Whether the weights after this step meet the target: only such epochs may be chosen as the best."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and lists only: it goes into the checkpoint."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
