"""Profile: everything about one variant that does not depend on the machine: counts, sizes, accuracy, predictions.

In:  `params.yaml`, `models/compressed/<variant>/`, the test part of `data/images/` (read by no other stage).
Out: `reports/profile/<variant>/`: `profile.json` (one flat row), `layers.csv`, `predictions.npz` (see `Predictions`),
     `corruptions.npz` (see `Corrupted`) and a copy of `model.json`. The same inputs give the same bytes.
Run: python -m stages.profile <variant>
"""

import gzip
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession

from stages.artifacts.artifact import DESCRIPTION, ONNX, check_onnx, load_classifier
from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import run_stage
from stages.common.files import atomic_folder, sha256_of, write_csv, write_json
from stages.datasets.store import open_part, read_info
from stages.export.session import open_session, session_logits
from stages.networks.predict import predict_logits, top1
from stages.params.base import Base
from stages.params.load import key_argument, load_params
from stages.params.profile import Profile
from stages.params.variants import Joins
from stages.profiling.corruptions import cells, sample
from stages.profiling.counts import LayerCount, count_layers, totals
from stages.profiling.sections import sections
from stages.profiling.visible import macs_visible, params_visible


class Params(Joins):
    base: Base
    profile: Profile = Profile()


@dataclass(frozen=True)
class Predictions:
    """For every test image, in the stored order; the arrays of `predictions.npz`."""

    label: np.ndarray
    """int64 `[N]`."""
    predicted: np.ndarray
    """int64 `[N]`: the class that ONNX Runtime gives."""
    predicted_torch: np.ndarray
    """int64 `[N]`: the class that the PyTorch artifact gives."""
    top2_classes: np.ndarray
    """int64 `[N, 2]`: ONNX Runtime's two most likely classes, the likelier first."""
    top2_logits: np.ndarray
    """float32 `[N, 2]`: their logits."""
    confidence: np.ndarray
    """float32 `[N]`: the probability (softmax) that ONNX Runtime's likeliest class is given."""


@dataclass(frozen=True)
class Corrupted:
    """What ONNX Runtime predicts for corrupted test images; the arrays of `corruptions.npz`."""

    position: np.ndarray
    """int64 `[n]`: which test images, in the stored order."""
    corruption: np.ndarray
    """str `[C]`: the corruption of each cell."""
    severity: np.ndarray
    """int64 `[C]`."""
    predicted: np.ndarray
    """int64 `[C, n]`."""


def profile(
    folder: Path, images: Path, section: Profile, threads: int
) -> tuple[dict[str, object], list[LayerCount], Predictions, Corrupted]:
    """Measure the artifact in `folder` on the test part of `images`.

    Returns:
        The figures of the row, all layers, and all predictions, those on corrupted images apart.

    Raises:
        UserError: if the artifact is missing, broken or made from other images.
    """
    classifier, description = load_classifier(folder)
    info = read_info(images)
    description.require_images(folder, info.sha256)
    session = open_session(folder / ONNX, threads)
    check_onnx(folder, description)
    description.require_metrics(folder, "n_validation", "validation_top1", "validation_agreement")
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
    row = {
        "n_test": len(part),
        "top1": top1(logits, part.labels),
        "top1_torch": top1(torch_logits, part.labels),
        "agreement": float(np.mean(predictions.predicted == predictions.predicted_torch)),
        **{key: description.metrics[key] for key in ("n_validation", "validation_top1", "validation_agreement")},
        **asdict(totals(layers)),
        "params_visible": params_visible(classifier.network),
        "macs_visible": macs_visible(classifier.network, description.input_size),
        "artifact_bytes": description.tensors["bytes"],
        "size_bytes": description.onnx["bytes"],
        "size_gzip_bytes": len(gzip.compress((folder / ONNX).read_bytes(), 9, mtime=0)),
        **asdict(sections(folder / ONNX)),
        "onnx_sha256": description.onnx["sha256"],
        "artifact_sha256": sha256_of(folder / DESCRIPTION),
        "quantized_operators": description.onnx["quantized_operators"],
        "seed": description.seed,
        "library": description.network.library,
        "architecture": description.network.architecture,
        "image_size": description.image_size,
        "input_size": description.input_size,
        "data_name": info.name,
        "data_source": info.source,
        "data_licence": info.licence,
        "data_unreadable": len(info.unreadable),
        "data_sha256": info.sha256,
        "classes": info.classes,
    }
    return row, layers, predictions, _corrupted(session, part.images, batch_size, section)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


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


def main() -> None:
    params = load_params(Params)
    variant = key_argument("variants", params.variants)
    threads = threads_for(params.base.threads)
    torch.set_num_threads(threads)
    folder = paths.compressed(variant)
    measured, layers, predictions, corrupted = profile(folder, paths.IMAGES, params.profile, threads)
    row = {
        "variant": variant,
        "model": params.model_of(variant),
        "pruner": params.pruner_of(variant),
        "quantizer": params.variants[variant].quantizer,
        **measured,
    }
    with atomic_folder(paths.profile(variant)) as unfinished:
        write_json(unfinished / "profile.json", row)
        write_csv(unfinished / "layers.csv", [asdict(layer) for layer in layers])
        np.savez_compressed(unfinished / "predictions.npz", **asdict(predictions))  # numpy dates all entries 1980
        np.savez_compressed(unfinished / "corruptions.npz", **asdict(corrupted))
        shutil.copyfile(folder / DESCRIPTION, unfinished / DESCRIPTION)
    print(
        f"{variant}: top-1 {100 * row['top1']:.2f} % (n = {row['n_test']}), {row['params']:,} parameters,"
        f" {row['macs']:,} MACs, model.onnx {row['size_bytes'] / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    run_stage(main)
