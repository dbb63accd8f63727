import copy

import pytest
import torch
from torch import nn

from stages.networks.pointwise import PointwiseLinear, is_pointwise, pointwise_to_linear, replace_module


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 1, bias=False),
        nn.Conv2d(12, 12, 1, groups=12),
        nn.Conv2d(12, 12, 1, stride=2),
        nn.Conv2d(12, 4, 1, padding=1),
    ).eval()


@torch.no_grad()
def test_outputs_stay_the_same():
    original = network()
    linear = copy.deepcopy(original)
    pointwise_to_linear(linear)
    x = torch.randn(2, 3, 9, 7)
    torch.testing.assert_close(linear(x), original(x))


def test_only_plain_pointwise_convolutions_are_replaced():
    linear = network()
    assert [is_pointwise(module) for module in linear] == [False, True, True, False, False, False]
    pointwise_to_linear(linear)
    assert [type(module) for module in linear] == [nn.Conv2d, *[PointwiseLinear] * 2, *[nn.Conv2d] * 3]
    assert linear[2].linear.bias is None


def test_the_number_of_parameters_stays():
    linear = network()
    before = sum(p.numel() for p in linear.parameters())
    pointwise_to_linear(linear)
    assert sum(p.numel() for p in linear.parameters()) == before


@pytest.mark.parametrize("training", [True, False])
def test_a_replacement_takes_over_the_training_mode(training):
    whole = network().train(training)
    replace_module(whole, "1", nn.Dropout().train(not training))
    assert whole[1].training == training
