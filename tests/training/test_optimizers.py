import copy

import pytest
import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec
from stages.params.finetune import Finetune
from stages.training import muon
from stages.training.muon import Muon, orthogonalize
from stages.training.optimizers import Optimizers, hidden_matrices, schedule


def recipe_with(**changes) -> Finetune:
    return Finetune(**{"epochs": 1, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01} | changes)


def backward(network: nn.Module) -> None:
    network.eval()
    network(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()
    return weight.reshape(weight.shape[0], -1).clone()


def newton_schulz(x: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Muon's iterations as in the paper, in float64."""
    wanted = x.double().T if x.shape[0] > x.shape[1] else x.double()
    wanted = wanted / wanted.norm()
    for _ in range(iterations):
        gram = wanted @ wanted.T
        wanted = 3.4445 * wanted + (-4.7750 * gram + 2.0315 * gram @ gram) @ wanted
    return wanted.T if x.shape[0] > x.shape[1] else wanted


@pytest.mark.parametrize("iterations", [5, 3])
def test_muon_moves_hidden_matrices_by_their_orthogonalized_gradients(network, iterations, monkeypatch):
    monkeypatch.setattr(muon, "use_bfloat16", lambda precision, device: False)
    network.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(network)
    for each in (network, reference):
        backward(each)
    settings = {"muon_learning_rate": 0.05, "muon_weight_decay": 0.1, "muon_iterations": iterations}
    Optimizers(network, recipe_with(optimizer="muon", **settings)).step()
    assert len(hidden_matrices(network)) > 5
    for moved, start in zip(hidden_matrices(network), hidden_matrices(reference), strict=True):
        before, direction = as_matrix(start), newton_schulz(as_matrix(start.grad), iterations)
        rate = 0.05 * max(1, before.shape[0] / before.shape[1]) ** 0.5
        wanted = before * (1 - 0.05 * 0.1) - rate * direction
        torch.testing.assert_close(as_matrix(moved).double(), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("native", "allowed"), [(False, 1e-3), (True, 3e-2)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 12, 40), (1, 16, 16)])
def test_orthogonalize_runs_newton_schulz_on_each_matrix(shape, native, allowed):
    torch.manual_seed(0)
    x = torch.randn(shape) @ torch.diag(torch.logspace(0, -4, shape[2]))  # singular values far apart
    ours = orthogonalize(x, (3.4445, -4.7750, 2.0315), 5, 1e-7, native)
    assert ours.dtype == (torch.bfloat16 if native else torch.float32)
    for matrix, found in zip(x, ours, strict=True):
        torch.testing.assert_close(found.double(), newton_schulz(matrix), rtol=0, atol=allowed)
    assert not orthogonalize(torch.zeros(shape), (3.4445, -4.7750, 2.0315), 5, 1e-7, native).any()


def test_muon_skips_a_matrix_without_a_gradient_and_loads_torchs_states():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))] for _ in range(2))
    gradients = [torch.randn(4, 6) for _ in range(2)]
    reference = torch.optim.Muon(theirs, lr=0.02)
    theirs[0].grad = gradients[0]
    reference.step()
    optimizer = Muon(ours, lr=0.02)
    optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
    ours[0].data = theirs[0].data.clone()
    for each, mover in ((theirs, reference), (ours, optimizer)):
        each[0].grad = gradients[1]
        mover.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-3)
    assert torch.equal(ours[1], torch.ones(4, 6))
    assert optimizer.state[ours[1]] == {}


def test_adamw_equals_torchs_without_decay_on_vectors(network):
    reference = copy.deepcopy(network)
    for each in (network, reference):
        backward(each)
    Optimizers(network, recipe_with(weight_decay=0.5)).step()
    decayed, plain = [], []
    for parameter in reference.parameters():
        (decayed if parameter.dim() > 1 else plain).append(parameter)
    torch.optim.AdamW(decayed, lr=0.01, weight_decay=0.5).step()
    torch.optim.AdamW(plain, lr=0.01, weight_decay=0.0).step()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_muon_does_not_move_the_first_and_last_layer_and_depthwise_weights(network):
    taken = {id(p) for p in hidden_matrices(network)}
    names = {name for name, p in network.named_parameters() if id(p) in taken}
    assert "stages.1.downsample.1.weight" in names
    assert "stages.0.blocks.0.mlp.fc1.weight" in names
    assert not names & {"stem.0.weight", "head.fc.weight", "stages.0.blocks.0.conv_dw.weight"}


def test_muon_is_refused_where_there_are_no_hidden_matrices():
    with pytest.raises(UserError, match="no hidden matrices"):
        Optimizers(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), recipe_with(optimizer="muon"))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_rises_to_one_and_falls_to_zero(kind):
    factors = [schedule(step, 100, recipe_with(schedule=kind, warmup_fraction=0.1)) for step in range(100)]
    assert factors[9] == 1
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 <= factors[-1] < 0.02
    middle = factors[54]
    assert middle == pytest.approx(0.5, abs=0.02)


def test_parameters_with_one_number_for_each_channel_have_no_weight_decay():
    """A layer scale is one: `[C]` in timm's ConvNeXt, `[C, 1, 1]` in torchvision's."""
    decayed = []
    for library, architecture in [("timm", "convnext_tiny"), ("torchvision", "convnext_tiny")]:
        network = build_network(NetworkSpec(library, architecture, {}, 10))
        [main] = Optimizers(network, recipe_with(weight_decay=0.05)).all
        groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in main.param_groups}
        for name, parameter in network.named_parameters():
            scale = name.endswith(("bias", "gamma", "layer_scale")) or "norm" in name
            assert id(parameter) in groups[0.0 if scale or parameter.squeeze().dim() == 1 else 0.05], name
        decayed.append(sum(p.numel() for p in network.parameters() if id(p) in groups[0.05]))
    assert decayed[0] == decayed[1]
