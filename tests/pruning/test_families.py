import json
from dataclasses import asdict, replace

import pytest
import torch
import torchvision
from cuttable import SMALL, TOY, builder, digits, folded, random_half, randomize
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec
from stages.pruning.costs import costs_of
from stages.pruning.groups import check_exact, cut_channels, relative_difference, zero_channels
from stages.pruning.only_train_once_adapter import channel_groups, exact_groups

TOLERANCE = 1e-4  # of the logits' scale
THIN_VGG = {"mlp_ratio": 1 / 64}  # narrows the head's hidden layer, which holds 9 of 10 weights at ratio 1

FAMILIES = [
    ("timm", "convnext_atto", SMALL | {"conv_mlp": True, "ls_init_value": None}),
    ("timm", "convnext_atto", SMALL | {"conv_mlp": True, "ls_init_value": 0.1}),
    ("timm", "convnext_atto", SMALL | {"conv_mlp": False, "ls_init_value": None}),
    ("timm", "convnext_atto", SMALL | {"conv_mlp": False, "ls_init_value": 0.1}),
    ("timm", "convnext_base", {"depths": (1, 1, 1, 1)}),
    ("torchvision", "convnext_tiny", {"block_setting": [[8, 12, 1], [12, 16, 1], [16, 20, 2], [20, None, 1]]}),
    ("timm", "convnextv2_atto", SMALL | {"conv_mlp": True}),
    ("timm", "convnextv2_atto", SMALL | {"conv_mlp": False}),
    ("timm", "resnet18", {}),
    ("timm", "resnet50", {"layers": (1, 2, 1, 1)}),
    ("torchvision", "resnet18", {}),
    ("torchvision", "resnext50_32x4d", {}),
    ("timm", "vgg11_bn", THIN_VGG),
    ("timm", "regnety_002", {}),
    ("torchvision", "regnet_y_400mf", {}),
    ("timm", "mobilenetv3_small_100", {}),
    ("torchvision", "mobilenet_v3_small", {}),
    ("timm", "efficientnet_b0", {}),
    ("torchvision", "efficientnet_b0", {}),
]


@torch.no_grad()
def assert_cut_is_exact(network: nn.Module, spec: NetworkSpec, size: int) -> tuple[nn.Module, NetworkSpec]:
    groups, whole = exact_groups(network, spec, size, allow_partial=False)
    assert whole == []
    x = digits(size)
    dense = network(x)
    pruned = random_half(groups)
    zero_channels(network, groups, pruned)
    subnet, smaller = cut_channels(network, spec, groups, pruned)
    zeroed = network(x)
    assert (dense - zeroed).abs().max() > 0.1 * dense.abs().max()  # the zeroing is not trivial
    assert relative_difference(network, subnet, x) < TOLERANCE
    before = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in subnet.parameters()) < 0.5 * before
    return subnet, smaller


