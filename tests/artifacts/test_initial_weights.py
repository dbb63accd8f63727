import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from toy_network import tiny_network, tiny_spec

import stages
from stages.artifacts.artifact import save_artifact
from stages.artifacts.description import Description
from stages.artifacts.initial_weights import load_weights, statistics, unknown_tag
from stages.common.errors import UserError
from stages.networks.build import build_network, spec_of
from stages.networks.spec import NetworkSpec
from stages.params.models import Model

CLASSES = ["cat", "dog", "owl"]
IMAGES = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
SPEC = tiny_spec(len(CLASSES))


def model_with(**changes) -> Model:
    return Model(**{"library": "timm", "architecture": "convnext_atto", "input_size": 32} | changes)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    description = Description(
        name="donor",
        stage="finetune",
        model="donor",
        network=SPEC,
        classes=CLASSES,
        image_size=24,
        geometry="crop",
        input_size=32,
        mean=[0.7, 0.7, 0.7],
        std=[0.2, 0.2, 0.2],
        data={"name": "noise", "sha256": "0"},
        parameters={},
        seed=0,
    )
    save_artifact(tmp_path / "donor", tiny_network(SPEC), description)
    return tmp_path / "donor"


def test_a_file_is_loaded_and_recorded_with_its_hash(tmp_path):
    donor = tiny_network(SPEC).state_dict()
    save_file(donor, tmp_path / "weights.safetensors")
    network = build_network(SPEC)
    record, line = load_weights(network, SPEC, model_with(weights=str(tmp_path / "weights.safetensors")), CLASSES)
    assert all(torch.equal(tensor, donor[name]) for name, tensor in network.state_dict().items())
    assert record.loaded == len(donor)
    assert len(record.sha256) == 64
    assert f"{len(donor)} tensors" in line


def test_an_artifact_gives_its_weights_its_head_and_its_normalization(artifact):
    model = model_with(weights=str(artifact))
    record, _ = load_weights(build_network(SPEC), SPEC, model, CLASSES)
    assert record.fresh == []
    assert statistics(model, IMAGES) == ([0.7, 0.7, 0.7], [0.2, 0.2, 0.2])
    record, _ = load_weights(build_network(SPEC), SPEC, model, ["cat", "dog", "rat"])
    assert record.fresh == ["head.fc.weight", "head.fc.bias"]


def test_a_folder_without_an_artifact_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the folder holds no model\.json"):
        load_weights(build_network(SPEC), SPEC, model_with(weights=str(tmp_path)), CLASSES)


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, IMAGES[0], IMAGES[1]),
        ({"weights": "pretrained"}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"weights": "x.pth"}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"architecture": "tf_efficientnet_lite0", "weights": "x.pth"}, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        (
            {"architecture": "vit_base_patch16_224", "weights": "pretrained", "weights_tag": "dino"},
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        ),
        (
            {"library": "torchvision", "architecture": "resnet50", "weights": "pretrained"},
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        ),
        (
            {"library": "custom", "architecture": "cifar_resnet.py", "weights": "x.pth"},
            [0.485, 0.456, 0.406],
            [0.229, 0.224, 0.225],
        ),
        ({"weights": "x.pth", "normalization": "dataset"}, IMAGES[0], IMAGES[1]),
        ({"normalization": "imagenet"}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ({"normalization": [0.5, [0.1, 0.2, 0.3]]}, [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]),
    ],
)
def test_normalization_is_that_of_the_weights_or_as_the_params_say(changes, mean, std):
    assert statistics(model_with(**changes), IMAGES) == (list(mean), list(std))


def test_gray_images_take_the_mean_of_statistics_for_rgb():
    mean, std = statistics(model_with(normalization="imagenet"), ([0.2], [0.3]))
    assert mean == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
    assert std == [pytest.approx((0.229 + 0.224 + 0.225) / 3)]


def test_statistics_for_another_number_of_channels_are_refused():
    with pytest.raises(UserError, match="2 means and 3 standard deviations for images with 3 channels"):
        statistics(model_with(normalization=[[0.1, 0.2], 0.3]), IMAGES)


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(UserError, match="standard deviation of 0: it must be above 0"):
        statistics(model_with(normalization=[0.5, [0.1, 0.2, 0.0]]), IMAGES)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"weights_tag": "d2_in1k"}, None),
        ({"weights_tag": "foo"}, "convnext_atto has d2_in1k"),
        ({"library": "torchvision", "architecture": "resnet50", "weights_tag": "IMAGENET1K_V2"}, None),
        ({"library": "torchvision", "architecture": "resnet50", "weights_tag": "x"}, "resnet50 has IMAGENET1K_V1, "),
        ({"library": "custom", "architecture": "cifar_resnet.py", "weights_tag": "x"}, "has no pretrained weights"),
    ],
)
def test_an_unknown_tag_is_refused_with_the_known_ones(changes, known):
    found = unknown_tag(model_with(weights="pretrained", **changes))
    assert found is None if known is None else known in found


def test_pretrained_weights_without_network_say_how_to_go_on(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nmore lines")

    network = build_network(SPEC)
    monkeypatch.setattr(timm.models, "model_entrypoint", offline)
    with pytest.raises(UserError, match=r"\(no route to the hub\): without network access, download"):
        load_weights(network, SPEC, model_with(weights="pretrained"), CLASSES)


class Hub(BaseHTTPRequestHandler):
    """The part of the Hugging Face Hub that a download uses."""

    def __init__(self, *args, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_HEAD(self) -> None:
        file = self.folder / self.path.rpartition("/")[2]
        self.send_response(200 if file.is_file() else 404)
        if file.is_file():
            self.send_header("Content-Length", str(file.stat().st_size))
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if (file := self.folder / self.path.rpartition("/")[2]).is_file():
            self.wfile.write(file.read_bytes())

    def log_message(self, *_) -> None:
        pass


SCRIPT = """
import sys
from stages.artifacts.initial_weights import load_weights, statistics
from stages.networks.build import build_network, spec_of
from stages.params.models import Model
model = Model(library="timm", architecture="resnet10t", input_size=32, weights="hf:someone/birds")
spec = spec_of(model, 3)
record, line = load_weights(build_network(spec), spec, model, ["a", "b", "c"])
print(record.loaded, record.fresh, statistics(model, ([0.1] * 3, [0.2] * 3)))
"""


def test_weights_and_normalization_come_from_a_repository_of_the_hub(tmp_path):
    (tmp_path / "hub").mkdir()
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    save_file(state, tmp_path / "hub/model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"mean": [0.3] * 3, "std": [0.9] * 3}}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=tmp_path / "hub")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(stages.__file__).parents[1]),
        }
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True)
        server.shutdown()
    assert done.stdout == f"{len(state)} [] ([0.3, 0.3, 0.3], [0.9, 0.9, 0.9])\n", done.stderr


def test_the_spec_of_a_users_own_network_holds_the_hash_of_its_file():
    model = model_with(library="custom", architecture="cifar_resnet.py")
    assert len(spec_of(model, 3).source_sha256) == 64
    assert spec_of(model_with(), 3) == NetworkSpec("timm", "convnext_atto", {}, 3)
