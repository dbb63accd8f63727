"""Bundle: one folder that an edge device runs without PyTorch.

In:  `params.yaml`, `models/compressed/<variant>/`, the validation part of `data/images/`, and the model card
     `reports/cards/<variant>.md` where the report has been made.
Out: `dist/<variant>/`: `model.onnx`, `bundle.json` (classes, image size, hash, the confidence under which it abstains),
     the card as `README.md`, `predict.py`, `bench.py`, `camera.py` with their modules, and pinned requirements.
Run: python -m stages.edge.bundle <variant> [--accuracy 0.95] [--out dist]
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import numpy as np

from stages.artifacts.description import ONNX, Description, check_onnx, read_description
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import atomic_folder, clear_disk_errors, write_json, write_text
from stages.datasets.store import open_part, read_info
from stages.edge.device.edgewise_model import BUNDLE, confidences
from stages.edge.selective import Threshold, best_threshold, lowest_threshold, proportion, thresholds
from stages.export.session import open_session, session_logits
from stages.params.load import load_params
from stages.params.whole import Params

STAGES = Path(__file__).parents[1]
DEVICE = ("bench.py", "camera.py", "edgewise_frames.py", "edgewise_model.py", "predict.py")
SOURCES = {
    **{name: STAGES / "edge/device" / name for name in DEVICE},
    "edgewise_decode.py": STAGES / "datasets/decode.py",
    "edgewise_machine.py": STAGES / "edge/machine.py",
    "edgewise_memory.py": STAGES / "edge/memory.py",
    "edgewise_protocol.py": STAGES / "edge/protocol.py",
}
"""What is copied, by its name in the bundle: images are read there by the code that stored the training images."""
REQUIREMENTS = ("onnxruntime", "numpy", "pillow")
CAMERA = "opencv-python-headless"
PRINTED = "printed"
"""Folder of the printed-sample test within a bundle."""
CARD = "README.md"


def listed_variant(params: Params, variant: str) -> str:
    """Raises a `UserError` where the params do not list it."""
    if variant not in params.variants:
        raise UserError(f"{variant!r}: give one entry of variants: {', '.join(params.variants)}")
    return variant


def choose_threshold(folder: Path, images: Path, accuracy: float) -> tuple[Threshold, int]:
    """The lowest confidence from which on `accuracy` of the validation images that are answered are right.

    One image at a time in one thread, as on a device.

    Returns:
        The threshold, and the number of validation images.

    Raises:
        UserError: if no threshold reaches `accuracy`: with the nearest that can be had.
    """
    part = open_part(images, "validation")
    logits = session_logits(open_session(folder / ONNX, 1), part.images, 1)
    curve = thresholds(confidences(logits), logits.argmax(1) == part.labels)
    if (chosen := lowest_threshold(curve, accuracy)) is None:
        best = best_threshold(curve)
        raise UserError(
            f"--accuracy {accuracy:g} cannot be reached on {len(part):,} validation images: the nearest is"
            f" {best.accuracy:.4f} on {100 * best.coverage:.1f} % of them (confidence {best.confidence:.4f} or more):"
            f" ask for less, or for another variant"
        )
    return chosen, len(part)


def bundle_json(description: Description, threshold: Threshold, n_validation: int, accuracy: float) -> dict:
    versions = {name: pinned(name) for name in (*REQUIREMENTS, CAMERA)}
    return {
        "variant": description.name,
        "classes": description.classes,
        "image_size": description.image_size,
        "onnx_sha256": description.onnx["sha256"],
        "confidence_threshold": threshold.confidence,
        "accuracy_asked": accuracy,
        "n_validation": n_validation,
        "validation_answered": threshold.answered,
        "validation_coverage": threshold.coverage,
        "validation_selective_accuracy": threshold.accuracy,
        "data_name": description.data["name"],
        "data_sha256": description.data["sha256"],
        "versions": {"python": platform.python_version(), **versions},
    }


def pinned(package: str) -> str:
    """The version that is installed here: the one that the tests have run with."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"{package} is not installed here, so there is no version to pin: run `uv sync --extra camera`, then again"
        ) from None


