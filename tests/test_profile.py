import csv
import gzip
import json
import sys

import numpy as np
import pytest
from toy_project import compressed_project

from stages import profile
from stages.artifacts.artifact import load_classifier, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.datasets.store import open_part
from stages.export.session import open_session, session_logits
from stages.networks.predict import predict_logits

FP32, INT8 = "toy-none-fp32", "toy-none-int8"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


def run(monkeypatch, variant):
    monkeypatch.setattr(sys, "argv", ["profile", variant])
    profile.main()
    folder = paths.profile(variant)
    with np.load(folder / "predictions.npz", allow_pickle=False) as stored:
        predictions = dict(stored)
    return json.loads((folder / "profile.json").read_text()), predictions


@pytest.mark.parametrize("variant", [FP32, INT8])
def test_the_row_says_what_the_files_and_predictions_say(project, monkeypatch, variant, capsys):
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
    assert row["agreement"] == np.mean(logits.argmax(1) == torch_classes)
    assert row["n_test"] == len(part) == 50
    assert row["size_bytes"] == onnx.stat().st_size
    assert row["size_gzip_bytes"] == len(gzip.compress(onnx.read_bytes(), 9))
    assert row["artifact_bytes"] == (folder / "model.safetensors").stat().st_size
    assert row["onnx_sha256"] == sha256_of(onnx) == description.onnx["sha256"]
    assert row["validation_top1"] == description.metrics["validation_top1"]
    assert (row["variant"], row["model"], row["pruner"], row["seed"]) == (variant, "toy", "none", 3)
    assert row["quantizer"] == variant.rpartition("-")[2]
    assert (row["data_name"], row["data_source"], row["image_size"]) == ("noise", "blurred noise", 24)
    assert (paths.profile(variant) / "model.json").read_bytes() == (folder / "model.json").read_bytes()


def test_the_two_largest_logits_are_stored_in_order(project, monkeypatch):
    _, predictions = run(monkeypatch, FP32)
    part = open_part(paths.IMAGES, "test")
    logits = session_logits(open_session(paths.compressed(FP32) / "model.onnx", 1), part.images, 256)
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


def test_layers_add_up_to_the_row(project, monkeypatch):
    row, _ = run(monkeypatch, INT8)
    with (paths.profile(INT8) / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    columns = ["name", "kind", "params", "params_nonzero", "macs", "weight_bits", "activation_bits"]
    assert list(layers[0]) == columns
    for key in ("params", "params_nonzero", "macs"):
        assert sum(int(layer[key]) for layer in layers) == row[key]
    assert {layer["weight_bits"] for layer in layers if layer["kind"] == "Linear"} == {"8"}


def test_a_second_run_writes_the_same_bytes(project, monkeypatch):
    run(monkeypatch, INT8)
    first = {path.name: path.read_bytes() for path in paths.profile(INT8).iterdir()}
    run(monkeypatch, INT8)
    assert {path.name: path.read_bytes() for path in paths.profile(INT8).iterdir()} == first
    assert sorted(first) == ["layers.csv", "model.json", "predictions.npz", "profile.json"]


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
