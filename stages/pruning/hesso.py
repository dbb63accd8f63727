"""HESSO, the Hybrid Efficient Structured Sparse Optimizer (arXiv 2409.09085), around any torch optimizer.

The paper states it as an optimizer of its own with SGD or Adam inside. Here the base optimizer steps by itself and
HESSO acts around it.
"""

from typing import Any

import torch

from stages.pruning.steering import ChannelMask, Steering


class Hesso(Steering):
    """Algorithm 1 of the paper, with its "groups" being channels here:

    - warm-up: the base optimizer alone;
    - in each of P pruning periods of T steps, the channels of lowest saliency join the redundant ones, so that after
      period p (counted from 0) the fraction (p + 1) / P of the target is met;
    - hybrid training within a period: important channels follow the base optimizer alone. Redundant ones are forgotten
      progressively: after the base optimizer's step at step t (counted from 0) they are multiplied by
      (T - t - 1) / (T - t). The factors multiply up to a straight line that ends at exactly zero;
    - channels of earlier periods stay zero, whatever the optimizer's momentum does, also in recovery.

    `redundant` holds the channels that the present period forgets.
    """

    _masks: tuple[ChannelMask, ChannelMask] | None = None

    def before_step(self, step: int) -> None:
        """Pick the redundant channels at a period's first step: only there the host waits for the scores."""
        schedule = self.schedule
        if schedule.start <= step < schedule.end and (step - schedule.start) % schedule.length == 0:
            period = (step - schedule.start) // schedule.length
            chosen = self.choose(self.pruned, fraction=(period + 1) / schedule.periods)
            self._set(self.pruned, chosen & ~self.pruned)

    def after_step(self, step: int) -> None:
        """Forget the redundant channels a little more; from a period's last step on they are zero."""
        schedule = self.schedule
        if step < schedule.start or not self.active:
            return
        if self._masks is None:
            keep = ChannelMask(self._parameters, self.groups, ~self.pruned, 1)
            self._masks = keep, ChannelMask(self._parameters, self.groups, self.redundant, 0)
        keep, forget = self._masks
        keep.multiply()
        if step >= schedule.end:
            return
        left = schedule.length - (step - schedule.start) % schedule.length
        forget.subtract(1 / left)
        if left == 1:
            self._set(self.pruned | self.redundant, torch.zeros_like(self.redundant))

    def state_dict(self) -> dict[str, Any]:
        return {"pruned": self.pruned.clone(), "redundant": self.redundant.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set(state["pruned"].cpu().clone(), state["redundant"].cpu().clone())

    def _set(self, pruned: torch.Tensor, redundant: torch.Tensor) -> None:
        self.pruned, self.redundant, self._masks = pruned, redundant, None
