import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.artifacts.artifact import load_artifact, load_classifier, save_artifact
from stages.artifacts.description import Description, LayerStorage, parent_of, read_description
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.networks.build import build_network
from stages.networks.dynamic_int8 import dynamic_layers, quantize_linears, unpack_layer
from stages.networks.spec import NetworkSpec

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}
SPEC = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 4)


def describe(**changes):
    fields = {
        "name": "toy",
        "stage": "finetune",
        "model": "toy",
        "network": SPEC,
        "classes": ["a", "b", "c", "d"],
        "image_size": 24,
        "geometry": "crop",
        "input_size": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "data": {"name": "noise", "sha256": "0" * 64},
        "parameters": {},
        "seed": 0,
        "metrics": {"n_validation": 287, "validation_top1": 0.5},
    }
    return Description(**fields | changes)


def network(spec=SPEC):
    torch.manual_seed(0)
    return build_network(spec).eval()


def packed_pair(per_channel=True):
    packed = quantize_linears(network(), per_channel)
    scheme = "symmetric_per_channel" if per_channel else "symmetric_per_tensor"
    return packed, describe(layers={name: LayerStorage(8, 8, scheme) for name in dynamic_layers(packed)})


@pytest.fixture
def folder(tmp_path):
    save_artifact(tmp_path / "toy", network(), describe())
    return tmp_path / "toy"


@torch.no_grad()
def test_a_float_network_comes_back_bit_for_bit(folder):
    loaded, description = load_artifact(folder)
    for name, tensor in network().state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training
    assert description == read_description(folder)
    assert type(description.metrics["n_validation"]) is int
    assert description.tensors["bytes"] == (folder / "model.safetensors").stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_packed_layers_come_back_with_the_same_integers_and_output(tmp_path, per_channel):
    packed, description = packed_pair(per_channel)
    save_artifact(tmp_path / "toy", packed, description)
    loaded, _ = load_artifact(tmp_path / "toy")
    assert dynamic_layers(loaded).keys() == dynamic_layers(packed).keys() == description.layers.keys()
    for name, layer in dynamic_layers(packed).items():
        for part, tensor in unpack_layer(layer).items():
            assert torch.equal(tensor, unpack_layer(dynamic_layers(loaded)[name])[part]), f"{name}.{part}"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(packed(x), loaded(x))
    assert load_file(tmp_path / "toy/model.safetensors")["head.fc.weight"].dtype == torch.int8


