"""Measure one compressed artifact on test images: accuracy, every prediction, counts, sizes, robustness."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import InferenceSession

from stages.artifacts.artifact import load_classifier
from stages.artifacts.description import DESCRIPTION, ONNX, check_onnx
from stages.common.files import sha256_of
from stages.datasets.store import open_part, read_info
from stages.export.session import open_session, session_logits
from stages.networks.predict import VALIDATION, accuracy_of, predict_logits, top1
from stages.params.profile import Profile
from stages.profiling.corruptions import cells, sample
from stages.profiling.counts import LayerCount, count_layers, macs_visible, params_visible, totals

SCALING = (".scale", "_scale", "_zero_point")
"""Endings of the names of scales and zero points, including those that ONNX Runtime's quantizer makes."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for N test images in the stored order; the arrays of `predictions.npz`."""

    label: np.ndarray
    """int64 `[N]`."""
    predicted: np.ndarray
    """int64 `[N]`: top-1 class of `model.onnx` in ONNX Runtime."""
    predicted_torch: np.ndarray
    """int64 `[N]`: top-1 class of the PyTorch artifact."""
    top2_classes: np.ndarray
    """int64 `[N, 2]`: ONNX Runtime's two most likely classes, the most likely first."""
    top2_logits: np.ndarray
    """float32 `[N, 2]`: the logits of these classes."""
    confidence: np.ndarray
    """float32 `[N]`: softmax probability of ONNX Runtime's top-1 class."""


@dataclass(frozen=True)
class Corrupted:
    """ONNX Runtime's predictions for n corrupted test images; the arrays of `corruptions.npz`."""

    position: np.ndarray
    """int64 `[n]`: positions of the images among the stored test images."""
    corruption: np.ndarray
    """str `[C]`: corruption of each cell."""
    severity: np.ndarray
    """int64 `[C]`."""
    predicted: np.ndarray
    """int64 `[C, n]`."""


@dataclass(frozen=True)
class Measured:
    """Everything that the profile stage stores about a variant."""

    row: dict[str, Any]
    layers: list[LayerCount]
    predictions: Predictions
    corrupted: Corrupted


def measure(folder: Path, images: Path, section: Profile, threads: int) -> Measured:
    """Measure the artifact in `folder` on the test part of `images`.

    Raises:
        UserError: if the artifact is missing, broken or made from other images.
    """
    classifier, description = load_classifier(folder)
    info = read_info(images)
    description.require_images(folder, info.sha256)
    session = open_session(folder / ONNX, threads)
    check_onnx(folder, description)
    validation = ("n_validation", "n_validation_smallest_class", *VALIDATION, "validation_agreement")
    description.require_metrics(folder, *validation)
    part = open_part(images, "test")
    batch_size = 1 if description.spans_batch() else section.batch_size
    logits = session_logits(session, part.images, batch_size)
    torch_logits = predict_logits(classifier, part.images, batch_size)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    predictions = Predictions(
        label=np.asarray(part.labels, np.int64),
        predicted=logits.argmax(1).astype(np.int64),
        predicted_torch=torch_logits.argmax(1).astype(np.int64),
        top2_classes=order.astype(np.int64),
        top2_logits=np.take_along_axis(logits, order, axis=1),
        confidence=_softmax(logits).max(1),
    )
    layers = count_layers(classifier.network, description.input_size, description.layers)
    row: dict[str, Any] = {
        "n_test": len(part),
        "top1": top1(logits, part.labels),
        "balanced_accuracy": accuracy_of(logits, part.labels).balanced_accuracy,
        "top1_torch": top1(torch_logits, part.labels),
        "agreement": float(np.mean(predictions.predicted == predictions.predicted_torch)),
        **{key: description.metrics[key] for key in validation},
        "validation_never_right": description.never_right,
        **totals(layers),
        "params_visible": params_visible(classifier.network),
        "macs_visible": macs_visible(classifier.network, description.input_size),
        "artifact_bytes": description.tensors["bytes"],
        "size_bytes": description.onnx["bytes"],
        "size_gzip_bytes": len(gzip.compress((folder / ONNX).read_bytes(), 9, mtime=0)),
        **section_bytes(folder / ONNX),
        "onnx_sha256": description.onnx["sha256"],
        "artifact_sha256": sha256_of(folder / DESCRIPTION),
        "quantized_operators": description.onnx["quantized_operators"],
        "seed": description.seed,
        "library": description.network.library,
        "architecture": description.network.architecture,
        "image_size": description.image_size,
        "geometry": description.geometry,
        "channels": description.network.channels,
        "input_size": description.input_size,
        "data_name": info.name,
        "data_source": info.source,
        "data_licence": info.licence,
        "data_unreadable": len(info.unreadable),
        "data_sha256": info.sha256,
        "classes": info.classes,
    }
    return Measured(row, layers, predictions, _corrupted(session, part.images, batch_size, section))


def section_bytes(path: Path) -> dict[str, int]:
    """Split the bytes of an ONNX file without external data into three sections that add up to its size.

    Returns:
        `weight_bytes`, trained numbers as stored, biases and norms included; `scale_bytes`, scales and zero points;
        `graph_bytes`, the rest: operators, names, shapes and the encoding.
    """
    weights = scales = 0
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith(SCALING):
            scales += len(tensor.raw_data)
        elif tensor.data_type != onnx.TensorProto.INT64:  # shapes
            weights += len(tensor.raw_data)
    graph = path.stat().st_size - weights - scales
    return {"weight_bytes": weights, "scale_bytes": scales, "graph_bytes": graph}


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def _corrupted(session: InferenceSession, images: np.ndarray, batch_size: int, section: Profile) -> Corrupted:
    position = sample(len(images), section.corrupted_images, section.corruption_seed)
    found = [
        (cell.corruption, cell.severity, session_logits(session, cell.images, batch_size).argmax(1))
        for cell in (cells(images[position], section.corruption_seed) if len(position) else ())
    ]
    predicted = np.array([classes for *_, classes in found], np.int64).reshape(len(found), len(position))
    return Corrupted(
        position,
        np.array([name for name, *_ in found], np.str_),
        np.array([severity for _, severity, _ in found], np.int64),
        predicted,
    )
