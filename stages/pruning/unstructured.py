"""Unstructured pruning: single weights set to zero (torch.nn.utils.prune) and kept there."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from stages.common.errors import UserError
from stages.common.params import Unstructured


def prunable_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all convolutions and Linear layers by name; biases and norms are left alone.

    Raises:
        UserError: if there are none.
    """
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    if not weights:
        raise UserError(f"{type(network).__name__}: has no convolution or Linear layer to prune")
    return weights


def zeros_of(network: nn.Module, pruner: Unstructured, seed: int) -> dict[str, torch.Tensor]:
    """Choose the weights to prune: those of least magnitude, or at random.

    Args:
        pruner: round(sparsity * weights) are chosen, among all at once (`global`) or in each layer (`layer`).
        seed: of the random choice; torch's own random state is left as it is.

    Returns:
        For each weight by name, bool of its shape: True where it is to be zero.

    Raises:
        UserError: if no weight of some layer would be left: nothing passes such a layer, nor any gradient to train it.
    """
    weights = {name: weight.cpu() for name, weight in prunable_weights(network).items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if pruner.scope == "layer":
            zeros = {name: _chosen(weight, pruner) for name, weight in weights.items()}
        else:
            row = _chosen(torch.cat([weight.flatten() for weight in weights.values()]), pruner)
            parts = row.split([weight.numel() for weight in weights.values()])
            zeros = {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}
    if emptied := [name.removesuffix(".weight") for name, mask in zeros.items() if mask.all()]:
        remedy = "lower sparsity" + (", or set scope: layer" if pruner.scope == "global" else "")
        raise UserError(
            f"sparsity {pruner.sparsity} leaves no weight in {', '.join(emptied[:3])}"
            f"{f' and {len(emptied) - 3} more layers' if len(emptied) > 3 else ''}: {remedy}"
        )
    return zeros


def _chosen(weight: torch.Tensor, pruner: Unstructured) -> torch.Tensor:
    kind = prune.L1Unstructured if pruner.method == "l1_unstructured" else prune.RandomUnstructured
    mask = kind(amount=round(pruner.sparsity * weight.numel())).compute_mask(weight, torch.ones_like(weight))
    return mask == 0


def sparsity_of(network: nn.Module) -> float:
    """Share of zeros among the weights that can be pruned."""
    weights = prunable_weights(network).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class KeepZeros:
    """Keeps the chosen weights at zero through training (`training.constraint.Constraint`).

    Args:
        network: its weights are held at zero after each step; call `project` on it before the first one. It may be
            moved to another device before the first step.
        zeros: from `zeros_of`.
    """

    def __init__(self, network: nn.Module, zeros: dict[str, torch.Tensor]) -> None:
        self._network, self._zeros = network, zeros

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> None:
        self.project(self._network)

    @torch.no_grad()
    def project(self, network: nn.Module) -> None:
        parameters = dict(network.named_parameters())
        for name, zeros in self._zeros.items():
            parameter = parameters[name]
            if zeros.device != parameter.device:
                zeros = self._zeros[name] = zeros.to(parameter.device)
            parameter.masked_fill_(zeros, 0)

    def met_after(self, step: int) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"zeros": self._zeros}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._zeros = dict(state["zeros"])
