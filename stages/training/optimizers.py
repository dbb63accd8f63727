"""The optimizers of a recipe behind one interface, and its learning rates."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from stages.common.errors import UserError
from stages.params.finetune import Finetune
from stages.training.muon import Muon


class Optimizers:
    """AdamW, SGD, or Muon for the hidden matrices with AdamW for all other parameters.

    Parameters with one number for each channel (biases, norms, layer scales of any shape) have no weight decay.

    Args:
        fresh: names of the parameters that did not come from weights; all others have `recipe.pretrained.body_factor`
            times the learning rate. None if no weights were loaded.
    """

    def __init__(self, network: nn.Module, recipe: Finetune, fresh: Collection[str] | None = None) -> None:
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        body = {id(p) for name, p in trained.items() if fresh is not None and name not in fresh}
        matrices = [m for m in hidden_matrices(network) if m.requires_grad] if recipe.optimizer == "muon" else []
        taken = {id(p) for p in matrices}
        groups: dict[tuple[bool, bool], dict[str, Any]] = {}
        for p in trained.values():
            if id(p) not in taken:
                vector, slow = p.squeeze().dim() <= 1, id(p) in body
                settings = {"weight_decay": 0.0 if vector else recipe.weight_decay, "lr": recipe.learning_rate}
                settings["lr"] *= recipe.pretrained.body_factor if slow else 1
                groups.setdefault((slow, vector), settings | {"params": []})["params"].append(p)
        ordered = [groups[key] for key in sorted(groups)]
        if recipe.optimizer == "sgd":
            main = torch.optim.SGD(ordered, lr=recipe.learning_rate, momentum=0.9, nesterov=True, fused=True)
        else:
            betas = (0.9, 0.99) if recipe.optimizer == "muon" else (0.9, 0.999)
            main = torch.optim.AdamW(ordered, lr=recipe.learning_rate, betas=betas, fused=True)
        self.all: list[torch.optim.Optimizer] = [main]
        self._flat: list[tuple[nn.Parameter, nn.Parameter]] = []
        if matrices:
            self._flat = [(p, nn.Parameter(_as_matrix(p.data))) for p in matrices]
            if copied := [p for p, flat in self._flat if flat.data_ptr() != p.data_ptr()]:
                raise RuntimeError(f"{len(copied)} weights are not contiguous: Muon would train copies")
            rate, decay, iterations = recipe.muon_learning_rate, recipe.muon_weight_decay, recipe.muon_iterations
            factors = ((True, recipe.pretrained.body_factor), (False, 1.0))
            halves = [([flat for p, flat in self._flat if (id(p) in body) is slow], factor) for slow, factor in factors]
            flats = [{"params": flats, "lr": rate * factor} for flats, factor in halves if flats]
            self.all.append(Muon(flats, lr=rate, weight_decay=decay, momentum=0.95, ns_steps=iterations))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for optimizer, peaks in zip(self.all, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        for parameter, flat in self._flat:
            flat.grad = None if parameter.grad is None else _as_matrix(parameter.grad)
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def schedule(step: int, steps: int, recipe: Finetune) -> float:
    """Factor of the peak learning rate: linear warm-up, then cosine or linear decay to 0 at the end."""
    warmup = max(1, round(recipe.warmup_fraction * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, steps - warmup + 1)
    return 1 - progress if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def hidden_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon moves: those of Linear layers and ungrouped convolutions, except the first and last layer.

    Raises:
        UserError: if there are none.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1)]
    if len(layers) < 3:
        raise UserError("finetune.optimizer = 'muon': this network has no hidden matrices; use adamw or sgd")
    return [layer.weight for layer in layers[1:-1]]


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """View as `[out, in * kernel]` on the same memory: torch's Muon takes 2-D parameters only."""
    if weight.dim() == 4 and not weight.is_contiguous():
        weight = weight.permute(0, 2, 3, 1)  # channels-last memory is contiguous in this order
    return weight.reshape(weight.shape[0], -1)