@torch.no_grad()
def test_a_classifier_takes_stored_pixels(folder):
    classifier, description = load_classifier(folder)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    expected = network()((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    torch.testing.assert_close(classifier(pixels), expected, rtol=1e-4, atol=1e-5)
    assert description.image_size == 24


def test_saving_leaves_the_network_as_it_was_and_gives_the_same_bytes_again(folder, tmp_path):
    original = network().train()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    save_artifact(tmp_path / "again", original, describe())
    assert original.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    for file in ("model.json", "model.safetensors"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_the_result_of_the_extra_file_stands_in_the_description(tmp_path):
    def write_onnx(folder):
        (folder / "model.onnx").write_bytes(b"graph")
        return {"opset": 20, "quantized_operators": 0}

    save_artifact(tmp_path / "toy", network(), describe(), write_onnx)
    onnx = read_description(tmp_path / "toy").onnx
    sha256 = sha256_of(tmp_path / "toy/model.onnx")
    assert onnx == {"opset": 20, "quantized_operators": 0, "bytes": 5, "sha256": sha256}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_with_broken_weights_is_not_saved_and_the_old_one_stays(folder, value):
    before = (folder / "model.safetensors").read_bytes()
    broken = network()
    with torch.no_grad():
        broken.stem[0].weight[0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"stem\.0\.weight holds NaN or infinite"):
        save_artifact(folder, broken, describe())
    assert (folder / "model.safetensors").read_bytes() == before


def test_another_network_or_a_failing_extra_file_leaves_nothing_behind(tmp_path):
    def fail(folder):
        raise UserError("disagrees")

    with pytest.raises(UserError, match=r"model\.safetensors: "):
        save_artifact(tmp_path / "toy", nn.Linear(3, 4), describe())
    with pytest.raises(UserError, match="disagrees"):
        save_artifact(tmp_path / "toy", network(), describe(), fail)
    assert not list(tmp_path.iterdir())


def rewrite(folder, change):
    raw = json.loads((folder / "model.json").read_text())
    change(raw)
    (folder / "model.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_changed_missing_and_broken_tensors_are_refused(folder, value):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["head.norm.bias"][0] = value
    save_file(state, path)
    with pytest.raises(UserError, match=r"not the file that model\.json describes"):
        load_artifact(folder)
    rewrite(folder, lambda raw: raw["tensors"].update(sha256=sha256_of(path)))
    if math.isfinite(value):
        load_artifact(folder)
    else:
        with pytest.raises(UserError, match=r"toy: head\.norm\.bias holds NaN or infinite values: make it again"):
            load_artifact(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_artifact(folder)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "toy"
    save_artifact(folder, *packed_pair())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=99), "artifact version 99"),
        (lambda raw: raw.pop("classes"), "keys missing: classes"),
        (lambda raw: raw.update(surprise=1), r"surprise.*not permitted|surprise.*[Uu]nexpected"),
        (lambda raw: raw["network"].update(depth=3), r"network.*depth"),
        (lambda raw: raw["network"].update(architecture="convnext_ato"), r"model\.json: network: .*no such classifier"),
        (lambda raw: raw["network"].update(arguments=None), r"model\.json: network\.arguments"),
        (
            lambda raw: raw["network"].update(layer_norm="exact_matmul"),
            r"^[^\n]*model\.json: network\.layer_norm = 'exact_matmul': .*'exact' or 'plain'.*: make it again[^\n]*$",
        ),
        (lambda raw: raw.update(layers=["head.fc"]), r"model\.json: layers: Input should be"),
        (lambda raw: raw["layers"]["head.fc"].pop("scheme"), r"model\.json: layers\.head\.fc\.scheme"),
        (lambda raw: raw.update(seed="0"), r"model\.json: seed = '0': .*integer"),
        (lambda raw: raw.update(mean=[0.5, None, 0.5]), r"model\.json: mean\.1 = None: .*number"),
        (lambda raw: raw.update(tensors={}), r"model\.json: tensors\.sha256 is missing or not of type str"),
        (lambda raw: raw.update(tensors=None), r"model\.json: tensors = None"),
        (lambda raw: raw["tensors"].update(bytes="9"), r"model\.json: tensors\.bytes is missing or not of type int"),
        (lambda raw: raw["data"].pop("sha256"), r"model\.json: data\.sha256 is missing"),
        (lambda raw: raw.update(parent={"name": "toy"}), r"model\.json: parent\.sha256 is missing"),
        (lambda raw: raw.update(onnx={"opset": 20}), r"model\.json: onnx\.sha256 is missing"),
        (lambda raw: raw["network"].update(classes=5), r"packed layer head\.fc is not in the described network"),
        (lambda raw: raw["network"]["arguments"].update(dims=[12, 16, 24, 32]), r"has shape \(8,\), .* needs \(12,\)"),
        (lambda raw: raw["layers"].clear(), r"head\.fc\.weight_scale has shape .* needs none"),
        (lambda raw: raw["layers"].update({"stem.0": raw["layers"]["head.fc"]}), r"packed layer stem\.0 is not in"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(packed_folder, change, message):
    whole = (packed_folder / "model.json").read_bytes()
    rewrite(packed_folder, change)
    try:
        with pytest.raises(UserError, match=message):
            load_artifact(packed_folder)
    finally:
        (packed_folder / "model.json").write_bytes(whole)


def test_a_missing_artifact_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"model\.json is missing: run `dvc repro`"):
        load_artifact(tmp_path / "nothing")


def test_a_child_names_its_parent_by_the_hash_of_the_description(folder):
    description = read_description(folder)
    expected = {"name": "toy", "sha256": sha256_of(folder / "model.json"), "metrics": description.metrics}
    assert parent_of(folder, description) == expected


def test_descriptions_and_sessions_need_no_torch():
    code = "import sys, stages.artifacts.description, stages.export.session; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
