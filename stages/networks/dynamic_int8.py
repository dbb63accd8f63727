"""Dynamically quantized Linear layers: int8 weights kept, activations quantized on the fly (PyTorch's own modules).

torch deprecates these modules; everything that touches them is in this file.
"""

import warnings

import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization import PlaceholderObserver, QConfig, quantize_dynamic
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from stages.networks.pointwise import with_twins


def quantize_linears(network: nn.Module, per_channel: bool) -> nn.Module:
    """A copy in which PyTorch's dynamic quantization has packed every Linear layer to int8.

    Weights are symmetric in [-127, 127], the scale being the largest magnitude / 127, for each output channel or for
    the tensor: the same integers that ONNX Runtime's quantizer finds.
    """
    observer = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    config = QConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True, reduce_range=True),
        weight=observer.with_args(dtype=torch.qint8, qscheme=scheme, quant_min=-127, quant_max=127),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(network.eval(), {nn.Linear: config}, dtype=torch.qint8)


def dynamic_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The packed Linear layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DynamicLinear)}


def unpack_layer(layer: nn.Module) -> dict[str, torch.Tensor]:
    """What a packed layer holds: `weight` int8 `[out, in]`, `weight_scale` float32 `[out]` or `[1]`, maybe `bias`."""
    weight = layer.weight()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
    tensors = {"weight": weight.int_repr(), "weight_scale": scale.to(torch.float32)}
    if layer.bias() is not None:
        tensors["bias"] = layer.bias().detach()
    return tensors


def pack_layer(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The packed layer that `unpack_layer` read: the same integers, scales and bias."""
    weight, scale = tensors["weight"], tensors["weight_scale"].to(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = DynamicLinear(weight.shape[1], weight.shape[0], bias_="bias" in tensors)
        if len(scale) == len(weight):
            zero_points = torch.zeros(len(scale), dtype=torch.long)
            packed = torch._make_per_channel_quantized_tensor(weight, scale, zero_points, 0)
        else:
            packed = torch._make_per_tensor_quantized_tensor(weight, scale.item(), 0)
        layer.set_weight_bias(packed, tensors.get("bias"))
    return layer


def without_dynamic(network: nn.Module) -> nn.Module:
    """A float copy: each packed layer becomes a Linear layer with the values that its integers stand for."""
    return with_twins(network, DynamicLinear, lambda layer: _float_linear(unpack_layer(layer)))


@torch.no_grad()
def _float_linear(tensors: dict[str, torch.Tensor]) -> nn.Linear:
    linear = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], bias="bias" in tensors)
    linear.weight.copy_(tensors["weight"].float() * tensors["weight_scale"][:, None])
    if "bias" in tensors:
        linear.bias.copy_(tensors["bias"])
    return linear
