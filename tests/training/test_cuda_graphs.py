import copy

import pytest
import torch
from torch import nn

from stages.training.cuda_graphs import Graphed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).cuda()


def test_outputs_gradients_and_statistics_are_those_of_the_network_itself():
    plain = network()
    captured = copy.deepcopy(plain)
    call = Graphed(captured, "test")
    for size in (16, 16, 12):
        x = torch.randn(4, 3, size, size, device="cuda")
        for module, forward in ((plain, plain), (captured, call)):
            module.zero_grad()
            forward(x).square().mean().backward()
        for ours, theirs in zip(captured.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    for ours, theirs in zip(captured.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_network_that_waits_for_the_device_is_called_as_it_is(capsys):
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * float(x.sum().item() > 0)

    waits = Waits().cuda()
    x = torch.ones(2, 4, device="cuda")
    assert torch.equal(Graphed(waits, "test")(x), waits(x))
    assert "test: trains without a CUDA graph, more slowly" in capsys.readouterr().out
