import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from stages.common.errors import UserError
from stages.networks.norms import FixedDivisorGlobalResponseNorm, FixedDivisorLayerNorm
from stages.networks.reshape import reshape, widths_of


def toy() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        BatchNormAct2d(8, act_layer=nn.Hardswish),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Flatten(),
        nn.Linear(8 * 49, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 4),
    )


WIDTHS = {
    "0": {"in_channels": 3, "out_channels": 5, "groups": 1},
    "1": {"num_features": 5},
    "2": {"in_channels": 5, "out_channels": 5, "groups": 5},
    "4": {"in_features": 5 * 49, "out_features": 2},
    "5": {"width": 2},
    "6": {"in_features": 2, "out_features": 4},
}


@pytest.mark.parametrize(("form", "kind"), [("exact", FixedDivisorLayerNorm), ("plain", nn.LayerNorm)])
def test_a_reshaped_network_runs_with_fresh_weights_and_its_widths_are_read_back(form, kind):
    network = toy()
    reshape(network, WIDTHS, {"5": 6}, form)
    assert type(network[5]) is kind
    assert torch.equal(network[1].running_var, torch.ones(5))
    assert network(torch.randn(2, 3, 18, 18)).shape == (2, 4)
    assert widths_of(network, toy()) == (WIDTHS, {"5": 6})
    assert 0 < network[0].weight.std() < network[0].weight.abs().max() <= (1 / 27) ** 0.5


def test_widths_are_read_off_cut_tensors_whose_modules_hold_the_old_sizes():
    cut = toy()
    small = copy.deepcopy(cut)
    reshape(small, WIDTHS, {"5": 6})
    for name, tensor in small.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if tensor.dim():
            owner = cut.get_submodule(path)
            setattr(owner, attribute, nn.Parameter(tensor) if attribute in owner._parameters else tensor)
    assert widths_of(cut, toy()) == (WIDTHS, {"5": 6})


def test_narrowed_modules_keep_the_other_attributes_of_their_class():
    network = toy()
    reshape(network, WIDTHS, {"5": 6})
    assert isinstance(network[1], BatchNormAct2d)
    assert isinstance(network[1].act, nn.Hardswish)
    assert network[0].stride == (2, 2)
    assert network[2].bias is None
    assert network[5].original_width == 6


def test_grouped_convolutions_response_norms_and_learned_scales_are_narrowed():
    class Scaled(nn.Sequential):
        def __init__(self):
            grouped = nn.Conv2d(12, 8, 1, groups=4)
            super().__init__(nn.Conv2d(3, 12, 1), grouped, GlobalResponseNorm(8, channels_last=False), nn.PReLU(8))
            self.scale = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x):
            return super().forward(x) * self.scale

    widths = {
        "": {"scale": 6},
        "0": {"in_channels": 3, "out_channels": 9, "groups": 1},
        "1": {"in_channels": 9, "out_channels": 6, "groups": 3},
        "2": {"width": 6},
        "3": {"weight": 6},
    }
    network = Scaled()
    reshape(network, widths, {"2": 8}, "plain")
    assert isinstance(network[2], FixedDivisorGlobalResponseNorm)
    assert network[2].original_width == 8
    assert network(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)
    assert widths_of(network, Scaled()) == (widths, {"2": 8})
    with pytest.raises(UserError, match=r"2: .* 8, but model\.json says None"):
        reshape(Scaled(), widths, {})


@pytest.mark.parametrize(
    ("widths", "norms", "message"),
    [
        ({"9": {"num_features": 2}}, {}, "9: no such module"),
        ({"3": {"width": 2}}, {}, "3: Flatten cannot be narrowed"),
        ({"5": {"width": 2}}, {"5": 7}, r"5: the original width is 6, but model\.json says 7"),
        ({"5": {"width": 2}}, {}, r"5: the original width is 6, but model\.json says None"),
    ],
)
def test_wrong_descriptions_are_refused(widths, norms, message):
    with pytest.raises(UserError, match=message):
        reshape(toy(), widths, norms)
