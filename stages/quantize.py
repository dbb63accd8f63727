"""Quantize: turn a pruned artifact into the artifact that ships, for one entry of `variants`.

In:  `params.yaml` (`base`, `export`, `finetune`, `variants.<variant>`, `quantizers.<quantizer>`, `report.metric`),
     `models/pruned/<pruned>/`; the validation part of `data/images/`, and the training part if the quantizer calibrates
     or trains.
Out: `models/compressed/<variant>/` with `model.onnx`, whose top-1 on the validation part (the figure for selection)
     agrees with PyTorch's; `reports/curves/compressed/<variant>.csv`, empty without training.
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
from stages.networks.predict import EVALUATION_BATCH, Accuracy, accuracy_of, predict_logits, top1
from stages.networks.preprocess import Classifier
from stages.params.base import Base
from stages.params.export import Export
from stages.params.finetune import Finetune
from stages.params.load import key_argument, load_params
from stages.params.metric import Metric
from stages.params.quantizers import Bits, Quantizer
from stages.params.section import Name, Section
from stages.params.variants import Variant
from stages.quantization.methods import Quantized, quantize
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import is_main_process, launch, process_group
from stages.training.host import prepare_host
from stages.training.session import Session
from stages.training.trainer import CURVE_COLUMNS

LARGEST_DIFFERENCE = 0.005
"""Largest difference of validation top-1 between ONNX Runtime and PyTorch."""
ALLOWED_IMAGES = 2
"""Differing images that are always allowed: of 200 images, one is half a point."""


class Params(Section):
    base: Base
    export: Export = Export()
    finetune: Finetune
    variants: dict[Name, Variant]
    quantizers: dict[Name, Quantizer]
    report: Metric = Metric()


def validate(
    classifier: Classifier, onnx: Path, part: Part, batch_size: int, threads: int
) -> tuple[Accuracy, dict[str, float]]:
    """Compare the written `model.onnx` with the PyTorch classifier on validation images.

    Returns:
        The accuracy of `model.onnx`, and the metrics of the artifact.

    Raises:
        UserError: If their top-1 differs by more than `LARGEST_DIFFERENCE`, and by more than `ALLOWED_IMAGES` images.
    """
    onnx_logits = session_logits(open_session(onnx, threads), part.images, batch_size)
    torch_logits = predict_logits(classifier, part.images, batch_size)
    accuracy = accuracy_of(onnx_logits, part.labels)
    metrics = accuracy.metrics | {
        "validation_top1_torch": top1(torch_logits, part.labels),
        "validation_agreement": float(np.mean(onnx_logits.argmax(1) == torch_logits.argmax(1))),
        "n_validation": len(part),
        "n_validation_smallest_class": int(accuracy.images[accuracy.images > 0].min()),
    }
    exported, original = metrics["validation_top1"], metrics["validation_top1_torch"]
    difference = abs(exported - original)
    if difference > LARGEST_DIFFERENCE and round(difference * len(part)) > ALLOWED_IMAGES:
        overflow = (
            "; products of 8 bits overflow on this processor (no VNNI); those of int8_static with weight_bits: 7 do not"
            if int8_overflows()
            else ""
        )
        raise UserError(
            f"model.onnx has top-1 {100 * exported:.2f} % on the {len(part)} validation images, PyTorch"
            f" {100 * original:.2f} %: more than {100 * LARGEST_DIFFERENCE:.1f} points apart, not saved; try another"
            f" quantizer for this network, or remove the variant from params.yaml so that the others run{overflow}"
        )
    return accuracy, metrics


def compress(
    params: Params, variant: str, parent_folder: Path, folder: Path, images: Path, threads: int
) -> tuple[Quantized, Description | None]:
    """Make the artifact `folder` of a variant from the one in `parent_folder`.

    If several processes train together, the first one writes it and the others return no description.

    Raises:
        UserError: If the parent is missing, broken, quantized already or made from other images, if it cannot be
            quantized in this way, or if `model.onnx` disagrees with PyTorch.
    """
    network, parent = load_artifact(parent_folder)
    parent.require_images(parent_folder, read_info(images).sha256)
    if parent.layers:
        raise UserError(
            f"{parent_folder} is quantized already ({len(parent.layers)} packed layers): quantize its float parent"
        )
    name = params.variants[variant].quantizer
    session = Session(
        stage="quantize",
        key=variant,
        network=network,
        parent=parent,
        settings=params.quantizers[name],
        param=f"quantizers.{name}",
        base=params.base,
        finetune=params.finetune,
        metric=params.report.metric,
        train_part=open_part(images, "train"),
        validation_part=open_part(images, "validation"),
    )
    with checkpoint_folder(paths.SCRATCH / "quantize" / variant, session.identity()) as session.checkpoints:
        quantized = quantize(session)
        if not is_main_process():
            return quantized, None
        return quantized, save(session, quantized, parent_of(parent_folder, parent), params.export, folder, threads)


def save(
    session: Session, quantized: Quantized, parent: dict[str, Any], export: Export, folder: Path, threads: int
) -> Description:
    """Write the artifact with its checked `model.onnx`.

    Raises:
        UserError: If `model.onnx` disagrees with PyTorch.
    """
    source = session.parent
    network = replace(
        source.network,
        pointwise_as_linear=quantized.pointwise_as_linear or source.network.pointwise_as_linear,
        pixel_stem=quantized.pixel_stem,
    )
    description = replace(
        source,
        name=session.key,
        stage="quantize",
        network=network,
        parameters=session.settings.model_dump(),
        parent=parent,
        layers=quantized.layers,
        float_layers=quantized.float_layers,
        search=quantized.search,
        metrics={},
    )
    if quantized.pixel_stem:
        n = source.network.channels
        description = replace(description, mean=[PIXEL_MEAN] * n, std=[PIXEL_STD] * n, input_size=source.image_size)
    classifier = Classifier(description.preprocess(), quantized.network).eval()
    batch_size = 1 if description.spans_batch() else EVALUATION_BATCH

    def add_onnx(unfinished: Path) -> dict[str, Any]:
        written = export_onnx(classifier, description.image_size, unfinished / ONNX, export, description.metadata())
        onnx, names = unfinished / ONNX, description.classes
        accuracy, description.metrics = validate(classifier, onnx, session.validation_part, batch_size, threads)
        description.never_right = accuracy.never_right(names)
        for line in accuracy.warnings(names, source.never_right):
            print(f"{session.key}: warning: {line}")
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
        f" n = {metrics['n_validation']}), balanced accuracy {100 * metrics['validation_balanced_accuracy']:.2f} %"
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
