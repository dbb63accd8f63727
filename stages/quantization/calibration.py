"""Calibration images, and what they tell: the ranges of activations, and the second moments of layers' inputs."""

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
"""Of the histograms from which percentiles and entropies are read, and the levels that entropy compares with."""
LARGEST_WINDOWS = 2**28
"""Bytes of a convolution's windows that are laid out at once: each place of its input stands in many of them."""


def calibration_images(part: Part, quantizer: Calibrated, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels drawn without replacement from the training part: uint8 `[n, H, W, 3]`, int64 `[n]`.

    Raises:
        UserError: if the part holds fewer images than are asked for.
    """
    wanted = quantizer.calibration_images
    if wanted > len(part):
        raise UserError(
            f"{key}.calibration_images = {wanted}: the training part holds {len(part)} images: lower it to that"
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
    """For each layer by name the `(low, high)` of its wanted sides over the images.

    The smallest and largest value, or what ONNX Runtime's histogram calibrators choose between them. Layers that the
    network never runs are missing.

    Args:
        sides: of each layer, from `input` and `output`.
    """
    if quantizer.calibration == "minmax":
        found = _extremes(classifier, layers, sides, images)
    else:
        found = _by_histograms(classifier, layers, sides, images, quantizer)
    return {
        name: {side: found[f"{name} {side}"] for side in sides[name]}
        for name in layers
        if f"{name} {sides[name][0]}" in found
    }


def _extremes(
    classifier: nn.Module, layers: dict[str, nn.Module], sides: dict[str, tuple[str, ...]], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """By `<name> <side>`."""
    found: dict[str, tuple[float, float]] = {}

    def note(name: str, tensors: dict[str, torch.Tensor]) -> None:
        for side in sides[name]:
            low, high = found.get(f"{name} {side}", (np.inf, -np.inf))
            least, most = (end.item() for end in tensors[side].aminmax())
            found[f"{name} {side}"] = min(low, least), max(high, most)

    _watch(classifier, layers, images, note)
    return found


def _by_histograms(
    classifier: nn.Module,
    layers: dict[str, nn.Module],
    sides: dict[str, tuple[str, ...]],
    images: np.ndarray,
    quantizer: Int8Static,
) -> dict[str, tuple[float, float]]:
    """By `<name> <side>`."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=quantizer.calibration,
        symmetric=False,
        num_bins=BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=quantizer.percentile,
        scenario="same",
    )

    def note(name: str, tensors: dict[str, torch.Tensor]) -> None:
        collector.collect({f"{name} {side}": [tensors[side].cpu().numpy()] for side in sides[name]})

    with redirect_stdout(io.StringIO()):  # it tells its settings aloud
        _watch(classifier, layers, images, note)
        ranges = collector.compute_collection_result()
    return {name: (float(low), float(high)) for name, (low, high, *_) in ranges.items()}


@torch.no_grad()
def hessians(classifier: nn.Module, layers: dict[str, nn.Module], images: np.ndarray) -> dict[str, torch.Tensor]:
    """For each layer by name the sum of x x^T over all inputs of one output value: float32 `[groups, n, n]`."""
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
    """How many images' windows may be laid out at once; one in any case."""
    if isinstance(layer, nn.Linear):
        return len(output)  # its input is laid out as it must be
    windows = layer.groups * layer.weight[0].numel() * output[0, 0].numel() * output.element_size()
    return max(1, LARGEST_WINDOWS // (2 * windows))  # as unfold gives them, and in the order of groups


def _columns(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What each output value sums over, `[groups, n, places]`."""
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
    """Call `note` with a layer's name, `input` and `output` whenever it has run.

    At once, since what follows may work in place, and all layers' activations together may not fit into memory.
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
