"""Count parameters, MACs and bit operations of a network, packed layers included.

Convention. One MAC is one multiply-accumulate of a convolution, a linear layer or a matrix product between activations
(attention), for one image; bias additions, norms, activations, pooling, resizing and other element-wise work are not
counted. Parameters are trained numbers: an int8 weight is one; its scale and running statistics are none. Zeros count
as MACs, because dense hardware multiplies them. The bit operations (BOPs) of a layer are its MACs times its weight bits
times its activation bits (arXiv 1804.10969, without the accumulator's term).

Published tables use the "visible" counts of common tools, which look into none of PyTorch's dynamically quantized
layers: dynamic quantization then seems to remove nearly all parameters and MACs, as in arXiv 2409.02134. These counts
stand beside the true ones. Our layers with integer weights count as float layers there, since those tools know no
others.
"""

import contextlib
import io
import warnings
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

from stages.artifacts.description import FLOAT_BITS, LayerStorage
from stages.common.errors import UserError
from stages.networks.integer_weights import dequantized, packed_layers, without_integers
from stages.networks.modules import MULTIPLYING, channels_of, output_positions
from stages.networks.norms import FixedDivisorLayerNorm

# They own parameters, but the convention counts no products of theirs.
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
    """Counts of one module that owns parameters, or (empty name) of the matrix products outside of all layers."""

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


def count_layers(network: nn.Module, input_size: int, layers: dict[str, LayerStorage]) -> list[LayerCount]:
    """Count every module of `network` that owns parameters, for one image `[C, input_size, input_size]`.

    The counts come from a dequantized copy, where packed layers are visible; the network is not changed.

    Args:
        layers: storage of each layer that is not float32, as in `model.json`.

    Raises:
        UserError: if an unknown kind of module owns parameters, or `layers` does not list exactly the packed layers.
    """
    packed = packed_layers(network)
    if odd := sorted(packed.keys() ^ layers.keys()):
        raise UserError(f"{odd[0]}: packed in the network or listed under layers in model.json, but not both")
    twin = dequantized(network).cpu().eval()
    _refuse_unknown(twin, network)
    with FlopCounterMode(display=False) as counter:
        positions = output_positions(twin, input_size)
    counted: set[int] = set()
    rows = []
    for name, module in twin.named_modules():
        own = {part: p for part, p in module.named_parameters(recurse=False) if id(p) not in counted}
        if not own:
            continue
        counted |= {id(p) for p in own.values()}
        weight_name = f"{name}.weight".removeprefix(".")
        storage = layers.get(name)
        rows.append(
            LayerCount(
                name=name,
                kind=type(network.get_submodule(name)).__name__,
                params=sum(p.numel() for p in own.values()),
                params_nonzero=sum(int(torch.count_nonzero(p)) for p in own.values()),
                macs=positions.get(weight_name, 0) * module.weight.numel() if "weight" in own else 0,
                weight_bits=storage.weight_bits if storage else FLOAT_BITS,
                activation_bits=storage.activation_bits if storage else FLOAT_BITS,
            )
        )
    if outside := counter.get_total_flops() // 2 - sum(row.macs for row in rows):
        rows.append(LayerCount("", "matrix products between activations", 0, 0, outside, FLOAT_BITS, FLOAT_BITS))
    return rows


def totals(rows: list[LayerCount]) -> dict[str, int]:
    """`params`, `params_nonzero`, `macs` and `bops` of all layers."""
    return {key: sum(getattr(row, key) for row in rows) for key in ("params", "params_nonzero", "macs", "bops")}


def _refuse_unknown(twin: nn.Module, network: nn.Module) -> None:
    for name, module in twin.named_modules():
        hidden = hasattr(module, "_packed_params")
        if hidden or (list(module.parameters(recurse=False)) and not isinstance(module, MULTIPLYING + ELEMENTWISE)):
            kind = type(network.get_submodule(name)).__name__
            raise UserError(f"{name or 'the network'}: {kind} owns parameters, and its MACs cannot be counted")


def params_visible(network: nn.Module) -> int:
    """The sum over `parameters()`, which weights in PyTorch's dynamic layers are not among."""
    return sum(p.numel() for p in without_integers(network).parameters())


def macs_visible(network: nn.Module, input_size: int) -> int:
    """The MACs of `thop.profile` for one image `[C, input_size, input_size]`.

    thop also counts some norms and poolings, and skips kinds that it does not know, such as dynamic int8 layers. It
    adds buffers to the modules, so it runs on a copy.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import thop

        image = torch.zeros(1, channels_of(network), input_size, input_size)

        macs, _ = thop.profile(without_integers(network).cpu().eval(), (image,), verbose=False)
    return int(macs)