@pytest.mark.parametrize(
    ("library", "architecture", "arguments"), FAMILIES, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_subnet_equals_the_zeroed_network_on_real_images(library, architecture, arguments):
    network, spec = folded(library, architecture, arguments)
    subnet, smaller = assert_cut_is_exact(network, spec, 32)
    again = build_network(NetworkSpec(**json.loads(json.dumps(asdict(smaller))))).eval()
    again.load_state_dict(subnet.state_dict())
    assert torch.equal(again(digits(32)), subnet(digits(32)))


def test_torchvisions_vgg_with_its_flattening_head_is_cut_exactly(monkeypatch):
    class Vgg(torchvision.models.VGG):
        def __init__(self) -> None:
            nn.Module.__init__(self)  # the library's own would build a head of 120 million weights first
            self.features = torchvision.models.vgg.make_layers([8, "M", 12, 16, "M", "M"], batch_norm=True)
            self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
            hidden = nn.Linear(16 * 49, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 24), nn.ReLU(), nn.Dropout()
            self.classifier = nn.Sequential(*hidden, nn.Linear(24, 4))

    monkeypatch.setattr("stages.pruning.groups.build_network", builder(Vgg))
    network = randomize(Vgg())
    for size in (16, 56):  # its pooling makes 7 x 7 out of 2 x 2, then of 7 x 7
        assert_cut_is_exact(randomize(Vgg()), TOY, size)
    flattened = channel_groups(network, 16)[2]
    assert [(part.name, part.repeat) for part in flattened.reads] == [("classifier.0.weight", 49)]


DEPTHS, WIDTHS = (3, 3, 27, 3), (8, 12, 16, 20)


@pytest.mark.parametrize(
    ("library", "arguments"),
    [
        ("timm", {"depths": DEPTHS, "dims": WIDTHS}),
        ("torchvision", {"block_setting": list(zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True))}),
    ],
)
def test_a_convnext_as_deep_as_small_is_partitioned_and_cut(library, arguments):
    network, spec = folded(library, "convnext_small", arguments)
    groups = channel_groups(network, 32)
    assert len(groups) == 36 + 4
    pruned = random_half(groups)
    zero_channels(network, groups, pruned)
    subnet, _ = cut_channels(network, spec, groups, pruned)
    assert relative_difference(network, subnet, digits(32)) < TOLERANCE


def test_the_unit_of_a_grouped_convolution_is_one_of_its_groups():
    network, spec = folded("torchvision", "regnet_x_400mf", {})
    groups = {group.name: group for group in channel_groups(network, 32)}
    unit = groups["trunk_output.block1.block1-0.f.a.0"]
    conv = network.get_submodule("trunk_output.block1.block1-0.f.b.0")
    assert (unit.channels, conv.in_channels, conv.out_channels) == (conv.groups, 32, 32) == (2, 32, 32)
    parts = {part.name.removeprefix("trunk_output.block1.block1-0.f."): part for part in unit.makes + unit.reads}
    assert {name: (part.axis, part.repeat) for name, part in parts.items()} == {
        "a.0.weight": (0, 16),
        "a.1.weight": (0, 16),
        "a.1.bias": (0, 16),
        "b.0.weight": (0, 16),
        "b.1.weight": (0, 16),
        "b.1.bias": (0, 16),
        "c.0.weight": (1, 16),
    }
    none = {name: torch.zeros(group.channels, dtype=torch.bool) for name, group in groups.items()}
    subnet, _ = cut_channels(network, spec, list(groups.values()), none | {unit.name: torch.tensor([True, False])})
    cut = subnet.get_submodule("trunk_output.block1.block1-0.f.b.0")
    assert (cut.groups, cut.in_channels, cut.out_channels, cut.weight.shape) == (1, 16, 16, (16, 16, 3, 3))
    one_less = torch.tensor([group.channels - (group is unit) for group in groups.values()])
    left = costs_of(network, list(groups.values()), 32).params(one_less)
    assert sum(p.numel() for p in subnet.parameters()) == left


def test_grouped_convolutions_in_a_row_share_the_divisor_of_their_groups(monkeypatch):
    def make() -> nn.Module:
        layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3, groups=12), nn.ReLU()]
        layers += [nn.Conv2d(48, 16, 3, groups=8), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    monkeypatch.setattr("stages.pruning.groups.build_network", builder(make))
    network = randomize(make())
    first, second = channel_groups(network, 32)
    assert (first.name, first.channels, second.name, second.channels) == ("0", 4, "6", 8)
    assert_cut_is_exact(network, TOY, 32)


def test_learned_scales_outside_any_known_module_are_cut_along(monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)
            self.scale, self.shift = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.zeros(12))
            self.act = nn.PReLU(12)

        def forward(self, x):
            x = self.second(torch.relu(self.first(x) * self.scale))
            return self.head(self.act(x + self.shift.view(1, -1, 1, 1)).mean((2, 3)))

    monkeypatch.setattr("stages.pruning.groups.build_network", builder(Scaled))
    _, smaller = assert_cut_is_exact(randomize(Scaled()), TOY, 16)
    assert smaller.widths[""] == {"scale": 4, "shift": 6}
    assert smaller.widths["act"] == {"weight": 6}


