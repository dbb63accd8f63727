"""Merge the scaling and normalization of images into the weights of the first convolution.

Bilinear upscaling by a whole factor computes each pixel from two neighbors in each direction, with weights that repeat
at every stored pixel, and normalization is affine. A convolution without padding whose stride is a multiple of the
factor therefore equals a convolution on the stored pixels with a stride that is smaller by the factor. Scaling repeats
the outermost pixel at the border, so that convolution uses replicate padding. The result is exact up to rounding.
"""

import copy
import math

import numpy as np
import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.modules import replace_module
from stages.networks.preprocess import Classifier, Preprocess

PIXEL_MEAN, PIXEL_STD = 0.0, 1 / 255
"""The normalization of each channel that does not change pixels from 0 to 255."""
TOLERANCE = 1e-3
"""Largest difference of logits that rounding explains, relative to the largest logit."""


def pixel_stem(classifier: Classifier, image_size: int) -> tuple[str, int] | None:
    """Find the convolution that could take the stored images directly.

    Args:
        classifier: a float classifier.
        image_size: side of the stored images in pixels.

    Returns:
        Its name and the factor by which it would scale the images up; None if no convolution takes the scaled images,
        or it has a form that `on_pixels` cannot convert.
    """
    size = classifier.preprocess.input_size
    name = _takes_images(classifier, image_size)
    if size % image_size or name is None:
        return None
    layer, factor = classifier.network.get_submodule(name), size // image_size
    return (name, factor) if _fits(layer, factor) and _as_many_outputs(layer, size, factor) else None


@torch.no_grad()
def on_pixels(classifier: Classifier, image_size: int, name: str, factor: int) -> Classifier | None:
    """A copy whose network takes pixels from 0 to 255, with the convolution and factor that `pixel_stem` found.

    Returns:
        None if the logits differ, because the network also uses the images elsewhere, or if fewer weights are zero:
        scaling mixes a single pruned weight with its neighbors.
    """
    network = copy.deepcopy(classifier.network)
    layer = network.get_submodule(name)
    scaling = _scaling(layer.kernel_size[0], factor).to(layer.weight)
    scale, shift = classifier.preprocess.scale.view(-1, 1, 1), classifier.preprocess.shift.view(-1, 1, 1)
    weight = torch.einsum("ocij,iy,jx->ocyx", layer.weight, scaling, scaling)
    if (weight == 0).sum() < (layer.weight == 0).sum():
        return None
    bias = (weight * shift).sum((1, 2, 3)) + (0 if layer.bias is None else layer.bias)
    take_pixels(network, name, factor)
    stem = network.get_submodule(name)
    stem.weight.copy_(weight * scale)
    stem.bias.copy_(bias)
    channels = layer.in_channels
    twin = Classifier(Preprocess([PIXEL_MEAN] * channels, [PIXEL_STD] * channels, image_size), network).eval()
    pixels = _some_pixels(image_size, channels)
    expected, found = classifier(pixels), twin(pixels)
    return twin if (found - expected).abs().max() <= TOLERANCE * expected.abs().max() else None


def take_pixels(network: nn.Module, name: str, factor: int) -> None:
    """Replace the convolution `name` by one with fresh weights that scales stored images up by `factor`, in place.

    Raises:
        UserError: if there is no such convolution, or it has another form.
    """
    layer = dict(network.named_modules()).get(name)
    if layer is None or not _fits(layer, factor):
        raise UserError(f"{name}: not a convolution that can scale stored images up by {factor}")
    size, stride = _stored_kernel(layer.kernel_size[0], factor), layer.stride[0] // factor
    padding = {} if factor == 1 else {"padding": 1, "padding_mode": "replicate"}
    replace_module(network, name, nn.Conv2d(layer.in_channels, layer.out_channels, size, stride, **padding))


def _stored_kernel(size: int, factor: int) -> int:
    """Side of the kernel on stored pixels (from pixel -1 on) that equals a kernel of side `size` on scaled pixels."""
    return size if factor == 1 else math.floor((size - 0.5) / factor - 0.5) + 3


def _scaling(size: int, factor: int) -> torch.Tensor:
    """Weights `[size, stored kernel]` of the stored pixels (from -1 on) in each of the first scaled pixels.

    These are the weights of `torch.nn.functional.interpolate` with `mode="bilinear"` and `align_corners=False`: scaled
    pixel r lies at (r + 0.5) / factor - 0.5.
    """
    if factor == 1:
        return torch.eye(size)
    weights = torch.zeros(size, _stored_kernel(size, factor), dtype=torch.float64)
    for row in range(size):
        place = (row + 0.5) / factor - 0.5
        below = math.floor(place)
        weights[row, below + 1] += 1 - (place - below)
        weights[row, below + 2] += place - below
    return weights


def _fits(layer: nn.Module, factor: int) -> bool:
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.dilation != (1, 1):
        return False
    (height, width), (down, right) = layer.kernel_size, layer.stride
    unpadded, square = layer.padding in ((0, 0), "valid"), height == width > 1 and down == right
    return unpadded and square and factor >= 1 and down % factor == 0


def _as_many_outputs(layer: nn.Conv2d, size: int, factor: int) -> bool:
    """True if the convolution on stored pixels has as many output positions as the one on `size` scaled pixels."""
    kernel, stride, padding = layer.kernel_size[0], layer.stride[0], 2 if factor > 1 else 0
    stored = (size // factor + padding - _stored_kernel(kernel, factor)) // (stride // factor)
    return stored == (size - kernel) // stride


@torch.no_grad()
def _takes_images(classifier: Classifier, image_size: int) -> str | None:
    """The name of the first convolution whose input is the very tensor that the network is called with."""
    classifier = copy.deepcopy(classifier)  # the hooks stay on it
    names = {layer: name for name, layer in classifier.network.named_modules() if isinstance(layer, nn.Conv2d)}
    found: list[str] = []
    images: list[torch.Tensor] = []

    def note(layer: nn.Module, inputs: tuple) -> None:
        if inputs and inputs[0] is images[0]:
            found.append(names[layer])

    classifier.network.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0]))
    for layer in names:
        layer.register_forward_pre_hook(note)
    classifier(_some_pixels(image_size, classifier.preprocess.scale.numel()))
    return found[0] if found else None


def _some_pixels(image_size: int, channels: int) -> torch.Tensor:
    """Noise, uint8 `[2, S, S, channels]`."""
    shape = 2, image_size, image_size, channels
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
