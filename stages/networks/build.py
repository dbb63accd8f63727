"""Build any timm or torchvision classifier by name, at the widths that pruning left, with or without weights."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import load_file
from timm.layers import Linear as TimmLinear
from torch import nn

from stages.common.errors import UserError
from stages.networks.architectures import construct, timm_model
from stages.networks.layer_scale import fold_layer_scale
from stages.networks.pixel_stem import take_pixels
from stages.networks.pointwise import pointwise_to_linear
from stages.networks.reshape import reshape
from stages.networks.tensors import load_tensors
from stages.params.models import Model


@dataclass(frozen=True)
class NetworkSpec:
    """All that is needed to build a network again without its weights; stands in `model.json` under `network`."""

    library: str
    architecture: str
    arguments: dict[str, Any]
    classes: int
    layer_scale_folded: bool = False
    pointwise_as_linear: bool = False
    widths: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each module that pruning has narrowed, its attributes: `{"head.fc": {"in_features": 96}}`."""
    layer_norm_widths: dict[str, int] = field(default_factory=dict)
    """For each narrowed LayerNorm (and global response norm), the original width, by which it goes on dividing."""
    layer_norm: str = "exact"
    """How narrowed LayerNorms count, one of `networks.layer_norm.FORMS`: the tensors are the same in each."""
    pixel_stem: dict[str, int] = field(default_factory=dict)
    """The convolution that takes stored pixels as they are, and by which factor it scales them up; empty where the
    images are scaled and normalised before."""


def spec_of(model: Model, classes: int) -> NetworkSpec:
    return NetworkSpec(model.library, model.architecture, dict(model.arguments), classes)


def build_network(spec: NetworkSpec) -> nn.Module:
    """A float network with freshly initialised weights, in training mode.

    Raises:
        UserError: if the library has no such classifier, or refuses the constructor's arguments.
    """
    network = construct(spec.library, spec.architecture, spec.arguments, spec.classes)
    for module in network.modules():
        if type(module) is TimmLinear:  # torch's but for TorchScript; whoever looks for Linear layers should find it
            module.__class__ = nn.Linear
    if spec.layer_scale_folded:
        fold_layer_scale(network)
    if spec.widths or spec.layer_norm_widths:
        reshape(network, spec.widths, spec.layer_norm_widths, spec.layer_norm)
    if spec.pointwise_as_linear:
        pointwise_to_linear(network)
    for name, factor in spec.pixel_stem.items():
        take_pixels(network, name, factor)
    return network


def state_hash(network: nn.Module) -> str:
    """sha256 over all tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(network: nn.Module, spec: NetworkSpec, weights: str) -> list[str]:
    """Load `pretrained` weights from the library's hub, or those of a file, in place.

    The last layer may have another number of classes and then keeps its fresh weights.

    Returns:
        The names of the tensors that were not loaded.

    Raises:
        UserError: if the hub cannot be reached, or the file is missing, broken, not finite or of another network.
    """
    state = _hub_state(spec) if weights == "pretrained" else _file_state(Path(weights))
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise UserError(
            f"weights {weights!r} are not those of {spec.library} {spec.architecture} with these arguments:"
            f" {len(missing)} tensors missing ({', '.join(missing[:3])}), {len(unexpected)} unknown"
            f" ({', '.join(unexpected[:3])})"
        )
    other = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    if wrong := [
        name for name in other if own[name].shape[1:] != state[name].shape[1:] or own[name].shape[0] != spec.classes
    ]:
        name = wrong[0]
        raise UserError(
            f"weights {weights!r}: {name} has shape {tuple(state[name].shape)},"
            f" this network's is {tuple(own[name].shape)}"
        )
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"weights {weights!r}: {broken[0]} holds values that are not finite: the training they come from failed"
        )
    load_tensors(network, {name: tensor for name, tensor in state.items() if name not in other}, strict=False)
    return other


def _hub_state(spec: NetworkSpec) -> dict[str, torch.Tensor]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at each retry; one error is enough
    try:
        if spec.library == "timm":
            return timm_model(spec.architecture, pretrained=True, **spec.arguments).state_dict()
        return torchvision.models.get_model(spec.architecture, weights="DEFAULT", **spec.arguments).state_dict()
    except Exception as error:  # each hub client has its own errors, and all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"pretrained weights of {spec.library} {spec.architecture} could not be fetched ({reason}): without"
            " network, download the file elsewhere and set `weights:` to its path (.safetensors, or a .pth state dict)"
        ) from None


def _file_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(
            f"weights {str(path)!r}: no such file (relative to the folder of params.yaml), nor one of: none, pretrained"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # safetensors and torch each raise their own kinds for a broken file, in their own words
        raise UserError(
            f"weights {str(path)!r} cannot be read as tensors: the file is broken, or holds more than tensors: save it"
            " by torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None
    for key in ("state_dict", "model"):  # common wrappings of a published state dict
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"weights {str(path)!r} do not hold a state dict (names and tensors)")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
