import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import recall_score
from toy_project import CLASSES, compressed_project, pruned_project

from stages import quantize
from stages.artifacts.artifact import load_artifact, load_classifier, save_artifact
from stages.artifacts.description import read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.datasets.store import open_part
from stages.export.session import open_session, session_logits
from stages.networks.dynamic_int8 import dynamic_layers
from stages.networks.pixel_stem import PIXEL_MEAN, PIXEL_STD
from stages.networks.predict import VALIDATION, top1
from stages.params.load import load_params
from stages.params.quantizers import Int8Static
from stages.params.variants import Variant
from stages.params.whole import Params

FP32, INT8 = "toy-none-fp32", "toy-none-int8"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


@pytest.fixture
def unquantized(tmp_path, monkeypatch):
    monkeypatch.chdir(pruned_project(tmp_path))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
    quantize.main()


def test_the_stage_writes_the_whole_artifact(unquantized, monkeypatch, capsys):
    run(monkeypatch, INT8)
    folder = paths.compressed(INT8)
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.onnx", "model.safetensors"]
    description = read_description(folder)
    assert (description.name, description.stage, description.model, description.seed) == (INT8, "quantize", "toy", 3)
    sha256 = sha256_of(paths.pruned("toy-none") / "model.json")
    assert description.parent == {"name": "toy-none", "sha256": sha256, "metrics": dict.fromkeys(VALIDATION, 0.2)}
    assert description.parameters == {"method": "int8_dynamic", "per_channel": True, "exclude": []}
    assert description.onnx["sha256"] == sha256_of(folder / "model.onnx")
    assert re.search(
        r"validation top-1 \d+\.\d\d % \(PyTorch \d+\.\d\d %, n = 60\), balanced accuracy \d+\.\d\d %$",
        capsys.readouterr().out.strip(),
    )


def test_static_int8_that_takes_stored_pixels_is_described_so_and_comes_back(unquantized):
    network, description = load_artifact(paths.pruned("toy-none"))
    save_artifact(paths.pruned("toy-none"), network, replace(description, input_size=48))  # twice the stored 24
    params, folder = load_params(Params), paths.compressed("toy-none-static")
    params.quantizers["static"] = Int8Static(method="int8_static", calibration_images=4, weight_bits=7)
    params.variants["toy-none-static"] = Variant(pruned="toy-none", quantizer="static")
    quantize.compress(params, "toy-none-static", paths.pruned("toy-none"), folder, paths.IMAGES, 1)
    classifier, found = load_classifier(folder)
    assert found.network.pixel_stem == {"stem.0": 2}
    assert (found.mean, found.std, found.input_size, found.image_size) == ([PIXEL_MEAN] * 3, [PIXEL_STD] * 3, 24, 24)
    images = open_part(paths.IMAGES, "validation").images
    logits = session_logits(open_session(folder / "model.onnx", 1), images, 20)
    with torch.no_grad():
        expected = classifier(torch.from_numpy(np.array(images))).numpy()
    assert np.abs(logits - expected).mean() < 0.01 * expected.std()  # on every processor: 7 bits overflow nowhere
    quantize.compress(params, FP32, paths.pruned("toy-none"), paths.compressed(FP32), paths.IMAGES, 1)
    plain = read_description(paths.compressed(FP32))
    assert (plain.network.pixel_stem, plain.input_size, plain.mean) == ({}, 48, [0.5, 0.5, 0.5])


def test_int8_packs_every_linear_layer_and_pointwise_convolution(project):
    network, description = load_artifact(paths.compressed(INT8))
    assert dynamic_layers(network).keys() == description.layers.keys()
    assert len(description.layers) == description.onnx["quantized_operators"] == 9  # 4 blocks of 2, and the head
    assert description.network.pointwise_as_linear
    assert {layer.scheme for layer in description.layers.values()} == {"symmetric_per_channel"}


def test_fp32_stores_the_parent_network_unchanged(project):
    assert (
        read_description(paths.compressed(FP32)).tensors["sha256"]
        == read_description(paths.pruned("toy-none")).tensors["sha256"]
    )
    assert read_description(paths.compressed(FP32)).layers == {}


@pytest.mark.parametrize("variant", [FP32, INT8])
def test_the_stored_validation_figures_are_those_of_the_stored_file(project, variant):
    part = open_part(paths.IMAGES, "validation")
    session = open_session(paths.compressed(variant) / "model.onnx", 1)
    batch_size = 1 if variant == INT8 else 256
    logits = session_logits(session, part.images, batch_size)
    metrics = read_description(paths.compressed(variant)).metrics
    assert metrics["validation_top1"] == top1(logits, part.labels)
    assert metrics["n_validation"] == 60
    recalls = recall_score(part.labels, logits.argmax(1), average=None)
    assert metrics["validation_balanced_accuracy"] == pytest.approx(recalls.mean())
    assert metrics["n_validation_smallest_class"] == min(np.bincount(part.labels))
    never = [name for name, recall in zip(CLASSES, recalls, strict=True) if recall == 0]
    assert read_description(paths.compressed(variant)).never_right == never
    assert metrics["validation_agreement"] > (0.999 if variant == FP32 else 0.9)
    assert abs(metrics["validation_top1"] - metrics["validation_top1_torch"]) <= 0.005
    assert len(np.unique(logits.argmax(1))) > 1


def test_a_model_onnx_that_disagrees_with_pytorch_is_refused_and_the_old_artifact_stays(project, monkeypatch):
    before = (paths.compressed(FP32) / "model.onnx").read_bytes()

    def labels_as_logits(*_):
        return np.eye(5, dtype=np.float32)[open_part(paths.IMAGES, "validation").labels]

    monkeypatch.setattr(quantize, "session_logits", labels_as_logits)
    with pytest.raises(UserError, match=r"more than 0\.5 points apart, not saved"):
        run(monkeypatch, FP32)
    assert (paths.compressed(FP32) / "model.onnx").read_bytes() == before


def test_a_quantized_artifact_is_not_quantized_again(project, tmp_path):
    with pytest.raises(UserError, match="is quantized already"):
        quantize.compress(load_params(Params), INT8, paths.compressed(INT8), tmp_path / "out", paths.IMAGES, 1)
    assert not (tmp_path / "out").exists()


def test_an_artifact_of_other_images_is_refused(unquantized, monkeypatch):
    path = paths.IMAGES / "images.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "f" * 64}))
    with pytest.raises(UserError, match="was made from other images"):
        run(monkeypatch, FP32)


def test_a_missing_parent_is_named(unquantized, monkeypatch):
    (paths.pruned("toy-none") / "model.json").unlink()
    with pytest.raises(UserError, match=r"models/pruned/toy-none/model\.json is missing"):
        run(monkeypatch, FP32)


@pytest.mark.parametrize("arguments", [[], ["toy-none-int4"], [FP32, INT8]])
def test_an_unlisted_variant_is_refused_with_the_listed_ones(unquantized, monkeypatch, arguments):
    with pytest.raises(UserError, match=f"give one entry of variants: {FP32}, {INT8}"):
        run(monkeypatch, *arguments)


def test_the_test_part_is_never_read(unquantized, monkeypatch):
    for path in paths.IMAGES.glob("test_*"):
        path.unlink()
    run(monkeypatch, FP32)
    classifier, _ = load_classifier(paths.compressed(FP32))
    assert not classifier.training
