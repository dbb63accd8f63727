"""A small network whose channel groups are written by hand, and the step that trains it."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stages.params.pruners import Importance, Oto
from stages.pruning.costs import Costs, costs_of
from stages.pruning.dhspg import Dhspg
from stages.pruning.groups import ChannelGroup, Slice
from stages.pruning.hesso import Hesso
from stages.pruning.steering import Steering

GROUPS = [
    ChannelGroup(
        "0",
        10,
        tuple(Slice(n, 0) for n in ("0.weight", "0.bias", "1.weight", "1.bias")),
        (Slice("3.weight", 1),),
        (),
    ),
    ChannelGroup(
        "3",
        6,
        (Slice("3.weight", 0), Slice("3.bias", 0), Slice("5.weight", 0, 16), Slice("5.bias", 0, 16)),
        (Slice("6.weight", 1, 16),),
        (),
    ),
    ChannelGroup("6", 12, (Slice("6.weight", 0), Slice("6.bias", 0)), (Slice("8.weight", 1),), ()),
]
CHANNELS = 28
STEPS = 20
OPTIMIZERS = ["sgd", "adamw", "muon"]
COSINE = Importance(cosine_similarity=1.0)


def toy() -> nn.Sequential:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 6, 3, padding=1),
        nn.Flatten(),
        nn.LayerNorm(6 * 16),
        nn.Linear(6 * 16, 12),
        nn.GELU(),
        nn.Linear(12, 3),
    )
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
    return network


def toy_costs() -> Costs:
    return costs_of(toy(), GROUPS, 4)


def oto(**changes: Any) -> Oto:
    settings = {"epochs": 1, "learning_rate_factor": 1.0, "start_fraction": 0.2}
    if changes.get("optimizer") != "dhspg":
        settings["pruning_periods"] = 3
    if not {"params_reduction", "macs_reduction"} & changes.keys():
        settings["group_sparsity"] = 0.5
    return Oto(method="oto", **settings | {"end_fraction": 0.65} | changes)


def rate(step: int) -> float:
    return 0.01 * (1 - step / STEPS)


def steering_of(method: str, network: nn.Module, **changes: Any) -> Steering:
    """HESSO or DHSPG for the toy network over steps 4 to 15; each ignores the settings of the other."""
    settings = {"end_fraction": 0.8} | changes
    arguments = network, GROUPS, toy_costs()
    if method == "dhspg":
        settings = {"penalty": 1e-3, "penalty_limit": 10.0} | settings
        settings.pop("pruning_periods", None)
        return Dhspg(*arguments, oto(optimizer="dhspg", **settings), STEPS, "pruners.toy", rate)
    settings = {
        name: value for name, value in settings.items() if name not in ("penalty", "penalty_limit", "half_space")
    }
    return Hesso(*arguments, oto(**settings), STEPS, "pruners.toy")


class Both:
    """Muon for the hidden Linear layer, AdamW for all else."""

    def __init__(self, network: nn.Module) -> None:
        rest = [p for name, p in network.named_parameters() if name != "6.weight"]
        self.all = [torch.optim.Muon([network[6].weight], lr=0.02), torch.optim.AdamW(rest, lr=0.01)]

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def optimizer_of(name: str, network: nn.Module) -> torch.optim.Optimizer | Both:
    if name == "muon":
        return Both(network)
    if name == "sgd":
        return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.05)


def backward(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 4, 4, generator=generator)
    y = torch.randint(0, 3, (8,), generator=generator)
    network.zero_grad()
    F.cross_entropy(network(x.to(network[0].weight.dtype)), y).backward()


def run(network: nn.Module, optimizer: Any, constraint: Any, steps: Iterable[int] = range(STEPS)) -> None:
    for step in steps:
        backward(network, step)
        if constraint is not None:
            constraint.before_step(step)
        optimizer.step()
        if constraint is not None:
            constraint.after_step(step)


def rows_of(network: nn.Module, group: ChannelGroup, channel: int) -> list[tuple[nn.Parameter, slice]]:
    parameters = dict(network.named_parameters())
    return [(parameters[part.name], slice(channel * part.repeat, (channel + 1) * part.repeat)) for part in group.makes]


def entries_of(network: nn.Module, group: ChannelGroup, channel: int) -> torch.Tensor:
    """All that makes one channel, as float64 in one row."""
    return torch.cat([p.detach()[rows].double().flatten() for p, rows in rows_of(network, group, channel)])


def gradients_of(network: nn.Module, group: ChannelGroup, channel: int) -> torch.Tensor:
    """The gradients of all that makes one channel, as float64 in one row."""
    return torch.cat([p.grad[rows].double().flatten() for p, rows in rows_of(network, group, channel)])


def norms(network: nn.Module) -> torch.Tensor:
    """Norm of what makes each channel, all groups in one row."""
    return torch.stack([entries_of(network, group, c).norm() for group in GROUPS for c in range(group.channels)])
