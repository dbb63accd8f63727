import copy

import pytest
import torch
from torch import nn

from stages.common.errors import UserError
from stages.common.params import Finetune
from stages.training.optimizers import Optimizers, hidden_matrices, schedule


def recipe_with(**changes) -> Finetune:
    return Finetune(**{"epochs": 1, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01} | changes)


def backward(network: nn.Module) -> None:
    network.eval()
    network(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()
    return weight.reshape(weight.shape[0], -1).clone()


def test_muon_moves_hidden_matrices_as_torch_moves_flattened_copies_of_them(network):
    network.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(network)
    for each in (network, reference):
        backward(each)
    Optimizers(network, recipe_with(optimizer="muon", muon_learning_rate=0.05, muon_weight_decay=0.1)).step()
    assert len(hidden_matrices(network)) > 5
    for moved, start in zip(hidden_matrices(network), hidden_matrices(reference), strict=True):
        flat = nn.Parameter(as_matrix(start))
        flat.grad = as_matrix(start.grad)
        torch.optim.Muon([flat], lr=0.05, weight_decay=0.1, momentum=0.95).step()
        assert not torch.equal(flat, as_matrix(start))
        torch.testing.assert_close(as_matrix(moved), flat.detach(), rtol=1e-4, atol=1e-6)


def test_adamw_without_decay_on_vectors_is_torchs_own(network):
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


def test_first_and_last_layer_and_depthwise_weights_are_not_muons(network):
    taken = {id(p) for p in hidden_matrices(network)}
    names = {name for name, p in network.named_parameters() if id(p) in taken}
    assert "stages.1.downsample.1.weight" in names
    assert "stages.0.blocks.0.mlp.fc1.weight" in names
    assert not names & {"stem.0.weight", "head.fc.weight", "stages.0.blocks.0.conv_dw.weight"}


def test_muon_is_refused_where_there_are_no_hidden_matrices():
    with pytest.raises(UserError, match="no hidden matrices"):
        Optimizers(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), recipe_with(optimizer="muon"))


def test_a_loaded_state_continues_the_same_trajectory(network):
    recipe = recipe_with(optimizer="muon")
    optimizers = Optimizers(network, recipe)
    backward(network)
    optimizers.step()
    other = copy.deepcopy(network)
    resumed = Optimizers(other, recipe)
    resumed.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    for each, own in ((network, optimizers), (other, resumed)):
        each.zero_grad()
        backward(each)
        own.set_factor(0.5)
        own.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_rises_to_one_and_falls_to_zero(kind):
    factors = [schedule(step, 100, recipe_with(schedule=kind, warmup_fraction=0.1)) for step in range(100)]
    assert factors[9] == 1
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 <= factors[-1] < 0.02
    middle = factors[54]
    assert middle == pytest.approx(0.5, abs=0.02)
