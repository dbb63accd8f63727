"""Torch-Pruning's dependency-graph pruner (DepGraph, arXiv 2301.12900), as a peer to compare with.

The library builds the graph, measures importance, chooses channels and cuts them. This module searches for the pruning
ratio that meets the target, sets the channels that each layer keeps at least, and reads the result back as a network
that an artifact can describe.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.modules import channels_of, excluded_modules, output_positions
from stages.networks.reshape import widths_of
from stages.networks.spec import NetworkSpec
from stages.params.pruners import Depgraph
from stages.pruning.costs import costs_of
from stages.pruning.steering import PruningSchedule, ScheduledConstraint
from stages.pruning.targets import ROUNDING, least_widths, rounded_down, what_every_layer_keeps

SEARCH_STEPS = 12
"""Halvings of the pruning ratio's interval: 1/4096, finer than one channel of any usual layer."""


@dataclass(frozen=True)
class Layer:
    """A layer whose channels the library prunes, with all that is coupled to them."""

    name: str
    channels: int
    unit: int
    """If the layer is cut, it keeps a multiple of this."""
    least: int
    """Fewest channels that it keeps."""

    def kept(self, ratio: float) -> int:
        """Channels that stay at a pruning ratio."""
        if not ratio:
            return self.channels
        return max(self.least, int(self.channels * (1 - ratio) + ROUNDING) // self.unit * self.unit)

    def ratio(self, ratio: float) -> float:
        """The library's own ratio for this layer: it keeps the whole part of channels x (1 - ratio)."""
        return max(0.0, 1 - (self.kept(ratio) + ROUNDING) / self.channels)


@dataclass(frozen=True)
class TorchPruning:
    """Torch-Pruning for the networks of one spec; every method leaves its argument as it is."""

    spec: NetworkSpec
    """The spec that builds the networks, with layer scale folded."""
    pruner: Depgraph
    input_size: int
    key: str
    """The pruner's place in params.yaml, for messages."""

    def find_ratio(self, network: nn.Module) -> float:
        """The fraction of channels to remove from every layer so that the target is met, as far as each layer has them.

        `group_sparsity` is that fraction itself; for parameters and MACs this searches the least one that meets the
        target. The widths that a fraction leaves do not depend on the weights, so all this is known before training.

        Raises:
            UserError: If the library cannot prune this network, or the target cannot be met.
        """
        dense = copy.deepcopy(network).cpu().eval()
        [(name, wanted)] = self.pruner.target.items()
        if not wanted:
            return 0.0
        layers = self._layers(dense)
        if self.pruner.importance == "group_lasso":
            self._require_regularizable(dense)
        if name == "group_sparsity":
            least = min(layers, key=lambda layer: 1 - layer.least / layer.channels)
            if wanted > (most := 1 - least.least / least.channels) + ROUNDING:
                grouped = least.unit != self.pruner.divisible_by
                raise UserError(
                    f"{self.key}.{name} = {wanted}: at most {rounded_down(most)} can go: the same fraction goes in"
                    f" every layer, and {least.name} keeps {least.least} of its {least.channels} channels, since every"
                    f" layer keeps {what_every_layer_keeps(self.pruner)}"
                    + (f", a multiple of {least.unit} here for its groups" if grouped else "")
                )
            self._cut(dense, layers, wanted)
            return wanted

        def reduction(ratio: float) -> float:
            return 1 - self._cost(self._cut(dense, layers, ratio)[0], name) / whole

        whole = self._cost(dense, name)
        low, high = 0.0, 1.0  # at 1 every layer keeps its least
        if (most := reduction(high)) < wanted - ROUNDING:
            raise UserError(
                f"{self.key}.{name} = {wanted}: at most {rounded_down(most)} can go, since every layer keeps"
                f" {what_every_layer_keeps(self.pruner)}"
            )
        for _ in range(SEARCH_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if reduction(middle) >= wanted - ROUNDING else (middle, high)
        return high

    def prune(self, network: nn.Module, ratio: float) -> tuple[nn.Module, NetworkSpec, dict[str, float]]:
        """Remove the least important channels of every layer.

        Args:
            ratio: From `find_ratio`.

        Returns:
            The narrower network, in evaluation mode on the CPU, the spec that builds it, and the number of channels
            before and after, where channels that can only go together count once.

        Raises:
            UserError: If the library cannot prune this network.
        """
        dense = copy.deepcopy(network).cpu().eval()
        layers = self._layers(dense)
        subnet, smaller = self._cut(dense, layers, ratio)
        before = sum(layer.channels for layer in layers)
        left = sum(len(subnet.get_submodule(layer.name).weight) for layer in layers)
        return subnet, smaller, {"channels_dense": before, "channels": left, "group_sparsity": 1 - left / before}

    def _layers(self, dense: nn.Module) -> list[Layer]:
        """The layers that the library prunes, in its order."""
        names = {module: name for name, module in dense.named_modules()}
        try:
            library = _library_pruner(dense, self.pruner, self.input_size)
            found = library.DG.get_all_groups(library.ignored_layers, library.root_module_types)
            groups = [[dependency.target.module for dependency, _ in group] for group in found]
        except Exception as error:  # its tracing raises errors of many kinds
            raise self._unfit("it cannot follow the network's operations") from error
        layers = []
        for modules in groups:
            channels = len(modules[0].weight)
            # the groups of a grouped convolution lose the same number of channels each
            unit = math.lcm(self.pruner.divisible_by, *(library.out_channel_groups.get(m, 1) for m in modules))
            [least] = least_widths(torch.tensor([channels]), self.pruner).tolist()
            layers.append(Layer(names[modules[0]], channels, unit, min(channels, -(-least // unit) * unit)))
        if not layers:
            also = " outside exclude" if self.pruner.exclude else ""
            raise self._unfit(f"it finds no layer{also} whose channels could go")
        return layers

    def _require_regularizable(self, dense: nn.Module) -> None:
        """Try one step of the library's group lasso, which fails on some grouped convolutions."""
        tried = copy.deepcopy(dense)
        for parameter in tried.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try:
            GroupLasso(tried, self.pruner, self.input_size, PruningSchedule(0, 1, 1)).before_step(0)
        except Exception as error:
            raise UserError(
                f"{self.key} (method depgraph): {self.spec.library} {self.spec.architecture}: Torch-Pruning's group"
                " lasso fails on this network: set importance: magnitude"
            ) from error

    @torch.enable_grad()
    def _cut(self, dense: nn.Module, layers: Sequence[Layer], ratio: float) -> tuple[nn.Module, NetworkSpec]:
        cut = copy.deepcopy(dense)
        try:
            library = _library_pruner(cut, self.pruner, self.input_size, layers, ratio)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                library.step()
            widths, norms = widths_of(cut, dense)
            form = self.pruner.layer_norm
            narrower = replace(self.spec, widths=widths, layer_norm_widths=norms, layer_norm=form)
            subnet = build_network(narrower)
        except Exception as error:  # its surgery raises errors of many kinds
            raise self._unfit(str(error) if isinstance(error, UserError) else "its cut fails") from error
        needed = {name: tuple(tensor.shape) for name, tensor in subnet.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in cut.state_dict().items()}
        if odd := [name for name in needed | given if needed.get(name) != given.get(name)]:
            [name, *_] = odd
            raise self._unfit(f"it leaves {name} with shape {given.get(name)} where {needed.get(name)} is needed")
        subnet.load_state_dict(cut.state_dict())
        try:
            with torch.no_grad():
                subnet.eval()(torch.zeros(1, self.spec.channels, self.input_size, self.input_size))
        except Exception as error:  # the network's own code assumes a size
            raise self._unfit("the network does not run after its cut") from error
        return subnet, narrower

    def _cost(self, network: nn.Module, target: str) -> int:
        costs = costs_of(network, [], self.input_size)
        return costs.params_dense if target == "params_reduction" else costs.macs_dense

    def _unfit(self, reason: str) -> UserError:
        return UserError(
            f"{self.key} (method depgraph): {self.spec.library} {self.spec.architecture}: Torch-Pruning cannot prune"
            f" this network ({reason}): choose another method; l1_unstructured and random_unstructured prune any"
        )


class GroupLasso(ScheduledConstraint):
    """The library's group-norm regularizer around training.

    On the schedule's steps, before the optimizer's, `GroupNormPruner.regularize` adds penalty x gamma_g x weights to
    the gradient of every channel group's weights, where gamma_g goes from 1 for the most important channel of a layer
    to 16 for the least (arXiv 2301.12900, section 3.3). `TorchPruning.prune` removes channels afterwards.

    Args:
        network: Its parameters' gradients are changed; it may move to another device before the first step.
    """

    def __init__(self, network: nn.Module, pruner: Depgraph, input_size: int, schedule: PruningSchedule) -> None:
        super().__init__(schedule)
        self._network, self._regularizer = network, _library_pruner(network, pruner, input_size)

    def before_step(self, step: int) -> None:
        if self.schedule.start <= step < self.schedule.end:
            self._regularizer.regularize(self._network)


def _library_pruner(
    network: nn.Module, pruner: Depgraph, input_size: int, layers: Sequence[Layer] = (), ratio: float = 1.0
) -> Any:
    import torch_pruning  # here, since it is slow to import and few pruners need it

    device, weights = next(network.parameters()).device, list(output_positions(network, input_size))  # in their order
    kind = torch_pruning.pruner.BasePruner
    options: dict[str, Any] = {}
    if pruner.importance == "group_lasso":
        kind, options = torch_pruning.pruner.GroupNormPruner, {"reg": pruner.penalty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tensors outside layers: `_cut` checks what becomes of them
        return kind(
            network,
            torch.zeros(1, channels_of(network), input_size, input_size, device=device),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            pruning_ratio_dict={network.get_submodule(layer.name): layer.ratio(ratio) for layer in layers},
            ignored_layers=[
                network.get_submodule(weights[-1].removesuffix(".weight")),  # makes the logits
                *map(network.get_submodule, sorted(excluded_modules(network, pruner.exclude))),
            ],
            in_channel_groups={},  # all its pruners share the defaults, which would keep every network alive
            out_channel_groups={},
            num_heads={},
            **options,
        )
