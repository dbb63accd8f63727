import torch
from torch import nn

from stages.training.ema import Ema


def test_the_decay_rises_to_the_given_one_and_buffers_are_copied():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average, expected = Ema(network, 0.3), None
    for n in range(6):
        with torch.no_grad():
            network[0].weight.add_(1.0)
        network(torch.randn(8, 3))
        average.update_parameters(network)
        decay = min(0.3, (1 + n) / (10 + n))
        now = network[0].weight.detach().clone()
        expected = now if n == 0 else decay * expected + (1 - decay) * now
        assert torch.allclose(average.module[0].weight, expected)
        assert torch.equal(average.module[1].running_mean, network[1].running_mean)
    assert int(average.n_averaged) == int(average.module[1].num_batches_tracked) == 6
