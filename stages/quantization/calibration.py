"""Calibration: the ranges of activations, and the second moments of layers' inputs, on training images."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.params.quantizers import Calibrated, Int8Static

BATCH = 64
BINS, QUANTIZED_BINS = 1024, 256
"""Bins of the histograms, and the number of levels that the entropy method compares with."""
LARGEST_WINDOWS = 2**28
"""Bytes of a convolution's unfolded windows at once: each input position is part of many windows."""


def calibration_images(part: Part, quantizer: Calibrated, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw images, uint8 `[n, H, W, C]`, and their labels, int64 `[n]`, without replacement from the training part.

    Raises:
        UserError: If the part has too few images.
    """
    wanted = quantizer.calibration_images
    if wanted > len(part):
        raise UserError(
            f"{key}.calibration_images = {wanted}: the training part has {len(part)} images: lower it to that"
        )
    chosen = np.sort(np.random.default_rng(quantizer.calibration_seed).permutation(len(part))[:wanted])
    return np.asarray(part.images[chosen]), np.asarray(part.labels[chosen], np.int64)


def activation_ranges(
    classifier: nn.Module,
    layers: dict[str, nn.Module],
    sides: dict[str, tuple[str, ...]],
    images: np.ndarray,
    quantizer: Int8Static,
) -> dict[str, dict[str, tuple[float, float]]]:
    """The `(low, high)` of each layer's sides over the images, by layer name and side.

    They are the smallest and largest value, or the range that ONNX Runtime's histogram calibrators choose within.
    Layers that never run are missing.

    Args:
        sides: `input`, `output` or both, by layer name.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    if quantizer.calibration == "minmax":

        def widen(name: str, tensors: dict[str, torch.Tensor]) -> None:
            for side in sides[name]:
                low, high = found.setdefault(name, {}).get(side, (np.inf, -np.inf))
                least, most = (end.item() for end in tensors[side].aminmax())
                found[name][side] = min(low, least), max(high, most)

        _watch(classifier, layers, images, widen)
        return {name: found[name] for name in layers if name in found}

    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=quantizer.calibration,
        symmetric=False,
        num_bins=BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=quantizer.percentile,
        scenario="same",
    )

    def collect(name: str, tensors: dict[str, torch.Tensor]) -> None:
        collector.collect({(name, side): [tensors[side].cpu().numpy()] for side in sides[name]})

    with redirect_stdout(io.StringIO()):  # it prints its settings
        _watch(classifier, layers, images, collect)
        for (name, side), (low, high, *_) in collector.compute_collection_result().items():
            found.setdefault(name, {})[side] = float(low), float(high)
    return {name: found[name] for name in layers if name in found}


@torch.no_grad()
def hessians(classifier: nn.Module, layers: dict[str, nn.Module], images: np.ndarray) -> dict[str, torch.Tensor]:
    """The sum of x x^T over all inputs x of output values, float32 `[groups, n, n]` by layer name."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str, tensors: dict[str, torch.Tensor]) -> None:
        layer, x, output = layers[name], tensors["input"], tensors["output"]
        for some in x.split(_at_once(layer, output)):
            columns = _columns(layer, some)
            product = columns @ columns.transpose(1, 2)
            found[name] = found[name].add_(product) if name in found else product

    _watch(classifier, layers, images, note)
    return found


def _at_once(layer: nn.Module, output: torch.Tensor) -> int:
    """Number of images whose windows are unfolded at once, at least one."""
    if isinstance(layer, nn.Linear):
        return len(output)  # its input needs no unfolding
    windows = layer.groups * layer.weight[0].numel() * output[0, 0].numel() * output.element_size()
    return max(1, LARGEST_WINDOWS // (2 * windows))  # twice: the result of unfold, and its copy in the order of groups


def _columns(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The inputs of each output value, `[groups, n, positions]`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).T[None]
    sides, mode = layer._reversed_padding_repeated_twice, layer.padding_mode
    x = F.pad(x, sides, "constant" if mode == "zeros" else mode)
    windows = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return windows.reshape(len(x), layer.groups, -1, windows.shape[-1]).permute(1, 2, 0, 3).flatten(2)


@torch.no_grad()
def _watch(
    classifier: nn.Module,
    layers: dict[str, nn.Module],
    images: np.ndarray,
    note: Callable[[str, dict[str, torch.Tensor]], None],
) -> None:
    """Call `note` with a layer's name, `input` and `output` directly after it has run.

    Later modules may work in place, and all layers' activations together may not fit into memory.
    """

    def hook(name: str) -> Callable:
        return lambda _, inputs, output: note(name, {"input": inputs[0], "output": output})

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        for start in range(0, len(images), BATCH):
            classifier(torch.from_numpy(images[start : start + BATCH]))
    finally:
        for handle in handles:
            handle.remove()
