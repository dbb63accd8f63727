"""Printed samples: test images, printed and filmed in simulation, classified as camera.py does.

In:  `params.yaml`, `models/compressed/<variant>/`, the test part of `data/images/` (like the profile stage, it measures
     a finished model).
Out: `dist/<variant>/printed/`: `printed.mp4` with one frame for each image, and `printed.json` with the accuracy on
     these frames and on the stored images.
Run: edgewise printed <variant> [--images 1000] [--seed 0] [--out dist/<variant>/printed]
"""

import argparse
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from stages.artifacts.description import ONNX, check_onnx, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import atomic_folder, write_json
from stages.datasets.decode import decode
from stages.datasets.store import Part, open_part, read_info
from stages.edge.bundle import CAMERA, PRINTED, Params, listed_variant
from stages.edge.selective import proportion
from stages.export.session import open_session, session_logits
from stages.params.load import load_params

VIDEO, RESULT = "printed.mp4", "printed.json"
IMAGES = 1000
"""Default number of images, if the test part has as many."""


def sample(n_test: int, images: int | None, seed: int) -> np.ndarray:
    """Indices of the test images to print: a seeded sample without repetition, in the stored order.

    Raises:
        ValueError: with a message for the user, if the test part has fewer images.
    """
    images = min(IMAGES, n_test) if images is None else images
    if not 1 <= images <= n_test:
        raise ValueError(f"images = {images}: give 1 to {n_test:,}, the size of the test part")
    return np.sort(np.random.default_rng(seed).choice(n_test, images, replace=False))


def printed_test(onnx: Path, part: Part, chosen: np.ndarray, seed: int, confidence: float, video: Path) -> dict:
    """Film the images `chosen` of `part`, play the video and classify its frames.

    Raises:
        UserError: if the video does not play back frame by frame.
    """
    from stages.edge.device.edgewise_frames import CROP, center_square
    from stages.edge.printing import FRAMES_PER_SECOND, Strengths, film, photograph, play

    strengths = Strengths()
    session = open_session(onnx, 1)

    def pictures() -> Iterator[np.ndarray]:
        for index in chosen:
            yield photograph(part.images[index], strengths, np.random.default_rng([seed, int(index)]))

    def class_of(pixels: np.ndarray) -> int:
        return int(session_logits(session, pixels[None], 1)[0].argmax())

    written = film(video, pictures(), strengths.frame_px)
    size, printed = part.images.shape[1], []
    for frame in play(video, written):
        square = frame[center_square(frame, CROP)]
        pixels, _ = decode(np.ascontiguousarray(square[..., ::-1]), size)
        printed.append(class_of(pixels))
    predicted = np.array(printed)
    clean = np.array([class_of(part.images[index]) for index in chosen])
    labels, n = part.labels[chosen], len(chosen)
    return {
        "n_images": n,
        "seed": seed,
        "confidence": confidence,
        **proportion("top1_printed", int((predicted == labels).sum()), n, confidence),
        **proportion("top1_clean", int((clean == labels).sum()), n, confidence),
        "agreement": float((predicted == clean).mean()),
        "video_frames": written,
        "video_frames_per_s": FRAMES_PER_SECOND,
        "video_bytes": video.stat().st_size,
        "crop_fraction": CROP,
        **asdict(strengths),
    }


def printed_row(variant: str, chosen: np.ndarray, seed: int, confidence: float, folder: Path) -> dict:
    """Test the variant on the test images `chosen`, and leave the video in `folder`.

    Raises:
        UserError: if the artifact is missing, broken or made from other images.
    """
    source, info = paths.compressed(variant), read_info(paths.IMAGES)
    description = read_description(source)
    check_onnx(source, description)
    description.require_images(source, info.sha256)
    part = open_part(paths.IMAGES, "test")
    row = {"variant": variant, "onnx_sha256": description.onnx["sha256"], "data_name": info.name}
    row |= {"data_source": info.source, "data_sha256": info.sha256}
    row |= printed_test(source / ONNX, part, chosen, seed, confidence, folder / VIDEO)
    return row | {
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "opencv": importlib.metadata.version(CAMERA),
    }


def require_opencv() -> None:
    """Raises a `UserError` if OpenCV is not installed."""
    if importlib.util.find_spec("cv2") is None:
        raise UserError("OpenCV is not installed here: run `uv sync --extra camera`, then again")


def refuse_other_folder(folder: Path) -> None:
    """Raise a `UserError` if `folder` contains anything but an earlier result, because it would be lost."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {VIDEO, RESULT}):
        raise UserError(f"{folder} contains other files: move them away, or give another --out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variant", help="an entry of variants in params.yaml")
    parser.add_argument("--images", type=int, help=f"number of test images (default: {IMAGES}, or all if fewer)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and the simulation (default: 0)")
    parser.add_argument("--out", type=Path, help="output folder (default: dist/<variant>/printed)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: give 0 or more")
    require_opencv()
    params = load_params(Params)
    variant = listed_variant(params, arguments.variant)
    folder = arguments.out or Path("dist") / variant / PRINTED
    refuse_other_folder(folder)
    try:
        chosen = sample(len(open_part(paths.IMAGES, "test")), arguments.images, arguments.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    with atomic_folder(folder) as unfinished:
        row = printed_row(variant, chosen, arguments.seed, params.edge_benchmark.confidence, unfinished)
        write_json(unfinished / RESULT, row)
    for name, label in (("printed", "printed and filmed"), ("clean", "as stored")):
        low, high = (100 * row[f"top1_{name}_ci_{side}"] for side in ("low", "high"))
        print(f"{label}: top-1 {100 * row[f'top1_{name}']:.2f} % [{low:.2f}, {high:.2f}], n = {row['n_images']:,}")
    print(f"the same class on {100 * row['agreement']:.2f} %; {folder / RESULT}")
