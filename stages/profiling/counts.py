"""Honest counts: what a network holds and computes, through packed layers too.

Convention. One MAC is one multiply-accumulate of a convolution, a linear layer or a matrix product between activations
(attention), for one image; adding a bias is not counted, nor are normalisations, activations, pooling, resizing and
other element-wise work. Parameters are trained numbers: an int8 weight is one, its scale is not, nor are running
statistics. Zeros count as MACs, because dense hardware multiplies them. A layer's bit operations (BOPs) are its MACs
times its weight bits times its activation bits (arXiv 1804.10969, without the accumulator's term).
"""

from dataclasses import dataclass

import torch
from timm.layers import LayerScale, LayerScale2d
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.convnext import CNBlock

from stages.artifacts.artifact import FLOAT_BITS, LayerStorage
from stages.common.errors import UserError
from stages.networks.layer_norm import FixedDivisorLayerNorm
from stages.networks.packed import dequantized, packed_layers

MULTIPLYING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# They own parameters, but multiply nothing that the convention counts.
ELEMENTWISE = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.PReLU,
    _BatchNorm,
    FixedDivisorLayerNorm,
    GlobalResponseNorm,
    LayerScale,
    LayerScale2d,
    ConvNeXtBlock,  # layer scale
    CNBlock,  # layer scale
    VisionTransformer,  # class token and positions
)


@dataclass(frozen=True)
class LayerCount:
    """One module with parameters of its own, or (name empty) the matrix products that stand in no layer."""

    name: str
    kind: str
    params: int
    params_nonzero: int
    macs: int
    weight_bits: int
    activation_bits: int

    @property
    def bops(self) -> int:
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class Totals:
    params: int
    params_nonzero: int
    macs: int
    bops: int


def count_layers(network: nn.Module, input_size: int, layers: dict[str, LayerStorage]) -> list[LayerCount]:
    """Count every module of `network` that owns parameters, for one image of `[3, input_size, input_size]`.

    Counting is done on a float copy, where packed layers are visible; the network is left as it is.

    Args:
        layers: how each layer that is not float32 is stored, as `model.json` says.

    Raises:
        UserError: if a module's kind is unknown and it owns parameters, or `layers` are not the packed ones.
    """
    packed = packed_layers(network)
    if odd := sorted(packed.keys() ^ layers.keys()):
        raise UserError(f"{odd[0]}: packed in the network or listed under layers in model.json, but not both")
    twin = dequantized(network).cpu().eval()
    for module in twin.modules():
        if isinstance(module, FixedDivisorLayerNorm):
            module.as_matmul = False  # its products are a norm's sums, which the convention leaves out in every form
    _refuse_unknown(twin, network)
    macs, outside = _macs(twin, input_size)
    seen: set[int] = set()
    rows = []
    for name, module in twin.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        if not own and not macs.get(name):
            continue
        storage = layers.get(name)
        rows.append(
            LayerCount(
                name=name,
                kind=type(network.get_submodule(name)).__name__ if name in packed else type(module).__name__,
                params=sum(p.numel() for p in own),
                params_nonzero=sum(int(torch.count_nonzero(p)) for p in own),
                macs=macs.get(name, 0),
                weight_bits=storage.weight_bits if storage else FLOAT_BITS,
                activation_bits=storage.activation_bits if storage else FLOAT_BITS,
            )
        )
    if outside:
        rows.append(LayerCount("", "matrix products between activations", 0, 0, outside, FLOAT_BITS, FLOAT_BITS))
    return rows


def totals(rows: list[LayerCount]) -> Totals:
    return Totals(*(sum(getattr(row, key) for row in rows) for key in ("params", "params_nonzero", "macs", "bops")))


def _refuse_unknown(twin: nn.Module, network: nn.Module) -> None:
    for name, module in twin.named_modules():
        hidden = hasattr(module, "_packed_params")
        if hidden or (list(module.parameters(recurse=False)) and not isinstance(module, MULTIPLYING + ELEMENTWISE)):
            kind = type(network.get_submodule(name)).__name__
            raise UserError(
                f"{name or 'the network'}: {kind} owns parameters of a kind that cannot be counted honestly"
            )


@torch.no_grad()
def _macs(twin: nn.Module, input_size: int) -> tuple[dict[str, int], int]:
    """MACs of each convolution and linear layer, by hooks, and those that torch's own counter finds beside them."""
    macs: dict[str, int] = {}
    hooks = []

    def count(name: str, module: nn.Module, output: torch.Tensor) -> None:
        per_output = module.weight[0].numel()  # inputs that one output value sums over
        macs[name] = macs.get(name, 0) + output.numel() * per_output

    for name, module in twin.named_modules():
        if isinstance(module, MULTIPLYING):
            hooks.append(module.register_forward_hook(lambda m, _, output, name=name: count(name, m, output)))
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(1, 3, input_size, input_size))
    for hook in hooks:
        hook.remove()
    return macs, counter.get_total_flops() // 2 - sum(macs.values())
