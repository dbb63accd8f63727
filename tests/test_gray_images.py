"""Every stage and the bundle with letterboxed gray images: tall color photos in, one channel in every file."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from PIL import Image
from toy_bundle import edgewise, on_device

from stages import download, finetune, profile, prune, quantize
from stages.artifacts.artifact import load_artifact
from stages.artifacts.description import read_description
from stages.common import paths
from stages.datasets.decode import decode
from stages.datasets.store import open_part, read_info
from stages.export.session import open_session, session_logits
from stages.profiling.counts import count_layers

VARIANT = "toy-oto50-int8"
PARAMS = {
    "base": {"threads": 1},
    "data": {
        **{"name": "photos", "source": "folder", "location": "photos", "image_size": 16, "validation_fraction": 0.2},
        **{"geometry": "letterbox", "channels": 1},
    },
    "finetune": {
        **{"epochs": 2, "batch_size": 16, "optimizer": "adamw", "learning_rate": 0.002, "crop_padding": 1},
        "trivial_augment": 0.5,
    },
    "models": {
        "toy": {
            **{"library": "timm", "architecture": "convnext_atto", "input_size": 32},
            "arguments": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": False, "ls_init_value": None},
        }
    },
    "pruners": {
        "oto50": {
            "method": "oto",
            "epochs": 2,
            "learning_rate_factor": 0.5,
            "group_sparsity": 0.5,
            "pruning_periods": 1,
        }
    },
    "pruned": {"toy-oto50": {"model": "toy", "pruner": "oto50"}},
    "quantizers": {"int8": {"method": "int8_static", "calibration_images": 16}},
    "variants": {VARIANT: {"pruned": "toy-oto50", "quantizer": "int8"}},
    "profile": {"batch_size": 16, "corrupted_images": 4},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gray")
    (folder / paths.PARAMS).write_text(yaml.safe_dump(PARAMS))
    generator = np.random.default_rng(0)
    for number in range(80):
        red, lower = generator.integers(0, 256, (24, 13, 3), np.uint8), number % 2
        red[12 * lower : 12 * lower + 12] //= 4  # the darker half is the class
        path = folder / f"photos/{'lower' if lower else 'upper'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(red).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage, argument in [
            (download, []),
            (finetune, ["toy"]),
            (prune, ["toy-oto50"]),
            (quantize, [VARIANT]),
            (profile, [VARIANT]),
        ]:
            patch.setattr(sys, "argv", ["stage", *argument])
            stage.main()
        edgewise("bundle", VARIANT, "--accuracy", "0.3")
    return folder


@functools.cache
def class_of(project: Path, pixels: bytes) -> int:
    session = open_session(project / paths.compressed(VARIANT) / "model.onnx", 1)
    return int(session_logits(session, np.frombuffer(pixels, np.uint8).reshape(1, 16, 16, 1), 1)[0].argmax())


def test_every_array_weight_and_file_has_one_channel(project):
    info = read_info(project / paths.IMAGES)
    assert (info.geometry, info.channels, len(info.mean), len(info.std)) == ("letterbox", 1, 1, 1)
    part = open_part(project / paths.IMAGES, "test")
    assert part.images.shape == (16, 16, 16, 1)
    assert (part.images[:, :, :3] == 127).all()  # 13 of 24 columns: bars of 4 and 3 of 16 pixels
    network, description = load_artifact(project / paths.dense("toy"))
    assert network.stem[0].weight.shape == (8, 1, 4, 4)
    assert (description.geometry, description.image_shape) == ("letterbox", (16, 16, 1))
    compressed = read_description(project / paths.compressed(VARIANT))
    assert compressed.network.channels == len(compressed.mean) == 1
    row = json.loads((project / paths.profile(VARIANT) / "profile.json").read_text())
    assert (row["geometry"], row["channels"]) == ("letterbox", 1)
    assert row["agreement"] > 0.8
    [stem, *_] = count_layers(network, 32, {})
    assert stem.macs == 4 * 4 * 8 * 8 * 8  # one channel, 8 filters, 8 by 8 places


def test_the_file_says_how_pictures_become_its_input(project):
    model = onnx.load(project / paths.compressed(VARIANT) / "model.onnx")
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:] == [16, 16, 1]
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        **{"classes": '["lower", "upper"]', "image_size": "16", "geometry": "letterbox", "channels": "gray"},
        "levels": "null",
    }


def test_predict_and_camera_give_the_classes_of_the_pipeline_for_the_original_photos(project):
    folder = project / "dist" / VARIANT
    photos = sorted(project.glob("photos/*/*.png"))
    stored = {
        image.tobytes()
        for part in ("train", "validation", "test")
        for image in open_part(project / paths.IMAGES, part).images
    }
    decoded = [decode(path, 16, "letterbox", 1)[0].tobytes() for path in photos]
    assert set(decoded) == stored
    expected = [read_info(project / paths.IMAGES).classes[class_of(project, pixels)] for pixels in decoded]
    assert len(set(expected)) == 2
    (folder / "bundle.json").write_text(
        json.dumps(json.loads((folder / "bundle.json").read_text()) | {"confidence_threshold": 0.0})
    )
    done = on_device(folder, "predict.py", *photos)
    assert done.returncode == 0, done.stderr
    assert [line.split(": ")[1].split()[0] for line in done.stdout.splitlines()] == expected
    one = project / "one"
    one.mkdir()
    photos[0].rename(one / "a.png")
    done = on_device(folder, "camera.py", "--headless", "--folder", one)
    assert done.stdout.startswith(f"{VARIANT}: geometry letterbox\n1 frames"), done.stderr
    (one / "a.png").rename(photos[0])
    done = on_device(folder, "bench.py", "--seconds", 0.1)
    assert done.returncode == 0, done.stderr


def test_printed_samples_are_filmed_in_color_and_classified_in_gray(project, monkeypatch):
    monkeypatch.chdir(project)
    edgewise("printed", VARIANT, "--images", "4")
    result = json.loads((project / "dist" / VARIANT / "printed" / "printed.json").read_text())
    assert (result["geometry"], result["crop_fraction"], result["video_frames"]) == ("letterbox", 0.7, 4)
