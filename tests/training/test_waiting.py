"""What a step asks of a GPU, on torch's fake tensors, which have a device and a shape but no values."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.training import distributed
from stages.training.distillation import Distillation
from stages.training.trainer import Trainer, TrainingData

CUDA = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Lists the operations for which the host waits: reads of values, and blocking copies between devices."""

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
    """A mode in which a `Trainer` accepts modules on the fake GPU, and `backward` only allocates gradients."""

    def backward(loss: torch.Tensor) -> None:
        for parameter in mode.trained.parameters():
            parameter.grad = torch.empty_like(parameter)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))
    return mode


@pytest.fixture
def construct(network, parts, preprocess, recipe, mode):
    def construct(changes: dict, distillation: Distillation | None = None) -> Trainer:
        mode.trained = on_fake_gpu(network, mode)
        data = TrainingData(*parts, on_fake_gpu(preprocess, mode))
        return Trainer(network, data, recipe.model_copy(update=changes), CUDA, distillation=distillation)

    return construct


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_on_a_gpu_waits_for_it(network, construct, mode, optimizer):
    with mode:
        teacher = on_fake_gpu(copy.deepcopy(network), mode)
        trainer = construct({"optimizer": optimizer, "cutmix": 0.5}, Distillation(teacher, 0.5, 2.0))
        batch = {"index": np.arange(32), "positions": torch.arange(32), "epoch": 0}
        pixels = torch.zeros(32, 8, 8, 3, dtype=torch.uint8, device=CUDA)
        labels = torch.zeros(32, dtype=torch.int64, device=CUDA)
        with Waits() as waits:
            x, targets = trainer.augment(pixels, labels, trainer.preprocess, generator=torch.Generator(), **batch)
            loss = trainer.step(0, x, targets)
    assert waits.found == []
    assert (loss.device, targets.shape) == (CUDA, (32, 2))


@pytest.mark.parametrize(("world_size", "compile_mode"), [(1, "reduce-overhead"), (2, "default")])
def test_compiled_training_on_one_gpu_uses_cuda_graphs(construct, mode, monkeypatch, world_size, compile_mode):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda network, **settings: calls.append(settings))
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    with mode:
        construct({"compile": True})
    assert calls == [{"dynamic": False, "mode": compile_mode}]


def test_a_value_and_a_blocking_copy_are_seen():
    with FakeTensorMode(), Waits() as waits:
        x = torch.zeros(3, device=CUDA)
        torch.zeros(3).to(CUDA, non_blocking=True)
        torch.zeros(3).to(CUDA)
        x.cpu()
        with pytest.raises(Exception, match="scalar"):
            x.sum().item()
    assert waits.found == ["copy from cpu to cuda:0", "copy from cuda:0 to cpu"]
