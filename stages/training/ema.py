"""The exponential moving average (EMA) of the weights during training."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Ema(AveragedModel):
    """torch's `AveragedModel` with a decay that rises, so that the average of a short training is useful too.

    After n updates the decay is min(`decay`, (1 + n) / (10 + n)). torch's own update waits for the device in each step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the current weights; the first update copies them. Buffers are always copied."""
        updates = int(self.n_averaged)  # a CPU tensor
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if updates:
            torch._foreach_lerp_(averaged, current, 1 - min(self._decay, (1 + updates) / (10 + updates)))
        else:
            torch._foreach_copy_(averaged, current)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
        self.n_averaged += 1
