"""Build any classifier of timm, torchvision or the user at the widths that pruning left."""

import hashlib

from timm.layers import Linear as TimmLinear
from torch import nn

from stages.common.errors import UserError
from stages.networks.architectures import construct, custom_hash
from stages.networks.pixel_stem import take_pixels
from stages.networks.reparameterize import fold_layer_scale, pointwise_to_linear
from stages.networks.reshape import reshape
from stages.networks.spec import NetworkSpec
from stages.params.models import Model


def spec_of(model: Model, classes: int, channels: int = 3) -> NetworkSpec:
    """The dense network of one entry of `models`."""
    source = custom_hash(model.architecture) if model.library == "custom" else ""
    return NetworkSpec(model.library, model.architecture, dict(model.arguments), classes, channels, source)


def build_network(spec: NetworkSpec) -> nn.Module:
    """A float network `[N, C, S, S]` to `[N, classes]` with freshly initialized weights, in training mode.

    Raises:
        UserError: if the library has no such classifier, or refuses the constructor's arguments, or if the user's file
            is not the one that the spec was made with.
    """
    if spec.source_sha256 and spec.source_sha256 != custom_hash(spec.architecture):
        raise UserError(
            f"stages/networks/custom/{spec.architecture} is not the file that this network was built with (sha256"
            f" {spec.source_sha256[:12]}…): run `dvc repro`, or bring the file back"
        )
    network = construct(spec.library, spec.architecture, spec.arguments, spec.classes, spec.channels)
    network.image_channels = spec.channels  # type: ignore[assignment]
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
