"""Quantize: from a pruned artifact to what ships, for one variant.

In:  `params.yaml`, `models/pruned/<pruning>/`, the validation part of `data/images/`.
Out: `models/compressed/<variant>/` with `model.onnx`, whose top-1 on the validation part (what selection uses) agrees
     with PyTorch's.
Run: python -m stages.quantize <variant>
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.artifacts.artifact import ONNX, Description, LayerStorage, load_artifact, parent_of, save_artifact
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.params import Quantizer, key_argument, load_params
from stages.datasets.store import Part, open_part, read_info
from stages.export.onnx_file import export_onnx
from stages.export.session import open_session, session_logits, usable_cores
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier
from stages.quantization.dynamic import int8_dynamic

LARGEST_DIFFERENCE = 0.005  # of validation top-1 between ONNX Runtime and PyTorch
ALLOWED_IMAGES = 2  # always: of 200 images, one is half a point


def quantize(network: nn.Module, quantizer: Quantizer) -> tuple[nn.Module, dict[str, LayerStorage]]:
    """The network as `quantizer` stores and computes it, and how each layer that is not float32 is stored."""
    match quantizer.method:
        case "fp32":
            return network, {}
        case "int8_dynamic":
            return int8_dynamic(network, quantizer.per_channel)
    raise UserError(f"quantize: no method {quantizer.method!r}")


def validate(classifier: Classifier, onnx: Path, part: Part, batch_size: int, threads: int) -> dict[str, float]:
    """Compare the written `model.onnx` with the PyTorch classifier on validation images.

    Raises:
        UserError: if their top-1 differ by more than `LARGEST_DIFFERENCE`, and by more than `ALLOWED_IMAGES` images.
    """
    onnx_logits = session_logits(open_session(onnx, threads), part.images, batch_size)
    torch_logits = predict_logits(classifier, part.images, batch_size)
    metrics = {
        "validation_top1": top1(onnx_logits, part.labels),
        "validation_top1_torch": top1(torch_logits, part.labels),
        "validation_agreement": float(np.mean(onnx_logits.argmax(1) == torch_logits.argmax(1))),
        "n_validation": len(part),
    }
    exported, original = metrics["validation_top1"], metrics["validation_top1_torch"]
    difference = abs(exported - original)
    if difference > LARGEST_DIFFERENCE and round(difference * len(part)) > ALLOWED_IMAGES:
        raise UserError(
            f"model.onnx has top-1 {100 * exported:.2f} % on the {len(part)} validation images, PyTorch"
            f" {100 * original:.2f} %: more than {100 * LARGEST_DIFFERENCE:.1f} points apart, not saved; fp32 is the"
            " quantizer that always agrees"
        )
    return metrics


def compress(
    parent_folder: Path, folder: Path, variant: str, quantizer: Quantizer, images: Path, threads: int
) -> Description:
    """Make the artifact `folder` from the one in `parent_folder`, with its checked `model.onnx`.

    Raises:
        UserError: if the parent is missing, broken, quantized already or made from other images, or if `model.onnx`
            disagrees with PyTorch.
    """
    network, parent = load_artifact(parent_folder)
    part = open_part(images, "validation")
    parent.require_images(parent_folder, read_info(images).sha256)
    if parent.layers:
        raise UserError(
            f"{parent_folder} is quantized already ({len(parent.layers)} packed layers): quantize its float parent"
        )
    packed, layers = quantize(network, quantizer)
    description = Description(
        name=variant,
        stage="quantize",
        model=parent.model,
        network=replace(parent.network, pointwise_as_linear=bool(layers) or parent.network.pointwise_as_linear),
        classes=parent.classes,
        image_size=parent.image_size,
        input_size=parent.input_size,
        mean=parent.mean,
        std=parent.std,
        data=parent.data,
        parameters=quantizer.model_dump(),
        seed=parent.seed,
        parent=parent_of(parent_folder, parent),
        layers=layers,
    )
    classifier = Classifier(description.preprocess(), packed).eval()
    batch_size = 1 if layers else EVALUATION_BATCH  # a dynamic scale spans the batch; a device sees one image

    def add_onnx(unfinished: Path) -> dict[str, Any]:
        written = export_onnx(classifier, description.image_size, unfinished / ONNX)
        description.metrics = validate(classifier, unfinished / ONNX, part, batch_size, threads)
        return written

    save_artifact(folder, packed, description, add_onnx)
    return description


def main() -> None:
    params = load_params()
    variant = key_argument("variants", params.variants)
    pruning, quantizer = params.variants[variant].pruning, params.variants[variant].quantizer
    threads = params.base.threads or usable_cores()
    torch.set_num_threads(threads)
    description = compress(
        paths.pruned(pruning),
        paths.compressed(variant),
        variant,
        params.quantize[quantizer],
        paths.IMAGES,
        threads,
    )
    metrics, onnx = description.metrics, description.onnx
    print(
        f"{variant}: model.onnx {onnx['bytes'] / 1e6:.2f} MB, {onnx['quantized_operators']} int8 operators, validation"
        f" top-1 {100 * metrics['validation_top1']:.2f} % (PyTorch {100 * metrics['validation_top1_torch']:.2f} %,"
        f" n = {metrics['n_validation']})"
    )


if __name__ == "__main__":
    run_stage(main)
