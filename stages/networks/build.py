"""Build any classifier of timm or torchvision at the widths that pruning left, with or without weights."""

import hashlib
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import Linear as TimmLinear
from torch import nn

from stages.common.errors import UserError
from stages.networks.architectures import construct, pretrained_state
from stages.networks.modules import load_tensors
from stages.networks.pixel_stem import take_pixels
from stages.networks.reparameterize import fold_layer_scale, pointwise_to_linear
from stages.networks.reshape import reshape
from stages.networks.spec import NetworkSpec
from stages.params.models import Model


def spec_of(model: Model, classes: int) -> NetworkSpec:
    """The dense network of one entry of `models`."""
    return NetworkSpec(model.library, model.architecture, dict(model.arguments), classes)


def build_network(spec: NetworkSpec) -> nn.Module:
    """A float network `[N, 3, S, S]` to `[N, classes]` with freshly initialized weights, in training mode.

    Raises:
        UserError: if the library has no such classifier, or refuses the constructor's arguments.
    """
    network = construct(spec.library, spec.architecture, spec.arguments, spec.classes)
    for module in network.modules():
        if type(module) is TimmLinear:  # differs from nn.Linear under TorchScript alone; code that looks for Linear
            module.__class__ = nn.Linear  # should find it
    if spec.layer_scale_folded:
        fold_layer_scale(network)
    reshape(network, spec.widths, spec.layer_norm_widths, spec.layer_norm)
    if spec.pointwise_as_linear:
        pointwise_to_linear(network)
    for name, factor in spec.pixel_stem.items():
        take_pixels(network, name, factor)
    return network


def state_hash(network: nn.Module) -> str:
    """sha256 over the names and values of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_weights(network: nn.Module, spec: NetworkSpec, weights: str) -> list[str]:
    """Load `pretrained` weights from the library's hub, or the weights of a file, in place.

    The last layer may have another number of classes; it then keeps its fresh weights.

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
    for name in other:
        found, expected = tuple(state[name].shape), tuple(own[name].shape)
        if found[1:] != expected[1:] or expected[0] != spec.classes:
            raise UserError(f"weights {weights!r}: {name} has shape {found}, but the network needs {expected}")
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"weights {weights!r}: {broken[0]} holds values that are not finite: use another file")
    load_tensors(network, {name: tensor for name, tensor in state.items() if name not in other}, strict=False)
    return other


def _hub_state(spec: NetworkSpec) -> dict[str, torch.Tensor]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at each retry; one error is enough
    try:
        return pretrained_state(spec.library, spec.architecture, spec.arguments)
    except Exception as error:  # each hub client raises its own errors; for the user they all mean the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"pretrained weights of {spec.library} {spec.architecture} could not be downloaded ({reason}): without"
            " network, download the file elsewhere and set `weights:` to its path (.safetensors, or a .pth state dict)"
        ) from None


def _file_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(
            f"weights {str(path)!r}: no such file (relative to the folder of params.yaml); other choices: none,"
            " pretrained"
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # safetensors and torch each raise their own classes for a broken file
        raise UserError(
            f"weights {str(path)!r} cannot be read as tensors: the file is broken or holds other objects; save it by"
            " torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None
    for key in ("state_dict", "model"):  # published files often wrap the state dict
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"weights {str(path)!r} do not hold a state dict (names and tensors)")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
