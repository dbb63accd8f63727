import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks import architectures
from stages.networks.build import build_network, spec_of
from stages.networks.modules import channels_of, output_positions
from stages.networks.reparameterize import PointwiseLinear
from stages.networks.spec import NetworkSpec
from stages.params.models import Model

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
ATTO = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 4)


def test_timm_and_torchvision_classifiers_are_built_by_name():
    for spec in (ATTO, NetworkSpec("torchvision", "squeezenet1_1", {}, 7)):
        network = build_network(spec).eval()
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, spec.classes)


def test_timms_own_linear_layers_are_torchs():
    assert type(build_network(NetworkSpec("timm", "mobilenetv3_small_050", {}, 3)).classifier) is nn.Linear


def test_a_torchvision_convnext_of_any_size_is_built_from_numbers():
    setting = [[8, 16, 1], [16, None, 2]]
    spec = NetworkSpec("torchvision", "convnext_tiny", {"block_setting": setting, "layer_scale": 1.0}, 3)
    network = build_network(spec).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == [8, 8, 16, 16, 16]
    assert spec.arguments["block_setting"] == setting


def test_the_spec_of_a_model_is_its_entry_in_the_params():
    model = Model(library="timm", architecture="convnext_atto", arguments=ARGUMENTS, input_size=32)
    assert spec_of(model, 4) == ATTO


@pytest.mark.parametrize(
    ("library", "architecture", "arguments", "message"),
    [
        ("timm", "convnext_atto", {"dephts": [1, 1, 1, 1]}, "timm convnext_atto does not take arguments"),
        ("torchvision", "squeezenet1_1", {"width": 3}, "torchvision squeezenet1_1 does not take arguments"),
        ("timm", "convnext_atto", {"in_chans": 1}, "in_chans = 1: is set from .*: set data.channels"),
        ("timm", "convnext_atto", {"num_classes": 10}, "num_classes is set from the images' classes"),
        *(
            ("timm", "convnext_atto", {"drop_path_rate": rate}, "drop_path_rate = .*: must be")
            for rate in (5, -0.1, "x")
        ),
        ("timm", "convnext_tinny", {}, "'convnext_tinny': timm has no such classifier; nearest: .*convnext_tiny"),
        ("torchvision", "convnext_tinny", {}, "'convnext_tinny': torchvision has no .* nearest: .*convnext_tiny"),
    ],
)
def test_unknown_architectures_and_wrong_arguments_are_refused(library, architecture, arguments, message):
    with pytest.raises(UserError, match=message):
        build_network(NetworkSpec(library, architecture, arguments, 4))


@torch.no_grad()
def test_folded_layer_scale_and_linear_pointwise_layers_follow_the_spec():
    spec = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 4, layer_scale_folded=True, pointwise_as_linear=True)
    network = build_network(spec)
    assert not any(name.endswith("gamma") for name, _ in network.named_parameters())
    assert sum(isinstance(module, PointwiseLinear) for module in network.modules()) == 8


def own_network(folder, text, name="own.py"):
    (folder / name).write_text(text)
    return NetworkSpec("custom", name, {}, 4)


OWN = "from torch import nn\ndef build(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear({}, {}))\n"


def test_a_network_of_the_users_own_file_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    own_network(tmp_path, OWN.format("channels * 64", "classes"))
    model = Model(library="custom", architecture="own.py", input_size=8)
    assert build_network(spec_of(model, 4))(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    assert architectures.refused("custom", "own.py", {}, {"input_size": 8}) is None


@pytest.mark.parametrize(
    ("library", "architecture", "arguments"),
    [
        ("timm", "convnext_atto", ARGUMENTS),
        ("torchvision", "resnet18", {}),
        ("torchvision", "vit_b_16", {"image_size": 32}),
        ("custom", "cifar_resnet.py", {"depth": 20}),
    ],
)
def test_a_network_for_gray_images_has_one_channel_in_its_stem_and_nothing_else_is_changed(
    library, architecture, arguments
):
    spec = NetworkSpec(library, architecture, arguments, 4)
    gray, color = (build_network(replace(spec, channels=channels)).eval() for channels in (1, 3))
    assert gray(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    assert (channels_of(gray), channels_of(color)) == (1, 3)
    shapes = {name: (tensor.shape, color.state_dict()[name].shape) for name, tensor in gray.state_dict().items()}
    changed = [(one[1], three[1]) for one, three in shapes.values() if one != three]
    assert changed == [(1, 3)]
    assert output_positions(gray, 32) == output_positions(color, 32)


def test_a_fresh_network_of_torchvision_gives_a_gray_image_the_output_that_it_has_as_rgb():
    spec, outputs = NetworkSpec("torchvision", "resnet18", {}, 4), []
    gray = torch.rand(2, 1, 32, 32)
    for channels in (1, 3):
        torch.manual_seed(0)
        outputs.append(build_network(replace(spec, channels=channels)).eval()(gray.expand(-1, channels, -1, -1)))
    torch.testing.assert_close(*outputs)


def test_a_network_that_takes_no_gray_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    own_network(tmp_path, OWN.format("3 * 64", "classes"))
    assert architectures.refused("custom", "own.py", {}, {"input_size": 8}, 3) is None
    _, reason = architectures.refused("custom", "own.py", {}, {"input_size": 8}, 1)
    assert "takes no gray images of 8 pixels" in reason


def test_a_changed_file_does_not_build_an_older_network(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    own_network(tmp_path, OWN.format("channels * 64", "classes"))
    spec = spec_of(Model(library="custom", architecture="own.py", input_size=8), 4)
    own_network(tmp_path, OWN.format("channels * 16", "classes"))
    with pytest.raises(UserError, match=r"own\.py is not the file that this network was built with"):
        build_network(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package", r"own\.py cannot be imported: ModuleNotFoundError in line 1"),
        ("def build(:", r"own\.py cannot be imported: SyntaxError in line 1"),
        ("x = 1", r"own\.py has no function build"),
        ("def build(classes, channels): return 3", r"own\.py: build returns a int, no nn\.Module"),
        ("def build(classes): return 3", r"does not take arguments .*build\(\) takes 1 positional"),
        (OWN.format("channels * 64", "10"), "gives 10 logits for 7 classes: build must use `classes`"),
        (OWN.format("5", "classes"), "takes no RGB images of 8 pixels"),
    ],
)
def test_a_file_that_builds_no_classifier_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    own_network(tmp_path, text)
    _, reason = architectures.refused("custom", "own.py", {}, {"input_size": 8})
    assert re.search(message, reason), reason


def test_a_file_that_is_not_there_is_refused_with_those_that_are():
    assert "cifar_resnet.py" in architectures.unknown("custom", "../build.py")


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_the_cifar_resnets_have_the_published_number_of_parameters(depth, parameters):
    network = build_network(NetworkSpec("custom", "cifar_resnet.py", {"depth": depth}, 10))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
