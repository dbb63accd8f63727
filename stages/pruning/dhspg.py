"""DHSPG, the Dual Half-Space Projected Gradient method (arXiv 2303.06862 and 2312.09411), around any torch optimizer.

The papers state it as an optimizer of its own with SGD or Adam inside. Here the base optimizer steps by itself and its
step is taken for the paper's "gradient estimate or its variant", so that momentum, weight decay and Muon stay torch's.
With nothing to prune it does nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stages.params.pruners import Oto
from stages.pruning.channel_mask import ChannelMask
from stages.pruning.costs import Costs
from stages.pruning.groups import ChannelGroup, by_group, zero_channels
from stages.pruning.hesso import PruningSchedule, pruning_schedule, saliency
from stages.pruning.targets import check_target, choose_channels

AMPLIFIED = 1.1
"""Times lambda_min: where on from the least lambda that shrinks a channel it is chosen (the authors' own value)."""
FORGETTING_SHARE = 0.25
"""Of the pruning phase: its last part, in which channels that are not zero yet are forgotten."""
CHUNK = 2**18
"""Entries that are worked on at once on the CPU: what is between two reads of memory fits into the cache (1 MB)."""


class Dhspg:
    """Drives redundant channels to zero by penalty and projection (`training.constraint.Constraint`).

    Algorithm 3 of arXiv 2303.06862 (the paper's "groups" are channels here):

    - warm-up: the base optimizer alone;
    - when it ends, the saliency scores choose the redundant channels, once, on the target (the set G_p, by
      `pruning.targets.choose_channels`); the important ones (G_np) follow the base optimizer alone, always;
    - each step of the pruning phase then minimises f(x) + sum of lambda_g ||x_g|| over the redundant channels. With x
      before and x' after the base optimizer's step of learning rate alpha, d = (x - x') / alpha stands for the gradient
      of f, and the trial point is x~ = x' - alpha lambda_g x / ||x||. Where d does not shrink the channel by itself
      (cos theta_g < 0, theta_g the angle between d and x), lambda_g is taken between lambda_min = -cos(theta_g) ||d||
      and lambda_max = -||d|| / cos(theta_g): then -d - lambda_g x / ||x|| lies in both half-spaces, those of descent
      for f and for ||x_g||. As the authors do it: 1.1 lambda_min, clipped to [penalty, penalty_limit]; where that
      reaches lambda_max, the middle of the two bounds. Elsewhere any lambda_g > 0 does: `penalty`;
    - half-space projection (from the first step of the phase on): where <x~, x> < epsilon ||x||^2, epsilon being
      `half_space`, the channel becomes exactly zero and stays so;
    - the paper ends with whatever the projection has found. To end exactly on target, channels that are not zero yet
      are forgotten over the last quarter of the phase as in HESSO (arXiv 2409.09085, Algorithm 1): with T steps left,
      this one included, they are multiplied by (T - 1) / T after the above, down to exactly zero at the phase's end.
      This is ours.

    Args:
        network: its parameters are steered; `named_parameters` must hold every name in `groups`. The network may be
            moved to another device before the first step; between the steps of the pruning phase nothing but the base
            optimizer may change the weights (`load_state_dict` here if something must).
        groups: of C channels in all; which of them go is `pruning.targets.choose_channels`'s to say.
        costs: of the network, for the same groups.
        steps: optimizer steps in the whole training.
        key: of the pruner in the params, for messages.
        learning_rate: of each step, counted from 0; with Muon, of all that Muon does not take.

    Raises:
        UserError: if there is no step to prune in, or the target cannot be met.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[ChannelGroup],
        costs: Costs,
        pruner: Oto,
        steps: int,
        key: str,
        learning_rate: Callable[[int], float],
    ) -> None:
        check_target(groups, costs, pruner, key)
        self.groups, self._costs, self._pruner, self._key = list(groups), costs, pruner, key
        self._parameters = dict(network.named_parameters())
        self._learning_rate = learning_rate
        self.active = any(pruner.target.values())
        self.schedule = pruning_schedule(pruner, steps, key) if self.active else PruningSchedule(0, 0, 0)
        self.redundant = torch.zeros(sum(group.channels for group in groups), dtype=torch.bool)
        """bool `[C]`: the channels to be zero in the end, all groups in one row; none before the phase begins."""
        self._zero = self.redundant
        """bool `[C]`, on the parameters' device: those that are zero already."""
        self._projected = self.redundant
        """bool `[C]`, on the parameters' device: those that the projection took, known when the phase has ended."""
        self._phase: _Phase | None = None
        self._keep: ChannelMask | None = None

    @property
    def pruned(self) -> torch.Tensor:
        """bool `[C]`: channels at zero for good, all groups in one row."""
        return self._zero.cpu()

    @property
    def channels_projected(self) -> int:
        """How many redundant channels the half-space projection took; all others were forgotten."""
        return int(self._projected.sum())

    def before_step(self, step: int) -> None:
        """At the end of the warm-up, choose the redundant channels: only then the host waits for the device."""
        if not self.schedule.start <= step < self.schedule.end:
            return
        if step == self.schedule.start:
            left = torch.ones_like(self.redundant)
            scores = saliency(self.groups, self._parameters, self._pruner.importance, left)
            self.redundant = choose_channels(scores, self.groups, self._costs, self._pruner, key=self._key)
            self._zero = torch.zeros_like(self.redundant)
        if self._phase is None and self.redundant.any():
            self._phase = _Phase(self._parameters, self.groups, self.redundant)
            self._zero = self._zero.to(self._phase.redundant.device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Penalise and project the redundant channels; afterwards keep them at zero."""
        if step < self.schedule.start or not self.active:
            return
        if step >= self.schedule.end:
            if self._keep is None:
                self._keep = ChannelMask(self._parameters, self.groups, ~self.redundant, 1)
            self._keep.multiply()
            return
        phase, pruner = self._phase, self._pruner
        if phase is None:  # the target is less than one channel
            return
        products = phase.products()
        shrink, projected = penalise(
            products, self._learning_rate(step), pruner.penalty, pruner.penalty_limit, pruner.half_space
        )
        self._zero = self._zero | (projected & phase.redundant)
        left, forgetting = self.schedule.end - step, max(1, round(FORGETTING_SHARE * self.schedule.length))
        kept = (left - 1) / left if left <= forgetting else 1.0
        phase.move(shrink, (~self._zero).double() * kept)
        if left == 1:
            self._projected, self._zero, self._phase = self._zero, self.redundant, None

    def project(self, network: nn.Module) -> None:
        """Zero the channels that are zero by now in another copy of the network, in place."""
        if self.active:
            zero_channels(network, self.groups, self.pruned_channels())

    def met_after(self, step: int) -> bool:
        """True from the pruning phase's last step on."""
        return step >= self.schedule.end - 1

    def pruned_channels(self) -> dict[str, torch.Tensor]:
        """For each group by name, bool `[channels]`."""
        return by_group(self.groups, self.pruned)

    def state_dict(self) -> dict[str, Any]:
        return {
            "redundant": self.redundant.clone(),
            "zero": self.pruned.clone(),
            "projected": self._projected.cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.redundant, self._zero, self._projected = (
            state[name].cpu().clone() for name in ("redundant", "zero", "projected")
        )
        self._phase = self._keep = None


class Products(NamedTuple):
    """Of each channel's parameters x before the base optimizer's step and s, the step: float64 `[C]` each."""

    xx: torch.Tensor
    xs: torch.Tensor
    ss: torch.Tensor


def penalise(
    products: Products, learning_rate: float, penalty: float, penalty_limit: float, half_space: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose lambda_g and project (arXiv 2303.06862, section 3.2), in lengths of steps: alpha d = -s.

    Returns:
        shrink, float64 `[C]`: the trial point is x + s - shrink x, with shrink = alpha lambda_g / ||x||; and bool
        `[C]`, whether the half-space projection takes the channel to zero.
    """
    xx, xs, ss = products
    norm = xx.sqrt()
    least = xs / norm  # alpha lambda_min = -cos(theta) ||s||; NaN for a channel that is zero: projected below
    most = ss * norm / xs  # alpha lambda_max = -||s|| / cos(theta)
    low, high = learning_rate * penalty, learning_rate * penalty_limit
    length = (AMPLIFIED * least).clamp(low, high)
    length = torch.where(length < most, length, (least + most) / 2)
    length = torch.where(xs > 0, length, low)
    return length / norm, (xx + xs - length * norm < half_space * xx) | (xx == 0)


class _Phase:
    """The redundant channels' parameters while they are driven to zero: products by channel, and moves in place.

    On the CPU, the rows of redundant channels of each parameter with more than one entry to a row are gathered
    (`_Rows`). Single entries, and off the CPU everything, are laid in one row (`_Flat`): few kernels, no indices. Both
    remember x, the values before the base optimizer's step, and find it again after their own move.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ChannelGroup],
        redundant: torch.Tensor,
        flat: bool | None = None,
    ) -> None:
        rows, whole, offset = [], [], 0
        for group, of_group in zip(groups, by_group(groups, redundant).values(), strict=True):
            for part in group.makes if of_group.any() else ():
                parameter = parameters[part.name]
                matrix = _as_rows(parameter)
                channels = torch.arange(group.channels).repeat_interleave(part.repeat)
                together = matrix.shape[1] == 1 or (parameter.device.type != "cpu" if flat is None else flat)
                (whole if together else rows).append((matrix, channels + offset))
            offset += group.channels
        device = next(iter(parameters.values())).device
        self.redundant = redundant.to(device)
        self._stores: list[_Rows | _Flat] = [_Rows(rows, redundant)] if rows else []
        self._stores += [_Flat(whole)] if whole else []
        channels = torch.cat([store.channels for store in self._stores])
        order = channels.argsort(stable=True)
        self._order = order.to(device)
        self._lengths = channels.bincount(minlength=len(redundant)).to(device)

    def products(self) -> Products:
        """The three inner products of each channel; those of important channels may be left out, as zeros."""
        rows = torch.cat([store.products() for store in self._stores])[self._order]
        found = torch.segment_reduce(rows.double(), "sum", lengths=self._lengths, axis=0, unsafe=True)
        return Products(*found.unbind(1))

    def move(self, shrink: torch.Tensor, kept: torch.Tensor) -> None:
        """Put each redundant channel to (x' - shrink x) kept; `[C]` both. Important ones stay at x'."""
        shrink = torch.where(self.redundant & (kept != 0), shrink, 0.0)
        kept = torch.where(self.redundant, kept, 1.0)
        for store in self._stores:
            store.move(shrink, kept)


class _Rows:
    """The redundant rows of matrices on the CPU."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], redundant: torch.Tensor) -> None:
        self._chunks, channels = [], []
        for matrix, of_row in parts:
            rows = redundant[of_row].nonzero().flatten()
            channels.append(of_row[rows])
            for some in rows.split(max(1, CHUNK // matrix.shape[1])):
                self._chunks.append((matrix, some, matrix.index_select(0, some)))
        self._sizes = [len(rows) for _, rows, _ in self._chunks]
        self.channels = torch.cat(channels)
        """int64 `[R]`: of each row."""

    def products(self) -> torch.Tensor:
        """`[R, 3]`."""
        return _finish([_row_products(x, matrix.index_select(0, rows).sub_(x)) for matrix, rows, x in self._chunks])

    def move(self, shrink: torch.Tensor, kept: torch.Tensor) -> None:
        factors = _of_rows(shrink, kept, self.channels, self._sizes, self._chunks[0][0].dtype)
        for (matrix, rows, x), (of_x, of_moved) in zip(self._chunks, factors, strict=True):
            x.mul_(of_x).addcmul_(matrix.index_select(0, rows), of_moved)
            matrix.numpy()[rows.numpy()] = x.numpy()  # takes half of index_copy_'s time: that goes entry by entry


class _Flat:
    """Whole matrices laid in one row, those of equal width side by side, so that each width takes one kernel."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        parts = sorted(parts, key=lambda part: part[0].shape[1])
        self._matrices = [matrix for matrix, _ in parts]
        self.channels = torch.cat([of_row for _, of_row in parts])
        """int64 `[R]`: of each row."""
        self._channels = self.channels.to(self._matrices[0].device)
        rows: dict[int, int] = {}
        for matrix in self._matrices:
            rows[matrix.shape[1]] = rows.get(matrix.shape[1], 0) + len(matrix)
        self._rows = rows
        self._before, self._x = self._lay()
        self._after, self._moved = self._lay()
        torch._foreach_copy_(self._before, self._matrices)

    def _lay(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """An empty row, seen as the matrices and as one block `[rows, width]` for each width."""
        sizes = [matrix.numel() for matrix in self._matrices]
        row = self._matrices[0].new_empty(sum(sizes))
        pieces = row.split(sizes)
        blocks = row.split([count * width for width, count in self._rows.items()])
        return (
            [piece.view_as(matrix) for piece, matrix in zip(pieces, self._matrices, strict=True)],
            [block.view(-1, width) for block, width in zip(blocks, self._rows, strict=True)],
        )

    def products(self) -> torch.Tensor:
        """`[R, 3]`."""
        torch._foreach_copy_(self._after, self._matrices)
        return _finish([_row_products(x, moved - x) for x, moved in zip(self._x, self._moved, strict=True)])

    def move(self, shrink: torch.Tensor, kept: torch.Tensor) -> None:
        factors = _of_rows(shrink, kept, self._channels, [*self._rows.values()], self._matrices[0].dtype)
        for x, moved, (of_x, of_moved) in zip(self._x, self._moved, factors, strict=True):
            x.mul_(of_x).addcmul_(moved, of_moved)
        torch._foreach_copy_(self._matrices, self._before)


def _row_products(x: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """||x||, <x, step> and ||step|| of each row; `step` is spent."""
    length = torch.linalg.vector_norm(step, dim=1)
    return torch.linalg.vector_norm(x, dim=1), step.mul_(x).sum(1), length


def _finish(found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    norms, products, lengths = (torch.cat(column) for column in zip(*found, strict=True))
    return torch.stack([norms.square(), products, lengths.square()], 1)


def _of_rows(
    shrink: torch.Tensor, kept: torch.Tensor, channels: torch.Tensor, sizes: list[int], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each run of rows, the factors `[rows, 1]` of x and x' in (x' - shrink x) kept."""
    of_x, of_moved = ((-shrink * kept).to(dtype)[channels, None], kept.to(dtype)[channels, None])
    return list(zip(of_x.split(sizes), of_moved.split(sizes), strict=True))


def _as_rows(parameter: nn.Parameter) -> torch.Tensor:
    """`[axis 0, all else]` over the same memory, in its order."""
    weight = parameter.detach()
    inner = sorted(range(1, weight.dim()), key=lambda axis: -weight.stride(axis))
    rows = weight.permute(0, *inner).reshape(len(weight), -1)
    if rows.data_ptr() != weight.data_ptr():
        raise RuntimeError("a weight's rows are not dense in memory: DHSPG would move a copy of it")
    return rows
