"""Bundle: one folder that an edge device runs without PyTorch.

In:  `params.yaml`, `models/compressed/<variant>/`, the validation part of `data/images/`, and the model card
     `reports/cards/<variant>.md` if the report has written it.
Out: `dist/<variant>/`: `model.onnx`, `bundle.json` (classes, input geometry, hash, confidence threshold), the model
     card as `README.md`, the scripts `predict.py`, `bench.py` and `camera.py` with their modules, pinned requirements.
Run: edgewise bundle <variant> [--accuracy 0.95] [--out dist]
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from stages.artifacts.description import ONNX, Description, check_onnx, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import atomic_folder, clear_disk_errors, write_json, write_text
from stages.datasets.store import open_part, read_info
from stages.edge.device.edgewise_model import BUNDLE, confidences
from stages.edge.selective import Threshold, lowest_threshold, proportion, thresholds
from stages.export.session import open_session, session_logits
from stages.params.edge_benchmark import EdgeBenchmark
from stages.params.load import listed, load_params
from stages.params.variants import Joins

STAGES = Path(__file__).parents[1]
SCRIPTS = ("bench.py", "camera.py", "edgewise_frames.py", "edgewise_model.py", "predict.py")
SOURCES = {
    **{name: STAGES / "edge/device" / name for name in SCRIPTS},
    "edgewise_decode.py": STAGES / "datasets/decode.py",
    "edgewise_machine.py": STAGES / "edge/machine.py",
    "edgewise_protocol.py": STAGES / "edge/protocol.py",
}
"""Files to copy, by their names in the bundle. The same code decodes images there and in the download stage."""
REQUIREMENTS = ("onnxruntime", "numpy", "pillow", "psutil")
CAMERA = "opencv-python-headless"
PRINTED = "printed"  # folder of the printed-sample test within a bundle


class Params(Joins):
    edge_benchmark: EdgeBenchmark = EdgeBenchmark()


def choose_threshold(folder: Path, images: Path, accuracy: float) -> tuple[Threshold, int]:
    """The lowest confidence threshold with which at least `accuracy` of the answers on validation images are right.

    It classifies one image at a time in one thread, as a device does. It also returns the number of validation images,
    and raises a `UserError` with the highest possible accuracy if no threshold reaches `accuracy`.
    """
    part = open_part(images, "validation")
    logits = session_logits(open_session(folder / ONNX, 1), part.images, 1)
    curve = thresholds(confidences(logits), logits.argmax(1) == part.labels)
    if chosen := lowest_threshold(curve, accuracy):
        return chosen, len(part)
    best = max(curve, key=lambda threshold: (threshold.accuracy, threshold.coverage))
    raise UserError(
        f"--accuracy {accuracy:g} is out of reach on {len(part):,} validation images: the highest accuracy is"
        f" {best.accuracy:.4f}, with {100 * best.coverage:.1f} % of them answered: lower it, or choose another variant"
    )


def bundle_json(description: Description, threshold: Threshold, n_validation: int, accuracy: float) -> dict:
    return {
        "variant": description.name,
        "classes": description.classes,
        "image_size": description.image_size,
        "geometry": description.geometry,
        "channels": description.network.channels,
        "levels": description.levels,
        "onnx_sha256": description.onnx["sha256"],
        "confidence_threshold": threshold.confidence,
        "accuracy_asked": accuracy,
        "n_validation": n_validation,
        "validation_answered": threshold.answered,
        "validation_coverage": threshold.coverage,
        "validation_selective_accuracy": threshold.accuracy,
        "data_name": description.data["name"],
        "data_sha256": description.data["sha256"],
        "versions": {"python": platform.python_version()} | {name: pinned(name) for name in (*REQUIREMENTS, CAMERA)},
    }


def pinned(package: str) -> str:
    """The version installed here, with which the tests have run; a `UserError` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{package} is not installed here: run `uv sync --extra camera`, then again") from None


def refuse_other_folder(folder: Path) -> None:
    """Raise a `UserError` if `folder` contains anything but a bundle, because it would be lost."""
    if not folder.exists():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if held - {PRINTED} and BUNDLE not in held:
        raise UserError(f"{folder} already exists and is not a bundle: move it away, or give another --out")


def write_bundle(folder: Path, source: Path, description: Description, content: dict, card: str | None) -> None:
    """Write the bundle, or replace the files of an earlier one after all new files are written.

    `bundle.json` with the hash of the model comes last: a device refuses a mixture of two bundles. A `UserError` says
    that the disk is full or not writable, or that the copied model is not the one described.
    """
    staged = folder / ".new" if folder.exists() else folder
    with atomic_folder(staged) as unfinished:
        shutil.copyfile(source / ONNX, unfinished / ONNX)
        check_onnx(unfinished, description)
        write_json(unfinished / BUNDLE, content)
        if card is not None:
            write_text(unfinished / "README.md", card)
        for name, path in SOURCES.items():
            shutil.copyfile(path, unfinished / name)
        pins = [f"{name}=={pinned(name)}\n" for name in REQUIREMENTS]
        write_text(unfinished / "requirements.txt", "".join(pins))
        write_text(unfinished / "requirements-camera.txt", f"-r requirements.txt\n{CAMERA}=={pinned(CAMERA)}\n")
    if staged == folder:
        return
    with clear_disk_errors(folder):
        if card is None:
            folder.joinpath("README.md").unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == BUNDLE):
            os.replace(path, folder / path.name)
        staged.rmdir()


def read_card(variant: str, onnx_sha256: str) -> tuple[str | None, str]:
    """The model card (None if the report has not written one for this model), and a line for the user about it."""
    path = paths.REPORTS / "cards" / f"{variant}.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else None
    if card is not None and onnx_sha256 in card:
        return card, "README.md is the model card"
    problem = "is missing" if card is None else "describes another model.onnx"
    return None, f"no model card: {path} {problem}; run `dvc repro`, then bundle again"


def accuracy(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a fraction of more than 0 and at most 1, such as 0.95")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variant", help="an entry of variants in params.yaml")
    text = (
        "fraction of the answers that must be right on validation images. The bundle answers only if the top softmax"
        " confidence reaches a threshold, which this sets; otherwise it prints `unsure` (default: 0.95)"
    )
    parser.add_argument("--accuracy", type=accuracy, default=0.95, help=text)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="parent folder of the bundle (default: dist)")


def run(arguments: argparse.Namespace) -> None:
    params = load_params(Params)
    variant = listed("variants", params.variants, arguments.variant)
    source, folder = paths.compressed(variant), arguments.out / variant
    refuse_other_folder(folder)
    description = read_description(source)
    check_onnx(source, description)
    description.require_images(source, read_info(paths.IMAGES).sha256)
    chosen, n_validation = choose_threshold(source, paths.IMAGES, arguments.accuracy)
    card, remark = read_card(variant, description.onnx["sha256"])
    content = bundle_json(description, chosen, n_validation, arguments.accuracy)
    write_bundle(folder, source, description, content, card)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    n_right = round(chosen.accuracy * chosen.answered)
    right = proportion("right", n_right, chosen.answered, params.edge_benchmark.confidence)
    print(
        f"{folder}: {size / 1e6:.2f} MB; confidence threshold {chosen.confidence:.4f}: answers"
        f" {100 * chosen.coverage:.1f} % of {n_validation:,} validation images, and {100 * chosen.accuracy:.2f} %"
        f" of the answers are right [{100 * right['right_ci_low']:.1f}, {100 * right['right_ci_high']:.1f}]"
        f" (--accuracy {arguments.accuracy:g})"
    )
    print(remark)