def refuse_other_folder(folder: Path) -> None:
    """Raise a `UserError` where `folder` holds something else than a bundle: it would be lost."""
    if not folder.exists():
        return
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if held - {PRINTED} and BUNDLE not in held:
        raise UserError(f"{folder} is there already and is no bundle: move it away, or give another --out")


def write_bundle(folder: Path, source: Path, description: Description, content: dict, card: str | None) -> None:
    """Write a new folder, or a new bundle over the former one in it: what else lies there stays.

    Nothing is replaced before all is written, and `bundle.json`, which has the model's hash, comes last: a device
    refuses what is half one bundle and half another.

    Raises:
        UserError: if there is no room or no access, or the copied model is not the one described.
    """
    staged = folder / ".new" if folder.exists() else folder
    with atomic_folder(staged) as unfinished:
        shutil.copyfile(source / ONNX, unfinished / ONNX)
        check_onnx(unfinished, description)
        write_json(unfinished / BUNDLE, content)
        if card is not None:
            write_text(unfinished / CARD, card)
        for name, path in SOURCES.items():
            shutil.copyfile(path, unfinished / name)
        pins = [f"{name}=={pinned(name)}\n" for name in REQUIREMENTS]
        write_text(unfinished / "requirements.txt", "".join(pins))
        write_text(unfinished / "requirements-camera.txt", f"-r requirements.txt\n{CAMERA}=={pinned(CAMERA)}\n")
    if staged == folder:
        return
    with clear_disk_errors(folder):
        if card is None:
            folder.joinpath(CARD).unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == BUNDLE):
            os.replace(path, folder / path.name)
        staged.rmdir()


def read_card(variant: str, onnx_sha256: str) -> tuple[str | None, str]:
    """The model card, None where the report has written none for this very model; and a line that says so."""
    path = paths.REPORTS / "cards" / f"{variant}.md"
    if not path.is_file():
        return None, f"no model card: {path} is missing; `dvc repro` writes it, then bundle again"
    card = path.read_text(encoding="utf-8")
    if onnx_sha256 not in card:
        return None, f"no model card: {path} is about another model.onnx; `dvc repro` writes it anew, then bundle again"
    return card, "README.md is the model card"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.edge.bundle", description="Write what a device runs.")
    parser.add_argument("variant")
    parser.add_argument(
        "--accuracy",
        type=float,
        default=0.95,
        help="share of the answers that has to be right; what is less certain is not answered (default: 0.95)",
    )
    parser.add_argument("--out", type=Path, default=Path("dist"), help="the bundle is a folder in it (default: dist)")
    arguments = parser.parse_args()
    if not 0 < arguments.accuracy <= 1:
        parser.error("--accuracy: more than 0 and at most 1")
    return arguments


def main() -> None:
    arguments = parse()
    params = load_params(Params)
    variant = listed_variant(params, arguments.variant)
    source, folder = paths.compressed(variant), arguments.out / variant
    refuse_other_folder(folder)
    description = read_description(source)
    check_onnx(source, description)
    description.require_images(source, read_info(paths.IMAGES).sha256)
    threshold, n_validation = choose_threshold(source, paths.IMAGES, arguments.accuracy)
    card, remark = read_card(variant, description.onnx["sha256"])
    content = bundle_json(description, threshold, n_validation, arguments.accuracy)
    write_bundle(folder, source, description, content, card)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    are_right = np.arange(threshold.answered) < round(threshold.accuracy * threshold.answered)
    right = proportion("right", are_right, params.report.confidence)
    print(
        f"{folder}: {size / 1e6:.2f} MB; answers from confidence {threshold.confidence:.4f} on:"
        f" {100 * threshold.coverage:.1f} % of {n_validation:,} validation images, {100 * threshold.accuracy:.2f} % of"
        f" them right [{100 * right['right_ci_low']:.1f}, {100 * right['right_ci_high']:.1f}] (asked:"
        f" {100 * arguments.accuracy:g} %)"
    )
    print(remark)


if __name__ == "__main__":
    run_stage(main)
