"""The moving average of the weights that a training goes through."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class WeightAverage(AveragedModel):
    """An exponential moving average whose decay grows with the steps, so that short trainings are averaged too.

    After n updates the decay is min(`decay`, (1 + n) / (10 + n)). torch's own update waits for the device each time.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__(network)
        self._decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the present weights into the average, the first ones as they are; of buffers keep the last values."""
        seen = int(self.n_averaged)  # stays on the CPU
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if seen:
            torch._foreach_lerp_(averaged, current, 1 - min(self._decay, (1 + seen) / (10 + seen)))
        else:
            torch._foreach_copy_(averaged, current)
        if buffers := list(self.module.buffers()):
            torch._foreach_copy_(buffers, list(model.buffers()))
        self.n_averaged += 1
