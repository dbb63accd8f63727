"""Printed samples: test images, printed and filmed in simulation, classified as `camera.py --crop 0.7` does.

In:  `params.yaml`, `models/compressed/<variant>/`, the test part of `data/images/` (like the profile stage, it measures
     a finished model).
Out: `dist/<variant>/printed/`: `printed.mp4` with one frame for each image, and `printed.json` with the accuracy on
     these frames and on the stored images.
Run: edgewise printed <variant> [--images 1000] [--seed 0] [--out dist/<variant>/printed]
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from stages.artifacts.description import ONNX, check_onnx, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import atomic_folder, write_json
from stages.datasets.decode import decode
from stages.datasets.store import open_part, read_info
from stages.edge.bundle import CAMERA, PRINTED, Params, pinned
from stages.edge.selective import proportion
from stages.export.session import open_session, session_logits
from stages.params.load import listed, load_params

VIDEO, RESULT = "printed.mp4", "printed.json"
IMAGES = 1000  # default number of images, if the test part has as many


def sample(n_test: int, images: int | None, seed: int) -> np.ndarray:
    """Sorted indices of a seeded sample of the test images; a `ValueError` for the user if there are not so many."""
    images = min(IMAGES, n_test) if images is None else images
    if not 1 <= images <= n_test:
        raise ValueError(f"images = {images}: give 1 to {n_test:,}, the size of the test part")
    return np.sort(np.random.default_rng(seed).choice(n_test, images, replace=False))


def printed_row(variant: str, chosen: np.ndarray, seed: int, confidence: float, folder: Path) -> dict:
    """Film the test images `chosen`, leave the video in `folder`, play it and classify its frames.

    Raises a `UserError` if the artifact is missing, broken or made from other images, or the video does not play.
    """
    from stages.edge.device.edgewise_frames import center
    from stages.edge.printing import FRAMES_PER_SECOND, Strengths, film, photograph, play

    source, info = paths.compressed(variant), read_info(paths.IMAGES)
    description = read_description(source)
    check_onnx(source, description)
    description.require_images(source, info.sha256)
    part, strengths, session = open_part(paths.IMAGES, "test"), Strengths(), open_session(source / ONNX, 1)

    crop = strengths.print_px / strengths.frame_px  # the camera points at the print

    def class_of(pixels: np.ndarray) -> int:
        return int(session_logits(session, pixels[None], 1)[0].argmax())

    pictures = (photograph(part.images[i], strengths, np.random.default_rng([seed, int(i)])) for i in chosen)
    written = film(folder / VIDEO, pictures, strengths.frame_px)
    printed = []
    for frame in play(folder / VIDEO, written):
        seen = np.ascontiguousarray(frame[center(frame, crop)][..., ::-1])
        pixels, _ = decode(seen, info.image_size, info.geometry, info.channels)
        printed.append(class_of(pixels))
    predicted, clean = np.array(printed), np.array([class_of(part.images[index]) for index in chosen])
    labels, n = part.labels[chosen], len(chosen)
    return {
        "variant": variant,
        "onnx_sha256": description.onnx["sha256"],
        "data_name": info.name,
        "data_source": info.source,
        "data_sha256": info.sha256,
        "n_images": n,
        "seed": seed,
        "confidence": confidence,
        **proportion("top1_printed", int((predicted == labels).sum()), n, confidence),
        **proportion("top1_clean", int((clean == labels).sum()), n, confidence),
        "agreement": float((predicted == clean).mean()),
        "video_frames": written,
        "video_frames_per_s": FRAMES_PER_SECOND,
        "video_bytes": (folder / VIDEO).stat().st_size,
        "geometry": info.geometry,
        "crop_fraction": crop,
        **asdict(strengths),
        "onnxruntime": pinned("onnxruntime"),
        "opencv": pinned(CAMERA),
    }


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
    pinned(CAMERA)
    params = load_params(Params)
    variant = listed("variants", params.variants, arguments.variant)
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
