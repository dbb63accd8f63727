"""Int8 networks: dynamic (grids of activations are found in every call) and static (they are fixed here)."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from stages.artifacts.description import LayerStorage
from stages.networks.dynamic_int8 import dynamic_layers, quantize_linears
from stages.networks.integer_weights import KINDS, Grid, with_integers
from stages.networks.modules import along_outputs, excluded_modules, replace_module
from stages.networks.pixel_stem import on_pixels, pixel_stem
from stages.networks.preprocess import Classifier
from stages.networks.reparameterize import pointwise_to_linear
from stages.params.quantizers import Int8Static
from stages.quantization.calibration import activation_ranges
from stages.quantization.layers import refuse_shared_weights, without_integer_form
from stages.quantization.rounding import Rounded, round_nearest

ACTIVATION_BITS = 8
LARGEST_BIAS = 2**30
"""Largest bias in steps: half the range of int32, since the products are added to it."""
PIXELS = Grid(scale=1.0, zero_point=0)
"""Grid of stored pixels, which are integers from 0 to 255."""


def int8_dynamic(
    network: nn.Module, per_channel: bool, exclude: Sequence[str] = ()
) -> tuple[nn.Module, dict[str, LayerStorage]]:
    """Pack every Linear layer to int8, and every 1x1 convolution as a Linear layer; all other layers stay float.

    Args:
        network: Float; it stays as it is.
        per_channel: One scale for each output channel, otherwise one for the whole weight.
        exclude: Names or patterns of modules that stay in float too.

    Returns:
        The packed network, and the storage of each packed layer.
    """
    linear = copy.deepcopy(network)
    pointwise_to_linear(linear)
    packed = quantize_linears(linear, per_channel, excluded_modules(linear, exclude))
    scheme = "symmetric_per_channel" if per_channel else "symmetric_per_tensor"
    return packed, {name: LayerStorage(8, 8, scheme) for name in dynamic_layers(packed)}


def int8_static(
    classifier: Classifier, quantizer: Int8Static, images: np.ndarray
) -> tuple[Classifier, dict[str, LayerStorage], list[str], dict[str, int]]:
    """Round weights for each channel, and layers' inputs (and convolutions' outputs) for each tensor.

    Depthwise and other grouped convolutions stay in float, where they are as fast and lose nothing. So do norms,
    activation functions, what `exclude` names, and layers that never run, whose inputs have no range. 1x1 convolutions
    become Linear layers. If the first convolution can take stored pixels directly with as many weights, it does: pixels
    are integers, so that its input is not rounded at all.

    Args:
        classifier: Float; it stays as it is.
        images: uint8 `[n, H, W, C]`, the calibration images.

    Returns:
        The classifier, the storage of each int8 layer, the names of the layers in float, and the network's
        `pixel_stem`.

    Raises:
        UserError: If two layers share a weight.
    """
    refuse_shared_weights(classifier.network)
    stays = excluded_modules(classifier.network, quantizer.exclude)
    classifier, stem = _on_pixels(classifier, images.shape[1], stays)
    network = copy.deepcopy(classifier.network)
    pointwise_to_linear(network)
    excluded = excluded_modules(network, quantizer.exclude)
    layers = {name: module for name, module in network.named_modules() if type(module) in KINDS}
    floats = {name for name, module in layers.items() if getattr(module, "groups", 1) > 1 or name in excluded}
    kept = [name for name in layers if name in floats] + without_integer_form(network)
    layers = {name: module for name, module in layers.items() if name not in floats}
    sides: dict[str, tuple[str, ...]] = {
        name: ("input",) if isinstance(layer, nn.Linear) else ("input", "output") for name, layer in layers.items()
    }
    linear = Classifier(classifier.preprocess, network).eval()
    ranges = activation_ranges(linear, layers, sides, images, quantizer)
    kept += [name for name in layers if name not in ranges]
    bits = quantizer.weight_bits
    for name, ends_by_side in ranges.items():
        layer = layers[name]
        grids = {side: Grid.over(*ends) for side, ends in ends_by_side.items()}
        if name in stem:
            grids["input"] = PIXELS
        rounded = _with_room_for_the_bias(layer, round_nearest(layer.weight, bits), grids["input"].scale)
        replace_module(network, name, with_integers(layer, rounded.integers, rounded.scale, bits, grids))
    storage = dict.fromkeys(ranges, LayerStorage(bits, ACTIVATION_BITS, "symmetric_per_channel", "static"))
    return Classifier(classifier.preprocess, network).eval(), storage, kept, stem


@torch.no_grad()
def _with_room_for_the_bias(layer: nn.Module, rounded: Rounded, input_scale: float) -> Rounded:
    """Use coarser steps in channels whose weights are so small that the bias, in int32 steps, would overflow."""
    if layer.bias is None:
        return rounded
    least = layer.bias.abs().float() / (input_scale * LARGEST_BIAS)
    scale = torch.maximum(rounded.scale, least)
    coarser = (rounded.values() / along_outputs(scale, rounded.integers)).round().to(torch.int8)
    tight = along_outputs(scale > rounded.scale, rounded.integers)
    return Rounded(torch.where(tight, coarser, rounded.integers), scale, rounded.bits)


def _on_pixels(classifier: Classifier, image_size: int, excluded: set[str]) -> tuple[Classifier, dict[str, int]]:
    """The classifier whose first convolution takes stored pixels, and its `pixel_stem`; itself and {} if none can."""
    found = pixel_stem(classifier, image_size)
    if found is None or found[0] in excluded:
        return classifier, {}
    twin = on_pixels(classifier, image_size, *found)
    if twin is None or _parameters(twin) != _parameters(classifier):
        return classifier, {}
    return twin, dict([found])


def _parameters(classifier: Classifier) -> int:
    return sum(parameter.numel() for parameter in classifier.parameters())
