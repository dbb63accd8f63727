import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from stages.common.errors import UserError
from stages.networks.global_response_norm import CountingGlobalResponseNorm
from stages.networks.layer_norm import FixedDivisorLayerNorm
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


def test_reshaped_network_runs_and_its_widths_read_back():
    network = toy()
    reshape(network, WIDTHS, {"5": 6})
    assert network(torch.randn(2, 3, 18, 18)).shape == (2, 4)
    assert widths_of(network, toy()) == (WIDTHS, {"5": 6})


def test_widths_are_read_off_cut_tensors_whose_modules_still_tell_the_old_sizes():
    cut = toy()
    small = copy.deepcopy(cut)
    reshape(small, WIDTHS, {"5": 6})
    for name, tensor in small.state_dict().items():
        path, _, attribute = name.rpartition(".")
        if tensor.dim():
            old = getattr(cut.get_submodule(path), attribute)
            setattr(
                cut.get_submodule(path), attribute, nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor
            )
    assert widths_of(cut, toy()) == (WIDTHS, {"5": 6})


def test_narrowed_modules_keep_what_their_class_adds():
    network = toy()
    reshape(network, WIDTHS, {"5": 6})
    assert isinstance(network[1], BatchNormAct2d)
    assert isinstance(network[1].act, nn.Hardswish)
    assert network[0].stride == (2, 2)
    assert network[2].bias is None
    assert isinstance(network[5], FixedDivisorLayerNorm)
    assert network[5].original_width == 6


@pytest.mark.parametrize("form", ["exact", "exact_matmul", "plain"])
def test_the_form_says_how_narrowed_layer_norms_count_and_leaves_the_widths_as_they_are(form):
    network = toy()
    reshape(network, WIDTHS, {"5": 6}, form)
    if form == "plain":
        assert (type(network[5]), network[5].normalized_shape) == (nn.LayerNorm, (2,))
    else:
        assert (network[5].original_width, network[5].as_matmul) == (6, form == "exact_matmul")
    assert widths_of(network, toy()) == (WIDTHS, {"5": 6})


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
    assert isinstance(network[2], CountingGlobalResponseNorm)  # it counts in every form
    assert network[2].original_width == 8
    assert network(torch.randn(2, 3, 4, 4)).shape == (2, 6, 4, 4)
    assert widths_of(network, Scaled()) == (widths, {"2": 8})
    with pytest.raises(UserError, match="2: its original width is 8, the file says None"):
        reshape(Scaled(), widths, {})


def test_fresh_weights_are_those_of_the_modules_own_initialisation():
    network = toy()
    reshape(network, WIDTHS, {"5": 6})
    assert network[0].weight.abs().max() <= (1 / 27) ** 0.5
    assert network[0].weight.std() > 0
    assert torch.equal(network[1].running_var, torch.ones(5))


@pytest.mark.parametrize(
    ("widths", "norms", "message"),
    [
        ({"9": {"num_features": 2}}, {}, "9: no such module"),
        ({"3": {"width": 2}}, {}, "3: Flatten cannot be narrowed"),
        ({"5": {"width": 2}}, {"5": 7}, "5: its original width is 6, the file says 7"),
        ({"5": {"width": 2}}, {}, "5: its original width is 6, the file says None"),
    ],
)
def test_wrong_descriptions_are_refused(widths, norms, message):
    with pytest.raises(UserError, match=message):
        reshape(toy(), widths, norms)
