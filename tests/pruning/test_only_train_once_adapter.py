import copy
import os
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from cuttable import SMALL, folded, random_half
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.norms import FixedDivisorLayerNorm
from stages.networks.spec import NetworkSpec
from stages.pruning import only_train_once_adapter
from stages.pruning.groups import check_exact, cut_channels, relative_difference
from stages.pruning.only_train_once_adapter import channel_groups


@pytest.fixture
def convnext():
    return folded("timm", "convnext_atto", SMALL | {"conv_mlp": False})


def test_groups_name_each_parameter_once_and_cover_the_residual_stream(convnext):
    network, _ = convnext
    groups = {group.name: group for group in channel_groups(network, 32)}
    assert list(groups) == sorted(groups, key=list(dict(network.named_modules())).index)
    stage = groups["stages.1.downsample.1"]
    assert stage.channels == 12
    makes = [part.name for part in stage.makes]
    assert len(makes) == len(set(makes))
    blocks = [f"stages.1.blocks.{b}.{layer}" for b in (0, 1) for layer in ("conv_dw", "norm", "mlp.fc2")]
    layers = ["stages.1.downsample.1", *blocks, "stages.2.downsample.0"]
    assert set(makes) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    readers = {"stages.1.blocks.0.mlp.fc1.weight", "stages.1.blocks.1.mlp.fc1.weight", "stages.2.downsample.1.weight"}
    assert {part.name for part in stage.reads} == readers
    assert {part.axis for part in stage.reads} == {1}


def test_the_logits_are_in_no_group(convnext):
    network, _ = convnext
    made = {part.name for group in channel_groups(network, 32) for part in group.makes}
    assert not any(name.startswith("head.fc") for name in made)
    assert "head.norm.weight" in made


def test_channels_behind_a_flatten_are_runs_of_features():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.flat_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm1d(64)
            self.hidden, self.head = nn.Linear(4 * 16, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.head(torch.relu(self.hidden(self.flat_norm(x.flatten(1)))))

    network = Flat().eval()
    first, second = channel_groups(network, 4)
    assert [(part.name, part.axis, part.repeat) for part in first.reads] == [("hidden.weight", 1, 16)]
    assert [(part.name, part.repeat) for part in first.makes if "norm" in part.name] == [
        ("norm.weight", 1),
        ("norm.bias", 1),
        ("flat_norm.weight", 16),
        ("flat_norm.bias", 16),
    ]
    assert {part.name: part.repeat for part in first.buffers} == {
        "norm.running_mean": 1,
        "norm.running_var": 1,
        "flat_norm.running_mean": 16,
        "flat_norm.running_var": 16,
    }
    assert [part.name for part in second.reads] == ["head.weight"]


def test_only_norms_that_were_cut_keep_their_divisor_and_without_a_cut_nothing_changes(convnext):
    network, spec = convnext
    groups = channel_groups(network, 32)
    assert groups == channel_groups(network, 32)
    none = {group.name: torch.zeros(group.channels, dtype=torch.bool) for group in groups}
    subnet, same = cut_channels(network, spec, groups, none)
    assert same == spec
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(subnet(x), network(x))
    subnet, smaller = cut_channels(network, spec, groups, none | {"stages.1.downsample.1": torch.arange(12) < 3})
    cut = {name for name, module in subnet.named_modules() if isinstance(module, FixedDivisorLayerNorm)}
    assert cut == {"stages.1.blocks.0.norm", "stages.1.blocks.1.norm", "stages.2.downsample.0"}
    assert smaller.layer_norm_widths == dict.fromkeys(cut, 12)


def test_nothing_is_printed_written_pickled_or_left_behind(convnext, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    mine = type(sys)("graph")
    monkeypatch.setitem(sys.modules, "graph", mine)
    network, spec = convnext
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pickled, pool = [], F.adaptive_avg_pool2d
    writers = [(torch, "save"), (pickle, "dump"), (pickle, "dumps"), (pickle, "Pickler"), (torch.jit, "save")]
    for module, name in writers:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pickled.append(name))
    path, opset = sys.path[:], torch.onnx._internal.torchscript_exporter._globals.GLOBALS.export_onnx_opset_version
    groups = channel_groups(network, 32)
    check_exact(network, spec, groups, 32)
    cut_channels(network, spec, groups, random_half(groups))
    assert pickled == []
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    assert network.training
    assert F.adaptive_avg_pool2d is pool
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert sys.path == path
    assert sys.modules["graph"] is mine
    assert "operation" not in sys.modules
    assert "torch.onnx._globals" not in sys.modules
    assert not hasattr(torch.onnx, "_optimize_graph")
    assert torch.onnx._internal.torchscript_exporter._globals.GLOBALS.export_onnx_opset_version == opset
    from only_train_once.operation import BASIC_MODULES

    assert "LayerNorm2d" not in BASIC_MODULES


@pytest.mark.parametrize(
    ("library", "architecture", "arguments", "message"),
    [
        (
            "torchvision",
            "squeezenet1_1",
            {},
            r"^features\.3\.expand1x1: its channels pass a concatenation.*`allow_partial: true` leaves it whole",
        ),
        (
            "timm",
            "vit_tiny_patch16_224",
            {"img_size": 32, "depth": 1},
            r"^VisionTransformer: only_train_once cannot tell .*the package cannot follow aten::scaled_dot_product_att",
        ),
    ],
)
def test_network_that_cannot_be_pruned_exactly_is_refused_by_name(library, architecture, arguments, message):
    network = build_network(NetworkSpec(library, architecture, arguments, classes=5))
    with pytest.raises(UserError, match=message):
        channel_groups(network, 32)


def test_a_parameter_that_two_layers_share_is_named():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.other.weight = self.one.weight
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.other(torch.relu(self.one(x))).mean((2, 3)))

    with pytest.raises(UserError, match=r"\(one\.weight and other\.weight are one shared parameter\)"):
        channel_groups(Shared(), 8)


def test_the_packages_own_names_for_nodes_do_not_reach_the_user(monkeypatch, convnext):
    def stumble(graph):
        raise KeyError("node-677")

    monkeypatch.setattr(only_train_once_adapter, "_index_neighbors", stumble)
    with pytest.raises(UserError, match="its graph holds operations that the package does not know") as refusal:
        channel_groups(convnext[0], 32)
    assert "677" not in str(refusal.value)


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        ([nn.Flatten(), nn.Linear(3 * 16, 4)], 4, "no channels that could be pruned"),
        (
            [nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 2, 3), nn.Flatten(), nn.Linear(2 * 64, 4)],
            10,
            r"^1: ConvTranspose2d cannot be pruned exactly",
        ),
        (
            [nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 4)],
            6,
            r"^0: a convolution in 3 groups between channels that must stay: not pruned",
        ),
        (
            [nn.Conv2d(3, 6, 3), nn.LayerNorm([6, 4, 4]), nn.Conv2d(6, 4, 4), nn.Flatten(), nn.Linear(4, 2)],
            6,
            r"^1: a LayerNorm over several axes cannot be pruned exactly",
        ),
    ],
)
def test_layers_that_cannot_be_pruned_are_refused_by_name(layers, size, message):
    with pytest.raises(UserError, match=message):
        channel_groups(nn.Sequential(*layers), size)


def test_exact_network_passes_the_proof_and_is_left_as_it_is(convnext):
    network, spec = convnext
    twin = copy.deepcopy(network)
    check_exact(network, spec, channel_groups(network, 32), 32)
    assert relative_difference(twin, network, torch.randn(1, 3, 32, 32)) == 0
