from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from stages.artifacts.artifact import load_artifact, load_classifier, save_artifact
from stages.artifacts.description import Description
from stages.export.onnx_file import export_onnx
from stages.export.session import open_session, session_logits
from stages.networks.build import build_network
from stages.networks.predict import predict_logits
from stages.networks.reparameterize import fold_layer_scale
from stages.networks.spec import NetworkSpec
from stages.pruning.groups import cut_channels
from stages.pruning.only_train_once_adapter import channel_groups

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24], "conv_mlp": False}


def cut(architecture: str, form: str) -> tuple[nn.Module, NetworkSpec]:
    torch.manual_seed(0)
    spec = NetworkSpec("timm", architecture, ARGUMENTS, 4, layer_norm=form)
    network = build_network(spec).eval()
    fold_layer_scale(network)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, float("norm.weight" in name), 0.2)
    groups = channel_groups(network, 32)
    pruned = {group.name: torch.arange(group.channels) % 3 == 0 for group in groups}
    pruned["stages.3.downsample.1"][:] = False  # with the norms of its block and of the head
    return cut_channels(network, replace(spec, layer_scale_folded=True), groups, pruned)


def describe(spec: NetworkSpec) -> Description:
    return Description(
        name="toy", stage="prune", model="toy", network=spec, classes=["a", "b", "c", "d"], image_size=24,
        geometry="crop", input_size=32, mean=[0.5] * 3, std=[0.25] * 3, data={"name": "noise", "sha256": "0" * 64},
        parameters={}, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "form"), [("convnext_atto", "exact"), ("convnextv2_atto", "exact"), ("convnext_atto", "plain")]
)
def test_a_cut_network_is_saved_loaded_and_exported_in_each_form(architecture, form, images, tmp_path):
    network, spec = cut(architecture, form)
    save_artifact(tmp_path / "toy", network, describe(spec))
    loaded, description = load_artifact(tmp_path / "toy")
    assert description.network == spec
    assert description.network.layer_norm == form
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))

    classifier, _ = load_classifier(tmp_path / "toy")
    export_onnx(classifier, 24, tmp_path / "model.onnx")
    expected = predict_logits(classifier, images, 20)
    assert expected.std() > 0.1
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 20)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)

    found = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    norms = len([name for name in spec.layer_norm_widths if not name.endswith("grn")])
    dense = build_network(replace(spec, widths={}, layer_norm_widths={}))
    whole = sum(isinstance(module, nn.LayerNorm) for module in dense.modules()) - norms
    assert norms > 0 < whole  # layers that were not cut keep the plain operator
    assert found["LayerNormalization"] == norms + whole
    assert found["Pad"] == found["Slice"] == (norms if form == "exact" else 0)
    assert found["MatMul"] == 8  # two linear layers in each block
    assert found["ReduceMean"] == 1  # the global pooling
    assert not found.keys() & {"Expand", "ConstantOfShape", "Pow"}
