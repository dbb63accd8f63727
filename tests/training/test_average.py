import copy

import pytest
import torch
from stages.training.average import WeightAverage
from torch import nn


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_the_decay_grows_up_to_the_one_that_is_asked_for(network):
    average, expected = WeightAverage(network, 0.3), None
    for n in range(6):
        with torch.no_grad():
            network[0].weight.add_(1.0)
        average.update_parameters(network)
        decay = min(0.3, (1 + n) / (10 + n))
        now = network[0].weight.detach().clone()
        expected = now if n == 0 else decay * expected + (1 - decay) * now
        assert torch.allclose(average.module[0].weight, expected)
    assert int(average.n_averaged) == 6


def test_running_statistics_are_the_networks_last(network):
    average = WeightAverage(network, 0.9)
    for _ in range(2):
        network(torch.randn(8, 3))
        average.update_parameters(network)
    assert torch.equal(average.module[1].running_mean, network[1].running_mean)
    assert int(average.module[1].num_batches_tracked) == 2


def test_a_loaded_average_goes_on_where_it_stood(network):
    first = WeightAverage(network, 0.5)
    first.update_parameters(network)
    second = WeightAverage(copy.deepcopy(network), 0.5)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        network[0].weight.mul_(3.0)
    for average in (first, second):
        average.update_parameters(network)
    assert torch.equal(first.module[0].weight, second.module[0].weight)
