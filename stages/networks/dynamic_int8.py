"""PyTorch's dynamically quantized Linear layers: int8 weights, activations quantized in every call.

torch deprecates these modules; only this file uses them.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from torch.ao.quantization import PlaceholderObserver, QConfig, quantize_dynamic
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from stages.networks.modules import with_twins


def quantize_linears(network: nn.Module, per_channel: bool, floats: Iterable[str] = ()) -> nn.Module:
    """A copy whose Linear layers, except those named in `floats`, are PyTorch's dynamic int8 layers.

    Weights are symmetric integers in [-127, 127] with scale = largest magnitude / 127, for each output channel or for
    the whole tensor, which are the integers that ONNX Runtime's quantizer finds too.
    """
    observer = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    config = QConfig(
        activation=PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True, reduce_range=True),
        weight=observer.with_args(dtype=torch.qint8, qscheme=scheme, quant_min=-127, quant_max=127),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(network.eval(), {nn.Linear: config} | dict.fromkeys(floats), dtype=torch.qint8)


def dynamic_layers(network: nn.Module) -> dict[str, nn.Module]:
    """PyTorch's dynamic int8 layers by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, DynamicLinear)}


def unpack_layer(layer: nn.Module) -> dict[str, torch.Tensor]:
    """A packed layer's `weight` int8 `[out, in]`, `weight_scale` float32 `[out]` or `[1]`, and `bias` if it has one."""
    weight = layer.weight()
    per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = weight.q_per_channel_scales() if per_channel else torch.tensor([weight.q_scale()])
    tensors = {"weight": weight.int_repr(), "weight_scale": scale.to(torch.float32)}
    if layer.bias() is not None:
        tensors["bias"] = layer.bias().detach()
    return tensors


def pack_layer(tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The inverse of `unpack_layer`: a packed layer with these integers, scales and bias."""
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
    """A float copy: each packed layer becomes a Linear layer with its dequantized weights."""
    return with_twins(network, DynamicLinear, _dequantized)


@torch.no_grad()
def _dequantized(layer: nn.Module) -> nn.Linear:
    tensors = unpack_layer(layer)
    linear = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0], bias="bias" in tensors)
    linear.weight.copy_(tensors["weight"].float() * tensors["weight_scale"][:, None])
    if "bias" in tensors:
        linear.bias.copy_(tensors["bias"])
    return linear
