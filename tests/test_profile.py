import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score
from toy_project import compressed_project

from stages import profile
from stages.artifacts.artifact import load_artifact, load_classifier
from stages.artifacts.description import read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.datasets.store import open_part
from stages.export.session import open_session, session_logits
from stages.networks.predict import predict_logits
from stages.profiling.corruptions import cells, sample

FP32, INT8 = "toy-none-fp32", "toy-none-int8"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


def set_profile(**settings):
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump(params | {"profile": settings}))


def run(monkeypatch, variant):
    monkeypatch.setattr(sys, "argv", ["profile", variant])
    profile.main()
    folder = paths.profile(variant)
    with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
        predictions = dict(stored)
    return json.loads((folder / "profile.json").read_text()), predictions


@pytest.mark.parametrize("variant", [FP32, INT8])
def test_the_row_agrees_with_the_files_and_predictions(project, monkeypatch, variant, capsys):
    row, predictions = run(monkeypatch, variant)
    assert f"{variant}: top-1 {100 * row['top1']:.2f} % (n = 50)" in capsys.readouterr().out
    folder = paths.compressed(variant)
    onnx, description = folder / "model.onnx", read_description(folder)
    part = open_part(paths.IMAGES, "test")
    batch_size = 1 if variant == INT8 else 64
    logits = session_logits(open_session(onnx, 1), part.images, batch_size)
    torch_classes = predict_logits(load_classifier(folder)[0], part.images, batch_size).argmax(1)

    assert np.array_equal(predictions["label"], part.labels)
    assert np.array_equal(predictions["predicted"], logits.argmax(1))
    assert np.array_equal(predictions["predicted_torch"], torch_classes)
    assert row["top1"] == np.mean(logits.argmax(1) == part.labels)
    assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(part.labels, logits.argmax(1)))
    assert row["agreement"] == np.mean(logits.argmax(1) == torch_classes)
    assert row["n_test"] == len(part) == 50
    assert row["size_bytes"] == onnx.stat().st_size
    assert row["size_gzip_bytes"] == len(gzip.compress(onnx.read_bytes(), 9))
    assert row["artifact_bytes"] == (folder / "model.safetensors").stat().st_size
    assert row["onnx_sha256"] == sha256_of(onnx) == description.onnx["sha256"]
    for key in ("validation_top1", "validation_balanced_accuracy", "n_validation_smallest_class"):
        assert row[key] == description.metrics[key]
    assert row["validation_never_right"] == description.never_right
    assert (row["variant"], row["model"], row["pruner"], row["seed"]) == (variant, "toy", "none", 3)
    assert row["quantizer"] == variant.rpartition("-")[2]
    assert (row["data_name"], row["data_source"], row["image_size"]) == ("noise", "blurred noise", 24)
    assert (paths.profile(variant) / "model.json").read_bytes() == (folder / "model.json").read_bytes()

    # the three sections add up to the file
    assert row["weight_bytes"] + row["scale_bytes"] + row["graph_bytes"] == row["size_bytes"]
    packed = [load_artifact(folder)[0].get_submodule(name) for name in description.layers]
    assert row["scale_bytes"] == sum(5 * layer.out_features for layer in packed)  # a float scale, an integer zero point
    trained = 4 * row["params"] - 3 * sum(layer.in_features * layer.out_features for layer in packed)
    assert row["weight_bytes"] == pytest.approx(trained, rel=0.1)  # equal biases are stored once

    # the layers add up to the row
    with (paths.profile(variant) / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    columns = ["name", "kind", "params", "params_nonzero", "macs", "weight_bits", "activation_bits"]
    assert list(layers[0]) == columns
    for key in ("params", "params_nonzero", "macs"):
        assert sum(int(layer[key]) for layer in layers) == row[key]
    bits = {layer["weight_bits"] for layer in layers if layer["kind"] == "Linear"}
    assert bits == {"8" if variant == INT8 else "32"}


def test_top_2_and_confidence_are_those_of_the_shipped_file(project, monkeypatch):
    _, predictions = run(monkeypatch, FP32)
    part = open_part(paths.IMAGES, "test")
    logits = session_logits(open_session(paths.compressed(FP32) / "model.onnx", 1), part.images, 256)
    expected = torch.softmax(torch.from_numpy(logits), 1).amax(1)
    np.testing.assert_allclose(predictions["confidence"], expected, rtol=1e-5)
    assert np.array_equal(predictions["top2_classes"][:, 0], predictions["predicted"])
    np.testing.assert_allclose(predictions["top2_logits"], np.sort(logits, axis=1)[:, :-3:-1], rtol=1e-5)
    second = np.take_along_axis(logits, predictions["top2_classes"], axis=1)
    np.testing.assert_allclose(second, predictions["top2_logits"], rtol=1e-5)


def test_quantization_changes_the_visible_counts_only(project, monkeypatch):
    (dense, _), (int8, _) = run(monkeypatch, FP32), run(monkeypatch, INT8)
    assert (int8["params"], int8["macs"]) == (dense["params"], dense["macs"])
    assert dense["params_visible"] == dense["params"] > 2 * int8["params_visible"]
    assert dense["macs_visible"] > 1.5 * int8["macs_visible"]
    assert int8["artifact_bytes"] < 0.6 * dense["artifact_bytes"]
    assert int8["bops"] < 0.7 * dense["bops"] == 0.7 * 1024 * dense["macs"]


def test_a_second_run_writes_the_same_bytes(project, monkeypatch):
    run(monkeypatch, INT8)
    first = {path.name: path.read_bytes() for path in paths.profile(INT8).iterdir()}
    run(monkeypatch, INT8)
    assert {path.name: path.read_bytes() for path in paths.profile(INT8).iterdir()} == first
    assert sorted(first) == ["corruptions.npz", "layers.csv", "model.json", "predictions.npz", "profile.json"]


def test_corrupted_images_are_classified_by_the_shipped_file(project, monkeypatch):
    set_profile(corrupted_images=20, corruption_seed=3)
    run(monkeypatch, FP32)
    with np.load(paths.profile(FP32) / "corruptions.npz", allow_pickle=False) as stored:
        found = dict(stored)
    assert found["predicted"].shape == (15, 20)
    assert np.array_equal(found["position"], sample(50, 20, 3))
    session = open_session(paths.compressed(FP32) / "model.onnx", 1)
    images = open_part(paths.IMAGES, "test").images[found["position"]]
    for number, cell in enumerate(cells(images, 3)):
        assert (found["corruption"][number], found["severity"][number]) == (cell.corruption, cell.severity)
        assert np.array_equal(found["predicted"][number], session_logits(session, cell.images, 256).argmax(1))


def test_no_corruptions_where_none_are_asked_for_and_all_images_where_there_are_fewer(project, monkeypatch):
    for asked, shape in ((0, (0, 0)), (1000, (15, 50))):
        set_profile(corrupted_images=asked)
        run(monkeypatch, FP32)
        with np.load(paths.profile(FP32) / "corruptions.npz", allow_pickle=False) as stored:
            assert stored["predicted"].shape == shape
            assert (stored["predicted"].dtype, stored["severity"].dtype) == (np.int64, np.int64)


def test_an_artifact_of_other_images_is_refused_and_the_old_profile_stays(project, monkeypatch):
    run(monkeypatch, FP32)
    before = (paths.profile(FP32) / "profile.json").read_bytes()
    path = paths.IMAGES / "images.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "f" * 64}))
    with pytest.raises(UserError, match="was made from other images"):
        run(monkeypatch, FP32)
    assert (paths.profile(FP32) / "profile.json").read_bytes() == before


def test_a_model_onnx_of_another_artifact_is_refused(project, monkeypatch):
    (paths.compressed(FP32) / "model.onnx").write_bytes((paths.compressed(INT8) / "model.onnx").read_bytes())
    with pytest.raises(UserError, match=r"is not the file that model\.json describes"):
        run(monkeypatch, FP32)


def test_an_unlisted_variant_is_refused(project, monkeypatch):
    with pytest.raises(UserError, match="give one entry of variants"):
        run(monkeypatch, "toy-none-int4")
