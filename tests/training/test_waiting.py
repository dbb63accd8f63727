"""What a step asks of a GPU, on torch's fake tensors, which have a device and a shape and no values."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.training import loop
from stages.training.distillation import Distillation

CUDA = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Lists the operations for which the host would wait: values asked for, and copies between devices that block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        name = operation.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero") and args[0].device.type == "cuda":
            self.found.append(name)
        if name == "_to_copy" and args[0].device != out.device and not kwargs.get("non_blocking"):
            self.found.append(f"copy from {args[0].device} to {out.device}")
        return out


def on_fake_gpu(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(mode.from_tensor(parameter.data.clone()).to(CUDA)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, mode.from_tensor(buffer.clone()).to(CUDA))
    return module


@pytest.fixture
def mode(monkeypatch):
    """In which a `_Run` takes what is on the fake GPU already, and gradients come without a backward pass."""

    def backward(loss: torch.Tensor) -> None:
        for parameter in mode.trained.parameters():
            parameter.grad = torch.empty_like(parameter)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))
    monkeypatch.setattr(loop, "Graphed", lambda network, title: network)
    return mode


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_on_a_gpu_waits_for_it(network, parts, preprocess, recipe, mode, optimizer):
    recipe = recipe.model_copy(update={"optimizer": optimizer, "cutmix": 0.5})
    with mode:
        teacher, mode.trained = on_fake_gpu(copy.deepcopy(network), mode), on_fake_gpu(network, mode)
        settings = recipe, CUDA, 0, "test", None, Distillation(teacher, 0.5, 2.0), "learning_rate"
        run = loop._Run(network, parts[0], on_fake_gpu(preprocess, mode), *settings)
        batch = {"index": np.arange(32), "share": torch.arange(32), "epoch": 0}
        pixels = torch.zeros(32, 8, 8, 3, dtype=torch.uint8, device=CUDA)
        labels = torch.zeros(32, dtype=torch.int64, device=CUDA)
        with Waits() as waits:
            x, targets = run.augment(pixels, labels, run.preprocess, generator=torch.Generator(), **batch)
            loss = run.step(0, x, targets)
    assert waits.found == []
    assert (loss.device, targets.shape) == (CUDA, (32, 2))


def test_a_value_and_a_blocking_copy_are_seen():
    with FakeTensorMode(), Waits() as waits:
        x = torch.zeros(3, device=CUDA)
        torch.zeros(3).to(CUDA, non_blocking=True)
        torch.zeros(3).to(CUDA)
        x.cpu()
        with pytest.raises(Exception, match="scalar"):
            x.sum().item()
    assert waits.found == ["copy from cpu to cuda:0", "copy from cuda:0 to cpu"]
