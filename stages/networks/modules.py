"""Operations on any network: replace modules, load tensors by name, count how often each weight is applied."""

import copy
import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from stages.common.errors import UserError

MULTIPLYING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose weight is multiplied with the activations."""


def channels_of(network: nn.Module) -> int:
    """Number of channels of the images that a network takes, as `build_network` notes it."""
    return getattr(network, "image_channels", 3)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`; it takes over the training mode of the module that it replaces."""
    module.train(network.get_submodule(name).training)
    network.set_submodule(name, module)


def excluded_modules(network: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the modules that a pattern names or that lie inside one that it names.

    Raises:
        UserError: If a pattern names no module that holds weights.
    """
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    found: set[str] = set()
    for pattern in patterns:
        roots = [name for name in names if fnmatchcase(name, pattern)]
        if not any(list(network.get_submodule(root).parameters()) for root in roots):
            problem = f"{roots[0]} has no weights" if roots else "names no module of this network"
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            choice = (
                f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(dict(network.named_children()))}"
            )
            raise UserError(f"exclude = {pattern!r}: {problem}; {choice}")
        found |= {name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)}
    return found


def with_twins(network: nn.Module, kind: type, twin_of: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A copy of the network in which `twin_of(module)` replaces every module of class `kind`."""
    copied = copy.deepcopy(network)
    twins: dict[nn.Module, nn.Module] = {}
    for name, module in list(copied.named_modules(remove_duplicate=False)):  # a module that is used twice has two names
        if isinstance(module, kind):
            if module not in twins:
                twins[module] = twin_of(module)
            replace_module(copied, name, twins[module])
    return copied


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor], strict: bool = True) -> None:
    """`network.load_state_dict` for a plain mapping, which carries no module versions.

    Some modules (torchvision's MNASNet) refuse a mapping without versions. The tensors get the network's own versions:
    this program has built and stored them with the same modules.
    """
    state = OrderedDict(tensors)
    state._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict)


@torch.no_grad()
def norms_of_one_value(network: nn.Module, input_size: int) -> list[str]:
    """Names of the batch norms that see one value of each channel of an image, as after global pooling.

    They cannot train on batches of one image. A copy of the network runs once in evaluation mode.
    """
    network = copy.deepcopy(network).eval()
    found: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda norm, inputs, name=name: (
                    found.append(name) if inputs[0][0].numel() == norm.num_features else None
                )
            )
    first = next(network.parameters())
    network(torch.zeros(1, channels_of(network), input_size, input_size, device=first.device, dtype=first.dtype))
    return found


def along_outputs(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """View `values` `[out]` in a shape that broadcasts over a weight `[out, ...]`."""
    return values.view(-1, *[1] * (weight.dim() - 1))


@torch.no_grad()
def output_positions(network: nn.Module, input_size: int) -> dict[str, int]:
    """Count how often each convolution and linear layer applies its weight to one image `[C, input_size, input_size]`.

    A weight's MACs are its numel times this count. A copy of the network runs once in evaluation mode.

    Returns:
        Counts by the weight's name in `named_parameters`, in the order in which the layers first run; layers that the
        pass does not reach are missing.
    """
    network = copy.deepcopy(network).eval()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    positions: dict[str, int] = {}

    def count(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        name = names[id(module.weight)]
        positions[name] = positions.get(name, 0) + output.numel() // module.weight.shape[0]

    for module in network.modules():
        if isinstance(module, MULTIPLYING):
            module.register_forward_hook(count)
    first = next(network.parameters())
    image = torch.zeros(1, channels_of(network), input_size, input_size, device=first.device, dtype=first.dtype)
    network(image)
    return positions
