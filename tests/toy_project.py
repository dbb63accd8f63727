"""A project after a run of the pipeline: params, images and a small ConvNeXt's artifacts, made once per process."""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml
from toy_network import tiny_network, tiny_spec

from stages.artifacts.artifact import save_artifact
from stages.artifacts.description import Description
from stages.common import paths
from stages.datasets.store import read_info
from stages.params.load import load_params
from stages.params.whole import Params
from stages.quantize import compress

SIZE, CLASSES = 24, ["zero", "one", "two", "three", "four"]
COUNTS = {"train": 4, "validation": 60, "test": 50}
PARAMS = {
    "base": {"threads": 1},
    "data": {"name": "noise", "source": "digits", "image_size": SIZE, "validation_fraction": 0.2},
    "finetune": {"epochs": 1, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.001},
    "models": {"toy": {"library": "timm", "architecture": "convnext_atto", "input_size": 32, "seed": 3}},
    "pruners": {"none": {"method": "none"}},
    "pruned": {"toy-none": {"model": "toy", "pruner": "none"}},
    "quantizers": {"fp32": {"method": "fp32"}, "int8": {"method": "int8_dynamic"}},
    "variants": {
        "toy-none-fp32": {"pruned": "toy-none", "quantizer": "fp32"},
        "toy-none-int8": {"pruned": "toy-none", "quantizer": "int8"},
    },
    "edge_benchmark": {"warmup_runs": 2, "windows": 2, "window_seconds": 0.02},
}


def pruned_project(folder: Path) -> Path:
    """A project after the prune stage."""
    return shutil.copytree(_pruned(), folder, dirs_exist_ok=True)


def compressed_project(folder: Path) -> Path:
    """A project after the quantize stage of every variant."""
    return shutil.copytree(_compressed(), folder, dirs_exist_ok=True)


@functools.cache
def _pruned() -> Path:
    folder = _temporary_folder()
    (folder / paths.PARAMS).write_text(yaml.safe_dump(PARAMS))
    _write_images(folder / paths.IMAGES)
    spec = tiny_spec(len(CLASSES))
    network = tiny_network(spec)
    description = Description(
        name="toy-none",
        stage="prune",
        model="toy",
        network=spec,
        classes=CLASSES,
        image_size=SIZE,
        geometry="crop",
        input_size=32,
        mean=[0.5, 0.5, 0.5],
        std=[0.25, 0.25, 0.25],
        data=read_info(folder / paths.IMAGES).as_parent(),
        parameters={"method": "none"},
        seed=3,
        metrics={"validation_top1": 0.2, "validation_balanced_accuracy": 0.2},
    )
    save_artifact(folder / paths.pruned("toy-none"), network, description)
    return folder


@functools.cache
def _compressed() -> Path:
    folder = pruned_project(_temporary_folder())
    with contextlib.chdir(folder):  # for checkpoints, since other processes build this project too
        params = load_params(Params, paths.PARAMS)
        for variant, entry in params.variants.items():
            compress(params, variant, paths.pruned(entry.pruned), paths.compressed(variant), paths.IMAGES, 1)
        shutil.rmtree(paths.SCRATCH)
    return folder


def _write_images(folder: Path) -> None:
    """Blurred noise with random labels; on pure noise, the logits would not spread over the classes."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    files = {}
    for part, count in COUNTS.items():
        coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        arrays = {
            "images": coarse.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2),
            "labels": generator.integers(0, len(CLASSES), count),
        }
        for kind, array in arrays.items():
            np.save(folder / f"{part}_{kind}.npy", array)
            files[f"{part}_{kind}.npy"] = hashlib.sha256(array).hexdigest()
    info = {
        "name": "noise",
        "source": "blurred noise",
        "licence": "none needed",
        "image_size": SIZE,
        "geometry": "crop",
        "channels": 3,
        "classes": CLASSES,
        "counts": COUNTS,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "files": files,
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "unreadable": [],
    }
    (folder / "images.json").write_text(json.dumps(info))


_TEMPORARY: list[tempfile.TemporaryDirectory] = []  # removed when the interpreter ends


def _temporary_folder() -> Path:
    _TEMPORARY.append(tempfile.TemporaryDirectory(prefix="toy-project-"))
    return Path(_TEMPORARY[-1].name)
