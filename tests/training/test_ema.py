import copy

import pytest
import torch
from torch import nn

from stages.training.ema import Ema


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_decay_rises_to_the_given_one(network):
    average, expected = Ema(network, 0.3), None
    for n in range(6):
        with torch.no_grad():
            network[0].weight.add_(1.0)
        average.update_parameters(network)
        decay = min(0.3, (1 + n) / (10 + n))
        now = network[0].weight.detach().clone()
        expected = now if n == 0 else decay * expected + (1 - decay) * now
        assert torch.allclose(average.module[0].weight, expected)
    assert int(average.n_averaged) == 6


def test_buffers_are_copied(network):
    average = Ema(network, 0.9)
    for _ in range(2):
        network(torch.randn(8, 3))
        average.update_parameters(network)
    assert torch.equal(average.module[1].running_mean, network[1].running_mean)
    assert int(average.module[1].num_batches_tracked) == 2


def test_a_loaded_average_continues(network):
    first = Ema(network, 0.5)
    first.update_parameters(network)
    second = Ema(copy.deepcopy(network), 0.5)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        network[0].weight.mul_(3.0)
    for average in (first, second):
        average.update_parameters(network)
    assert torch.equal(first.module[0].weight, second.module[0].weight)
