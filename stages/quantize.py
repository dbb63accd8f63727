"""Quantize: from a pruned artifact to what ships, for one variant.

In:  `params.yaml`, `models/pruned/<pruning>/`; the validation part of `data/images/`, and the training part where the
     quantizer calibrates or trains.
Out: `models/compressed/<variant>/` with `model.onnx`, whose top-1 on the validation part (what selection uses) agrees
     with PyTorch's; `reports/curves/compressed/<variant>.csv`, empty without training.
Run: python -m stages.quantize <variant>
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.artifacts.artifact import load_artifact, save_artifact
from stages.artifacts.description import ONNX, Description, parent_of
from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.datasets.store import Part, open_part, read_info
from stages.export.onnx_file import export_onnx
from stages.export.session import int8_overflows, open_session, session_logits
from stages.networks.pixel_stem import PIXEL_MEAN, PIXEL_STD
from stages.networks.predict import EVALUATION_BATCH, predict_logits, top1
from stages.networks.preprocess import Classifier
from stages.params.load import key_argument, load_params
from stages.params.quantizers import Bits
from stages.params.whole import Params
from stages.quantization.methods import Quantized, Task, quantize
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.trainer import CURVE_COLUMNS

LARGEST_DIFFERENCE = 0.005  # of validation top-1 between ONNX Runtime and PyTorch
ALLOWED_IMAGES = 2  # always: of 200 images, one is half a point


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
        overflow = (
            "; this processor has no VNNI, so products of 8 bits overflow: int8_static with weight_bits: 7 does not"
            if int8_overflows()
            else ""
        )
        raise UserError(
            f"model.onnx has top-1 {100 * exported:.2f} % on the {len(part)} validation images, PyTorch"
            f" {100 * original:.2f} %: more than {100 * LARGEST_DIFFERENCE:.1f} points apart, not saved; try another"
            f" quantizer for this network, or take the variant out of params.yaml so that the others go on{overflow}"
        )
    return metrics


def compress(
    params: Params, variant: str, parent_folder: Path, folder: Path, images: Path, threads: int
) -> tuple[Quantized, Description | None]:
    """Make the artifact `folder` of a variant from the one in `parent_folder`.

    Of several processes that train together the first one writes it, and the others give back no description.

    Raises:
        UserError: if the parent is missing, broken, quantized already or made from other images, if it cannot be
            quantized so, or if `model.onnx` disagrees with PyTorch.
    """
    network, parent = load_artifact(parent_folder)
    parent.require_images(parent_folder, read_info(images).sha256)
    if parent.layers:
        raise UserError(
            f"{parent_folder} is quantized already ({len(parent.layers)} packed layers): quantize its float parent"
        )
    task = Task(params, variant, network, parent, open_part(images, "train"), open_part(images, "validation"))
    with checkpoint_folder(paths.SCRATCH / "quantize" / variant, task.identity()) as task.checkpoints:
        quantized = quantize(task)
        if not is_main_process():
            return quantized, None
        return quantized, save(task, quantized, parent_of(parent_folder, parent), folder, threads)


def save(task: Task, quantized: Quantized, parent: dict[str, Any], folder: Path, threads: int) -> Description:
    """Write the artifact with its checked `model.onnx`.

    Raises:
        UserError: if `model.onnx` disagrees with PyTorch.
    """
    description = replace(
        task.parent,
        name=task.variant,
        stage="quantize",
        network=replace(
            task.parent.network,
            pointwise_as_linear=quantized.pointwise_as_linear or task.parent.network.pointwise_as_linear,
            pixel_stem=quantized.pixel_stem,
        ),
        parameters=task.quantizer.model_dump(),
        parent=parent,
        layers=quantized.layers,
        float_layers=quantized.float_layers,
        search=quantized.search,
        metrics={},
    )
    if quantized.pixel_stem:
        pixels = {"mean": PIXEL_MEAN, "std": PIXEL_STD, "input_size": task.parent.image_size}
        description = replace(description, **pixels)
    classifier = Classifier(description.preprocess(), quantized.network).eval()
    batch_size = 1 if description.spans_batch() else EVALUATION_BATCH

    def add_onnx(unfinished: Path) -> dict[str, Any]:
        written = export_onnx(classifier, description.image_size, unfinished / ONNX, task.params.export)
        description.metrics = validate(classifier, unfinished / ONNX, task.validation_part, batch_size, threads)
        return written

    save_artifact(folder, quantized.network, description, add_onnx)
    return description


def quantize_one(params: Params, variant: str) -> None:
    threads = threads_for(params.base.threads)
    torch.set_num_threads(threads)
    parent_folder = paths.pruned(params.variants[variant].pruned)
    quantized, description = compress(params, variant, parent_folder, paths.compressed(variant), paths.IMAGES, threads)
    if description is None:
        return
    write_csv(paths.compressed_curve(variant), quantized.curve, CURVE_COLUMNS)
    metrics, onnx = description.metrics, description.onnx
    print(
        f"{variant}: model.onnx {onnx['bytes'] / 1e6:.2f} MB, {onnx['quantized_operators']} int8 operators, validation"
        f" top-1 {100 * metrics['validation_top1']:.2f} % (PyTorch {100 * metrics['validation_top1_torch']:.2f} %,"
        f" n = {metrics['n_validation']})"
    )


def main() -> None:
    params = load_params(Params)
    variant = key_argument("variants", params.variants)
    quantizer = params.quantizers[params.variants[variant].quantizer]
    if not (isinstance(quantizer, Bits) and quantizer.epochs):
        quantize_one(params, variant)
        return
    launch(params.base)
    with process_group(prepare_host(params.base)):
        quantize_one(params, variant)


if __name__ == "__main__":
    run_stage(main)
