"""Torch-Pruning's dependency-graph pruner (DepGraph, arXiv 2301.12900), as a peer to compare with.

Graph, importance, choice of channels and surgery are the library's. Ours is only the search for the pruning ratio
that meets the target, the channels that each layer keeps at least, and reading the result back as a network that an
artifact can describe.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import NetworkSpec, build_network
from stages.networks.reshape import widths_of
from stages.params.pruners import Depgraph
from stages.pruning.costs import costs_of
from stages.pruning.targets import ROUNDING, least_widths, rounded_down, what_every_layer_keeps

SEARCH_STEPS = 12
"""Halvings of the pruning ratio's interval: 1/4096, finer than one channel of any usual layer."""


@dataclass(frozen=True)
class Layer:
    """A layer whose channels the library prunes, with all that is coupled to them."""

    name: str
    channels: int
    unit: int
    """Where it is cut, it keeps a multiple of this."""
    least: int
    """Channels that it keeps at least."""

    def kept(self, ratio: float) -> int:
        """Channels that stay where the share `ratio` is to go."""
        if not ratio:
            return self.channels
        return max(self.least, int(self.channels * (1 - ratio) + ROUNDING) // self.unit * self.unit)

    def ratio(self, ratio: float) -> float:
        """The library's own ratio for this layer: it keeps the whole part of channels x (1 - ratio)."""
        return max(0.0, 1 - (self.kept(ratio) + ROUNDING) / self.channels)


def find_ratio(network: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, key: str) -> float:
    """The share of channels to remove from every layer so that the target is met, as far as each layer has them.

    `group_sparsity` is that share itself; for parameters and MACs the least share that meets the target is searched.
    Which widths a share leaves does not depend on the weights, so all this is known before any training.

    Args:
        network: what `spec` builds, with layer scale folded; left as it is.
        key: of the pruner in the params, for messages.

    Raises:
        UserError: if the library cannot prune this network, or the target cannot be met.
    """
    dense = copy.deepcopy(network).cpu().eval()
    [(name, wanted)] = pruner.target.items()
    if not wanted:
        return 0.0
    layers = _prunable(dense, spec, pruner, input_size, key)
    if pruner.importance == "group_lasso":
        _require_regularizable(dense, spec, pruner, input_size, key)

    def cut(ratio: float) -> nn.Module:
        return _cut(dense, spec, pruner, input_size, key, layers, ratio)[0]

    if name == "group_sparsity":
        least = min(layers, key=lambda layer: 1 - layer.least / layer.channels)
        if wanted > (most := 1 - least.least / least.channels) + ROUNDING:
            groups = f", a multiple of {least.unit} here for its groups" if least.unit != pruner.divisible_by else ""
            raise UserError(
                f"{key}.{name} = {wanted}: at most {rounded_down(most)} can go: the same share goes in every layer, and"
                f" {least.name} keeps {least.least} of its {least.channels} channels, since every layer keeps"
                f" {what_every_layer_keeps(pruner)}{groups}"
            )
        cut(wanted)
        return wanted
    reduction = _reduction(dense, input_size)[name]
    low, high = 0.0, 1.0  # at which every layer is left with the least it keeps
    if (most := reduction(cut(high))) < wanted - ROUNDING:
        raise UserError(
            f"{key}.{name} = {wanted}: at most {rounded_down(most)} can go, since every layer keeps"
            f" {what_every_layer_keeps(pruner)}"
        )
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        if reduction(cut(middle)) >= wanted - ROUNDING:
            high = middle
        else:
            low = middle
    return high


def prune_depgraph(
    network: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, key: str, ratio: float
) -> tuple[nn.Module, NetworkSpec, dict[str, float]]:
    """Remove the least important channels of every layer.

    Args:
        network: what `spec` builds, with layer scale folded; left as it is.
        ratio: from `find_ratio`.

    Returns:
        The narrower network, in evaluation mode on the CPU, the spec that builds it, and how many channels there were
        and are, those that can only go together counted once.

    Raises:
        UserError: if the library cannot prune this network.
    """
    dense = copy.deepcopy(network).cpu().eval()
    layers = _prunable(dense, spec, pruner, input_size, key)
    subnet, smaller = _cut(dense, spec, pruner, input_size, key, layers, ratio)
    before = sum(layer.channels for layer in layers)
    left = sum(len(subnet.get_submodule(layer.name).weight) for layer in layers)
    return subnet, smaller, {"channels_dense": before, "channels": left, "group_sparsity": 1 - left / before}


def lasso_steps(pruner: Depgraph, steps: int, key: str) -> tuple[int, int]:
    """The steps [first, last) of a training of `steps` on which the group lasso acts.

    Raises:
        UserError: if there is none.
    """
    first, last = round(pruner.start_fraction * steps), round(pruner.end_fraction * steps)
    if first == last:
        raise UserError(
            f"{key}.end_fraction = {pruner.end_fraction}: no step of {steps} lies between start_fraction"
            f" {pruner.start_fraction} and it: raise it or epochs, or lower finetune.batch_size"
        )
    return first, last


class GroupLasso:
    """The library's group-norm regulariser around training (`training.constraint.Constraint`).

    Before each optimizer step, `GroupNormPruner.regularize` adds to the gradient of every channel group's weights
    penalty x gamma_g x weights, where gamma_g goes from 1 for the most important channel of a layer to 16 for the least
    (arXiv 2301.12900, section 3.3). The channels are removed afterwards, by `prune_depgraph`.

    Args:
        network: its parameters' gradients are changed; it may be moved to another device before the first step.
        first, last: the penalty acts on the steps [first, last).
    """

    def __init__(self, network: nn.Module, pruner: Depgraph, input_size: int, first: int, last: int) -> None:
        self._network, self._first, self._last = network, first, last
        self._regularizer = _library_pruner(network, pruner, input_size)

    def before_step(self, step: int) -> None:
        if self._first <= step < self._last:
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


def _library_pruner(
    network: nn.Module, pruner: Depgraph, input_size: int, layers: Sequence[Layer] = (), ratio: float = 1.0
) -> Any:
    import torch_pruning

    device = next(network.parameters()).device
    kind = torch_pruning.pruner.BasePruner
    options: dict[str, Any] = {}
    if pruner.importance == "group_lasso":
        kind, options = torch_pruning.pruner.GroupNormPruner, {"reg": pruner.penalty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors outside layers: what comes of them is looked at afterwards
        return kind(
            network,
            torch.zeros(1, 3, input_size, input_size, device=device),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            pruning_ratio_dict={network.get_submodule(layer.name): layer.ratio(ratio) for layer in layers},
            ignored_layers=_layers(network, input_size)[-1:],
            in_channel_groups={},  # the library's defaults are shared by all its pruners, and keep every network alive
            out_channel_groups={},
            num_heads={},
            **options,
        )


def _prunable(dense: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, key: str) -> list[Layer]:
    """The layers that the library finds to prune, in its order."""
    names = {module: name for name, module in dense.named_modules()}
    try:
        library = _library_pruner(dense, pruner, input_size)
        found = library.DG.get_all_groups(library.ignored_layers, library.root_module_types)
        groups = [[dependency.target.module for dependency, _ in group] for group in found]
    except Exception as error:  # whatever its tracing stumbles over
        raise _unfit(spec, key, "it cannot follow the network's operations") from error
    layers = []
    for modules in groups:
        channels = len(modules[0].weight)
        # the groups of a grouped convolution lose the same number of channels each
        unit = math.lcm(pruner.divisible_by, *(library.out_channel_groups.get(module, 1) for module in modules))
        [least] = least_widths(torch.tensor([channels]), pruner).tolist()
        layers.append(Layer(names[modules[0]], channels, unit, min(channels, -(-least // unit) * unit)))
    if not layers:
        raise _unfit(spec, key, "it finds no layer whose channels could go")
    return layers


def _require_regularizable(dense: nn.Module, spec: NetworkSpec, pruner: Depgraph, input_size: int, key: str) -> None:
    """Try one step of the library's group lasso, which fails on some grouped convolutions."""
    tried = copy.deepcopy(dense)
    for parameter in tried.parameters():
        parameter.grad = torch.zeros_like(parameter)
    try:
        GroupLasso(tried, pruner, input_size, 0, 1).before_step(0)
    except Exception as error:
        raise UserError(
            f"{key} (method depgraph): {spec.library} {spec.architecture}: Torch-Pruning's group lasso fails on this"
            " network: set importance: magnitude"
        ) from error


def _unfit(spec: NetworkSpec, key: str, reason: str) -> UserError:
    return UserError(
        f"{key} (method depgraph): {spec.library} {spec.architecture}: Torch-Pruning cannot prune this network"
        f" ({reason}): choose another method; l1_unstructured and random_unstructured prune any"
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
def _cut(
    dense: nn.Module,
    spec: NetworkSpec,
    pruner: Depgraph,
    input_size: int,
    key: str,
    layers: Sequence[Layer],
    ratio: float,
) -> tuple[nn.Module, NetworkSpec]:
    cut = copy.deepcopy(dense)
    try:
        library = _library_pruner(cut, pruner, input_size, layers, ratio)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.step()
        widths, layer_norm_widths = widths_of(cut, dense)
        narrower = replace(spec, widths=widths, layer_norm_widths=layer_norm_widths, layer_norm=pruner.layer_norm)
        subnet = build_network(narrower)
    except Exception as error:  # whatever its surgery stumbles over or leaves behind
        raise _unfit(spec, key, str(error) if isinstance(error, UserError) else "its cut fails") from error
    needed = {name: tuple(tensor.shape) for name, tensor in subnet.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in cut.state_dict().items()}
    if odd := [name for name in needed | given if needed.get(name) != given.get(name)]:
        name = odd[0]
        raise _unfit(spec, key, f"it leaves {name} with shape {given.get(name)} where {needed.get(name)} is needed")
    subnet.load_state_dict(cut.state_dict())
    try:
        with torch.no_grad():
            subnet.eval()(torch.zeros(1, 3, input_size, input_size))
    except Exception as error:  # sizes that a network's own code takes for granted
        raise _unfit(spec, key, "the network does not run after its cut") from error
    return subnet, narrower


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
