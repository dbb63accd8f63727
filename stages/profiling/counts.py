"""Count parameters, MACs and bit operations of a network, packed layers included.

Convention. One MAC is one multiply-accumulate of a convolution, a linear layer or a matrix product between activations
(attention), for one image; bias additions, norms, activations, pooling, resizing and other element-wise work are not
counted. Parameters are trained numbers: an int8 weight is one; its scale and running statistics are none. A parameter
that no product reads (a layer scale, a position table) costs no MAC. Zeros count as MACs, because dense hardware
multiplies them. The bit operations (BOPs) of a layer are its MACs times its weight bits times its activation bits
(arXiv 1804.10969, without the accumulator's term). No quantizer touches the products that read no parameter, those of
attention and those with fixed filters: both operands count with the 32 bits of float.

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
from torch import nn

from stages.artifacts.description import FLOAT_BITS, LayerStorage
from stages.common.errors import UserError
from stages.networks.integer_weights import dequantized, packed_layers, without_integers
from stages.networks.modules import channels_of
from stages.networks.products import count_products


@dataclass(frozen=True)
class LayerCount:
    """Counts of one module that owns parameters, or (empty name) of the products that read no parameter."""

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
        UserError: if the products of a weight cannot be counted, or `layers` does not list exactly the packed layers.
    """
    packed = packed_layers(network)
    if odd := sorted(packed.keys() ^ layers.keys()):
        raise UserError(f"{odd[0]}: packed in the network or listed under layers in model.json, but not both")
    twin = dequantized(network).cpu().eval()
    products = count_products(twin, input_size)
    counted: set[int] = set()
    rows = []
    for name, module in twin.named_modules():
        own = {f"{name}.{part}".removeprefix("."): p for part, p in module.named_parameters(recurse=False)}
        own = {key: p for key, p in own.items() if id(p) not in counted}  # a shared one belongs to its first module
        if not own:
            continue
        counted |= {id(p) for p in own.values()}
        storage = layers.get(name)
        rows.append(
            LayerCount(
                name=name,
                kind=type(network.get_submodule(name)).__name__,
                params=sum(p.numel() for p in own.values()),
                params_nonzero=sum(int(torch.count_nonzero(p)) for p in own.values()),
                macs=sum(products.by_parameter[key] for key in own),
                weight_bits=storage.weight_bits if storage else FLOAT_BITS,
                activation_bits=storage.activation_bits if storage else FLOAT_BITS,
            )
        )
    for kind, macs in (
        ("matrix products between activations", products.between_activations),
        ("products with constants", products.with_constants),
    ):
        if macs:
            rows.append(LayerCount("", kind, 0, 0, macs, FLOAT_BITS, FLOAT_BITS))
    return rows


def totals(rows: list[LayerCount]) -> dict[str, int]:
    """`params`, `params_nonzero`, `macs` and `bops` of all layers."""
    return {key: sum(getattr(row, key) for row in rows) for key in ("params", "params_nonzero", "macs", "bops")}


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