def test_a_group_that_lacks_one_slice_is_caught():
    network, spec = folded("timm", "convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 6, 8, 8), "conv_mlp": False})
    groups = channel_groups(network, 32)
    check_exact(network, spec, groups, 32)
    stage = next(position for position, group in enumerate(groups) if group.name == "stages.1.downsample.1")
    for kind in ("makes", "reads"):
        for part in getattr(groups[stage], kind)[::2]:
            kept = tuple(other for other in getattr(groups[stage], kind) if other is not part)
            wrong = [*groups]
            wrong[stage] = replace(groups[stage], **{kind: kept})
            with pytest.raises(UserError, match=r"zeroed channels of stages\.1\.downsample\.1 would change the output"):
                check_exact(network, spec, wrong, 32)


def test_a_group_that_reads_the_wrong_channels_of_the_right_shape_is_caught():
    network, spec = folded("timm", "resnet18", {"layers": (2, 1, 1, 1), "channels": (8, 8, 8, 8)})
    groups = channel_groups(network, 32)
    inner = [position for position, group in enumerate(groups) if group.name in ("layer1.0.conv1", "layer1.1.conv1")]
    one, other = (groups[position] for position in inner)
    groups[inner[0]], groups[inner[1]] = replace(one, reads=other.reads), replace(other, reads=one.reads)
    with pytest.raises(UserError, match=r"zeroed channels of layer1\.0\.conv1, layer1\.1\.conv1 would change"):
        check_exact(network, spec, groups, 32)


@pytest.mark.parametrize(
    ("architecture", "arguments", "whole", "cut"),
    [
        ("squeezenet1_1", {}, "features.3.expand1x1", "features.3.squeeze"),
        ("shufflenet_v2_x0_5", {}, "stage2.0.branch1.2", "stage2.1.branch2.0"),
    ],
)
def test_what_cannot_be_cut_exactly_is_left_whole_where_that_is_allowed(architecture, arguments, whole, cut):
    network, spec = folded("torchvision", architecture, arguments)
    with pytest.raises(UserError, match=rf"^{whole}: its channels pass a concatenation"):
        exact_groups(network, spec, 64, allow_partial=False)
    groups, left = exact_groups(network, spec, 64, allow_partial=True)
    names = [group.name for group in groups]
    assert whole in left
    assert not set(names) & set(left)
    assert any(name.startswith(cut) for name in names)
    pruned = random_half(groups)
    zero_channels(network, groups, pruned)
    subnet, _ = cut_channels(network, spec, groups, pruned)
    assert relative_difference(network, subnet, digits(64)) < TOLERANCE
    assert subnet.get_submodule(whole).weight.shape[0] == network.get_submodule(whole).weight.shape[0]
    assert sum(p.numel() for p in subnet.parameters()) < 0.9 * sum(p.numel() for p in network.parameters())


def test_groups_that_only_fail_the_proof_are_left_whole_too(monkeypatch):
    def make() -> nn.Module:
        """The first norm has no bias to be zeroed: it makes something of a zero channel."""
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    monkeypatch.setattr("stages.pruning.groups.build_network", builder(make))
    network = randomize(make())
    with pytest.raises(UserError, match="removing zeroed channels of 0 would change the output"):
        exact_groups(network, TOY, 12, allow_partial=False)
    groups, left = exact_groups(network, TOY, 12, allow_partial=True)
    assert ([group.name for group in groups], left) == (["3"], ["0"])


def test_a_network_of_which_nothing_can_be_cut_is_refused_even_in_part():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 6)

        def forward(self, x):
            return self.head(torch.cat([self.one(x), self.other(x)], 1)).flatten(1)

    with pytest.raises(UserError, match=r"no channels that could be pruned \(of 2 layers such as one none can be cut"):
        exact_groups(randomize(Joined()), TOY, 8, allow_partial=True)
