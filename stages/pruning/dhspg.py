"""DHSPG, the Dual Half-Space Projected Gradient method (arXiv 2303.06862 and 2312.09411), around any torch optimizer.

The papers state it as an optimizer of its own with SGD or Adam inside. Here the base optimizer steps by itself, and its
step takes the place of the paper's "gradient estimate or its variant".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stages.params.pruners import Oto
from stages.pruning.costs import Costs
from stages.pruning.groups import ChannelGroup, by_group
from stages.pruning.steering import ChannelMask, Steering

AMPLIFIED = 1.1
"""Factor of lambda_min, the least lambda that shrinks a channel, that gives the lambda used (the authors' value)."""
FORGETTING_FRACTION = 0.25
"""Last fraction of the pruning phase, in which channels that are not zero yet are forgotten."""
CHUNK = 2**18
"""Entries processed at once on the CPU: intermediate results of this size (1 MB) fit into the cache."""


class Dhspg(Steering):
    """Algorithm 3 of arXiv 2303.06862, with its "groups" being channels here:

    - warm-up: the base optimizer alone;
    - when it ends, the saliency scores choose the redundant channels, once, on the target (the set G_p). The important
      ones (G_np) always follow the base optimizer alone;
    - each step of the pruning phase then minimizes f(x) + sum of lambda_g ||x_g|| over the redundant channels. With x
      before and x' after the base optimizer's step of learning rate alpha, d = (x - x') / alpha stands for the gradient
      of f, and the trial point is x~ = x' - alpha lambda_g x / ||x||. Where d does not shrink the channel by itself
      (cos theta_g < 0, theta_g the angle between d and x), lambda_g is taken between lambda_min = -cos(theta_g) ||d||
      and lambda_max = -||d|| / cos(theta_g): then -d - lambda_g x / ||x|| lies in both half-spaces, those of descent
      for f and for ||x_g||. As the authors do it: 1.1 lambda_min, clipped to [penalty, penalty_limit]; where that
      reaches lambda_max, the middle of the two bounds. Elsewhere any lambda_g > 0 works: `penalty`;
    - half-space projection (from the first step of the phase on): where <x~, x> < epsilon ||x||^2, epsilon being
      `half_space`, the channel becomes exactly zero and stays so;
    - the paper ends with whatever the projection has found. To end exactly on target, this implementation forgets the
      channels that are not zero yet over the last quarter of the phase as HESSO does (arXiv 2409.09085, Algorithm 1):
      with T steps left, this one included, they are multiplied by (T - 1) / T after the above, down to exactly zero at
      the phase's end.

    Between the steps of the pruning phase only the base optimizer may change the weights (call `load_state_dict` after
    any other change). `pruned` is on the parameters' device during the phase.

    Args:
        learning_rate: Learning rate of each step, counted from 0. With Muon, that of the parameters it does not take.
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
        super().__init__(network, groups, costs, pruner, steps, key)
        self._learning_rate = learning_rate
        self._projected = self.redundant
        """bool `[C]`: channels that the projection took, known when the phase has ended."""
        self._phase: _Phase | None = None
        self._keep: ChannelMask | None = None

    @property
    def channels_projected(self) -> int:
        """Number of redundant channels that the half-space projection took; all others were forgotten."""
        return int(self._projected.sum())

    def before_step(self, step: int) -> None:
        """Choose the redundant channels at the end of the warm-up: only there the host waits for the device."""
        if not self.schedule.start <= step < self.schedule.end:
            return
        if step == self.schedule.start:
            self.pruned = torch.zeros_like(self.redundant)
            self.redundant = self.choose(self.pruned)
        if self._phase is None and self.redundant.any():
            self._phase = _Phase(self._parameters, self.groups, self.redundant)
            self.pruned = self.pruned.to(self._phase.redundant.device)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Penalize and project the redundant channels; after the phase keep them at zero."""
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
        shrink, projected = penalize(
            phase.products(), self._learning_rate(step), pruner.penalty, pruner.penalty_limit, pruner.half_space
        )
        self.pruned = self.pruned | (projected & phase.redundant)
        left, forgetting = self.schedule.end - step, max(1, round(FORGETTING_FRACTION * self.schedule.length))
        kept = (left - 1) / left if left <= forgetting else 1.0
        phase.move(shrink, (~self.pruned).double() * kept)
        if left == 1:
            self._projected, self.pruned, self._phase = self.pruned, self.redundant, None

    def state_dict(self) -> dict[str, Any]:
        found = {"redundant": self.redundant, "pruned": self.pruned, "projected": self._projected}
        return {name: channels.cpu().clone() for name, channels in found.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = ("redundant", "pruned", "projected")
        self.redundant, self.pruned, self._projected = (state[name].cpu().clone() for name in names)
        self._phase = self._keep = None


class Products(NamedTuple):
    """Inner products of each channel's parameters x before the base optimizer's step and the step s, float64 `[C]`."""

    xx: torch.Tensor
    xs: torch.Tensor
    ss: torch.Tensor


def penalize(
    products: Products, learning_rate: float, penalty: float, penalty_limit: float, half_space: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose lambda_g and project (arXiv 2303.06862, section 3.2), with alpha d = -s.

    Returns:
        float64 `[C]`, shrink = alpha lambda_g / ||x||: the trial point is x + s - shrink x; and bool `[C]`, whether the
        half-space projection sets the channel to zero.
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

    On the CPU, `_Rows` gathers the rows of redundant channels from each parameter with more than one entry to a row.
    `_Flat` lays single entries, and everything on other devices, in one row, which takes few kernels and no indices.
    Both hold x, the values before the base optimizer's step, and update it with their own move.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[ChannelGroup],
        redundant: torch.Tensor,
        flat: bool | None = None,
    ) -> None:
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        whole: list[tuple[torch.Tensor, torch.Tensor]] = []
        offset = 0
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
        """The inner products of each channel; those of important channels may be zeros instead."""
        rows = torch.cat([store.products() for store in self._stores])[self._order]
        found = torch.segment_reduce(rows.double(), "sum", lengths=self._lengths, axis=0, unsafe=True)
        return Products(*found.unbind(1))

    def move(self, shrink: torch.Tensor, kept: torch.Tensor) -> None:
        """Set each redundant channel to (x' - shrink x) kept, both `[C]`. Important ones stay at x'."""
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
        """int64 `[R]`: the channel of each row."""

    def products(self) -> torch.Tensor:
        """`[R, 3]`."""
        return _finish([_row_products(x, matrix.index_select(0, rows).sub_(x)) for matrix, rows, x in self._chunks])

    def move(self, shrink: torch.Tensor, kept: torch.Tensor) -> None:
        factors = _of_rows(shrink, kept, self.channels, self._sizes, self._chunks[0][0].dtype)
        for (matrix, rows, x), (of_x, of_moved) in zip(self._chunks, factors, strict=True):
            x.mul_(of_x).addcmul_(matrix.index_select(0, rows), of_moved)
            matrix.numpy()[rows.numpy()] = x.numpy()  # in half the time of index_copy_, which copies entry by entry


class _Flat:
    """Whole matrices in one row of memory, those of equal width side by side, so that each width takes one kernel."""

    def __init__(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        parts = sorted(parts, key=lambda part: part[0].shape[1])
        self._matrices = [matrix for matrix, _ in parts]
        self.channels = torch.cat([of_row for _, of_row in parts])
        """int64 `[R]`: the channel of each row."""
        self._channels = self.channels.to(self._matrices[0].device)
        rows: dict[int, int] = {}
        for matrix in self._matrices:
            rows[matrix.shape[1]] = rows.get(matrix.shape[1], 0) + len(matrix)
        self._rows = rows
        self._before, self._x = self._lay()
        self._after, self._moved = self._lay()
        torch._foreach_copy_(self._before, self._matrices)

    def _lay(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """An empty row, viewed as the matrices and as one block `[rows, width]` for each width."""
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
    """||x||, <x, step> and ||step|| of each row; `step` is overwritten."""
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
    """A view `[axis 0, all else]` of the same memory, in its order."""
    weight = parameter.detach()
    inner = sorted(range(1, weight.dim()), key=lambda axis: -weight.stride(axis))
    rows = weight.permute(0, *inner).reshape(len(weight), -1)
    if rows.data_ptr() != weight.data_ptr():
        raise RuntimeError("the rows of a weight are not dense in memory: DHSPG would change a copy")
    return rows
