import copy
import gc

import pytest
import torch
from torch import nn

from stages.training.cuda_graphs import CAPTURE, Graphed

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).cuda()


@on_cuda
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


@on_cuda
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


def test_a_graph_is_captured_while_no_memory_is_pinned_and_no_garbage_is_collected(monkeypatch):
    seen = []

    def capture(module: nn.Module, sample: tuple, **_: object) -> nn.Module:
        seen.append((CAPTURE.locked(), gc.isenabled()))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    layer = nn.Linear(4, 4)
    call = Graphed(layer, "test")
    for size in (2, 2, 3):
        x = torch.randn(size, 4)
        assert torch.equal(call(x), layer(x))
    assert seen == [(True, False)] * 2
    assert (CAPTURE.locked(), gc.isenabled()) == (False, True)


def test_a_capture_that_fails_leaves_lock_and_garbage_collection_as_they_were(monkeypatch, capsys):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert torch.equal(Graphed(layer, "test")(x), layer(x))
    assert (CAPTURE.locked(), gc.isenabled()) == (False, True)
    assert capsys.readouterr().out == "test: trains without a CUDA graph, more slowly (operation not permitted)\n"
