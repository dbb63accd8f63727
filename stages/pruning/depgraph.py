"""Torch-Pruning's dependency-graph pruner (DepGraph, arXiv 2301.12900), as a peer to compare with.

Graph, importance, choice of channels and surgery are the library's. Ours is only the search for the pruning ratio
that meets the target, and reading the result back as a network that an artifact can describe.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.common.params import Depgraph
from stages.networks.build import NetworkSpec, build_network
from stages.networks.reshape import widths_of
from stages.pruning.costs import costs_of

SEARCH_STEPS = 12
"""Halvings of the pruning ratio's interval: 1/4096, finer than one channel of any usual layer."""
LARGEST_RATIO = 0.95
"""Of each layer, so that no layer is emptied (HESSO keeps the same share)."""


def prune_depgraph(
    network: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, key: str
) -> tuple[nn.Module, NetworkSpec]:
    """Remove the same share of the least important channels in every layer, as far as the target asks.

    `group_sparsity` is that share itself; for parameters and MACs the least share that meets the target is searched.

    Args:
        network: what `spec` builds, with layer scale folded; left as it is.
        key: of the pruner in the params, for messages.

    Returns:
        The narrower network, in evaluation mode on the CPU, and the spec that builds it.

    Raises:
        UserError: if the library cannot prune this network, or the target cannot be met.
    """
    dense = copy.deepcopy(network).cpu().eval()

    def at(ratio: float) -> tuple[nn.Module, NetworkSpec]:
        return _pruned(dense, spec, pruner, input_size, ratio)

    [(name, wanted)] = pruner.target.items()
    measure = _reduction(dense, input_size) | {"group_sparsity": lambda _: high}
    narrowest = min(len(m.weight) for m in _layers(dense, input_size)[:-1])
    # A layer of which nothing would be left is not pruned at all by the library: more would then be less.
    low, high = 0.0, min(LARGEST_RATIO, 1 - pruner.divisible_by / narrowest)
    found = at(high)
    if (most := measure[name](found[0])) < wanted:
        raise UserError(
            f"{key}.{name} = {wanted}: at most {int(1000 * most) / 1000} can go, since the same share goes in every"
            f" layer and the narrowest has {narrowest} channels"
        )
    if name == "group_sparsity":
        return at(wanted)
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        tried = at(middle)
        if measure[name](tried[0]) >= wanted:
            high, found = middle, tried
        else:
            low = middle
    return found


class GroupLasso:
    """The library's group-norm regulariser around training (`training.constraint.Constraint`).

    Before each optimizer step, `GroupNormPruner.regularize` adds to the gradient of every channel group's weights
    penalty x gamma_g x weights, where gamma_g grows from 1 for the most important group to 16 for the least
    (arXiv 2301.12900, section 3.3). The channels are removed afterwards, by `prune_depgraph`.

    Args:
        network: its parameters' gradients are changed; it may be moved to another device before the first step.
        last: the penalty acts on the steps before this one.
    """

    def __init__(self, network: nn.Module, pruner: Depgraph, input_size: int, last: int) -> None:
        self._network, self._last = network, last
        self._regularizer = _library_pruner(network, pruner, input_size, pruning_ratio=0.5)

    def before_step(self, step: int) -> None:
        if step < self._last:
            self._regularizer.regularize(self._network)

    def after_step(self, step: int) -> None:
        pass

    def project(self, network: nn.Module) -> None:
        pass

    def met_after(self, step: int) -> bool:
        return step >= self._last - 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _library_pruner(network: nn.Module, pruner: Depgraph, input_size: int, pruning_ratio: float) -> Any:
    import torch_pruning

    device = next(network.parameters()).device
    kind = torch_pruning.pruner.BasePruner
    options: dict[str, Any] = {}
    if pruner.importance == "group_lasso":
        kind, options = torch_pruning.pruner.GroupNormPruner, {"reg": pruner.penalty}
    return kind(
        network,
        torch.zeros(1, 3, input_size, input_size, device=device),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=pruning_ratio,
        max_pruning_ratio=LARGEST_RATIO,
        ignored_layers=_layers(network, input_size)[-1:],
        round_to=pruner.divisible_by,
        **options,
    )


def _layers(network: nn.Module, input_size: int) -> list[nn.Module]:
    """Convolutions and Linear layers in the order in which they run: the last makes the logits."""
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, _, __: ran.append(module))
        for module in network.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    mode = network.training
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, input_size, input_size, device=next(network.parameters()).device))
    network.train(mode)
    for hook in hooks:
        hook.remove()
    return ran


@torch.enable_grad()
def _pruned(
    dense: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, ratio: float
) -> tuple[nn.Module, NetworkSpec]:
    cut = copy.deepcopy(dense)
    try:
        _library_pruner(cut, pruner, input_size, ratio).step()
        widths, layer_norm_widths = widths_of(cut, dense)
        spec = replace(spec, widths=widths, layer_norm_widths=layer_norm_widths, layer_norm=pruner.layer_norm)
        subnet = build_network(spec)
        subnet.load_state_dict(cut.state_dict())
        with torch.no_grad():
            subnet.eval()(torch.zeros(1, 3, input_size, input_size))
    except Exception as error:  # whatever its surgery leaves behind
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{spec.library} {spec.architecture}: Torch-Pruning cannot prune this network ({type(error).__name__}:"
            f" {reason}); use method `oto`"
        ) from None
    return subnet, spec


def _reduction(dense: nn.Module, input_size: int) -> dict[str, Callable[[nn.Module], float]]:
    """By target's name, the share of the dense network's cost that a narrower one saves."""
    whole = costs_of(dense, [], input_size)
    kept = torch.zeros(0, dtype=torch.int64)
    return {
        "params_reduction": lambda network: float(
            1 - costs_of(network, [], input_size).params(kept) / whole.params(kept)
        ),
        "macs_reduction": lambda network: float(1 - costs_of(network, [], input_size).macs(kept) / whole.macs(kept)),
    }
