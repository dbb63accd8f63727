"""Calibration images, and what they tell: the ranges of activations, and the second moments of layers' inputs."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.errors import UserError
from stages.common.params import Calibrated, Int8Static
from stages.datasets.store import Part

BATCH = 64
BINS, QUANTIZED_BINS = 1024, 256
"""Of the histograms from which percentiles and entropies are read, and the levels that entropy compares with."""


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

    The smallest and largest value, or what ONNX Runtime's histogram calibrators choose between them.

    Args:
        sides: of each layer, from `input` and `output`.
    """
    wanted = {f"{name} {side}" for name in layers for side in sides[name]}
    if quantizer.calibration == "minmax":
        found = _extremes(classifier, layers, wanted, images)
    else:
        found = _by_histograms(classifier, layers, wanted, images, quantizer)
    return {name: {side: found[f"{name} {side}"] for side in sides[name]} for name in layers}


def _extremes(
    classifier: nn.Module, layers: dict[str, nn.Module], wanted: set[str], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    found = dict.fromkeys(wanted, (np.inf, -np.inf))

    def note(tensors: dict[str, torch.Tensor]) -> None:
        for name in wanted:
            low, high = found[name]
            found[name] = min(low, tensors[name].min().item()), max(high, tensors[name].max().item())

    _watch(classifier, layers, images, note)
    return found


def _by_histograms(
    classifier: nn.Module, layers: dict[str, nn.Module], wanted: set[str], images: np.ndarray, quantizer: Int8Static
) -> dict[str, tuple[float, float]]:
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector(
        method=quantizer.calibration,
        symmetric=False,
        num_bins=BINS,
        num_quantized_bins=QUANTIZED_BINS,
        percentile=quantizer.percentile,
        scenario="same",
    )

    def note(tensors: dict[str, torch.Tensor]) -> None:
        collector.collect({name: [tensors[name].cpu().numpy()] for name in sorted(wanted)})

    with redirect_stdout(io.StringIO()):  # it tells its settings aloud
        _watch(classifier, layers, images, note)
        ranges = collector.compute_collection_result()
    return {name: (float(low), float(high)) for name, (low, high, *_) in ranges.items()}


@torch.no_grad()
def hessians(classifier: nn.Module, layers: dict[str, nn.Module], images: np.ndarray) -> dict[str, torch.Tensor]:
    """For each layer by name the sum of x x^T over all inputs of one output value: float32 `[groups, n, n]`."""
    found: dict[str, torch.Tensor] = {}

    def note(tensors: dict[str, torch.Tensor]) -> None:
        for name, layer in layers.items():
            x = _columns(layer, tensors[f"{name} input"])
            product = x @ x.transpose(1, 2)
            found[name] = found[name] + product if name in found else product

    _watch(classifier, layers, images, note)
    return found


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
    note: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    """Call `note` after every batch with all layers' inputs and outputs, under `<name> input` and `<name> output`."""
    for start in range(0, len(images), BATCH):
        seen: dict[str, torch.Tensor] = {}
        with _hooks(layers, seen):
            classifier(torch.from_numpy(images[start : start + BATCH]))
        note(seen)


@contextmanager
def _hooks(layers: dict[str, nn.Module], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    def hook(name: str) -> Callable:
        def keep(_: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            seen[f"{name} input"], seen[f"{name} output"] = inputs[0], output

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
