"""Fast evaluation, on calibration images, of one network with different bits in its layers."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.quantization.calibration import BATCH
from stages.quantization.rounding import Rounded

LARGEST_CACHE = 2**30
"""Bytes of outputs that are cached at most."""


class Evaluator:
    """Sets the bits of layers and computes the loss (mean cross entropy) of the network.

    Only layers whose bits change are set. All that runs before the first layer with integers gives the same output in
    every evaluation: the largest modules that end there return their cached outputs.

    Args:
        classifier: Takes uint8 pixels and has float weights; it stays as it is.
        layers: Names of layers of `classifier.network`, in the order of execution.
        rounded: The integers of each layer by name and number of bits.
        images: uint8 `[n, H, W, C]`.
        labels: int64 `[n]`.
        class_weights: float32 `[classes]`; without them, all images count the same in the mean.
    """

    def __init__(
        self,
        classifier: nn.Module,
        layers: Sequence[str],
        rounded: Mapping[str, Mapping[int, Rounded]],
        images: np.ndarray,
        labels: np.ndarray,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        self._classifier = copy.deepcopy(classifier).eval()
        self.layers, self._rounded = list(layers), rounded
        self._modules = {name: self._classifier.network.get_submodule(name) for name in layers}
        self._float = {name: module.weight.detach().clone() for name, module in self._modules.items()}
        self._bits: dict[str, int | None] = dict.fromkeys(layers)
        self._labels, self._class_weights = torch.from_numpy(labels), class_weights
        self.evaluations = 0
        """Number of evaluations, without that of the float network."""
        with torch.no_grad():
            self._inputs = [
                self._classifier.preprocess(torch.from_numpy(images[start : start + BATCH]))
                for start in range(0, len(images), BATCH)
            ]
            self._prefix = _Prefix(self._classifier.network, self._inputs)
            self.float_loss = self._loss(first=None)

    def __call__(self, bits: Mapping[str, int | None]) -> float:
        """The loss with these bits in each named layer; None stands for float."""
        self.evaluations += 1
        for name, wanted in bits.items():
            if wanted != self._bits[name]:
                value = self._float[name] if wanted is None else self._rounded[name][wanted].values()
                self._modules[name].weight.data.copy_(value)
                self._bits[name] = wanted
        first = next((name for name in self.layers if self._bits[name] is not None), None)
        with torch.no_grad():
            return self._loss(first)

    def float_weight(self, name: str) -> torch.Tensor:
        """A layer's weight before any rounding."""
        return self._float[name]

    def _loss(self, first: str | None) -> float:
        loss = 0.0
        with self._prefix.before(self._modules[first] if first else None) as network:
            for index, (x, labels) in enumerate(zip(self._inputs, self._labels.split(BATCH), strict=True)):
                logits = network(index, x).float()
                loss += F.cross_entropy(logits, labels, self._class_weights, reduction="sum").item()
        weights = self._class_weights
        return loss / (len(self._labels) if weights is None else weights[self._labels].sum().item())


class _Prefix:
    """Cached outputs of a float network's modules.

    The cache holds modules that run once and return one tensor: those with submodules, and the parts of a `Sequential`.
    A module that ends before some layer starts does not depend on that layer or any later one.
    """

    def __init__(self, network: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
        self._network, self._batch = network, 0
        self._started: dict[nn.Module, int] = {}
        self._ended: dict[nn.Module, int] = {}
        outputs: dict[nn.Module, list[torch.Tensor]] = {}
        parts = [part for module in network.modules() if isinstance(module, nn.Sequential) for part in module]
        whole = [module for module in network.modules() if module is not network and list(module.children())]
        worth = {*whole, *network.children(), *parts}
        again = self._time(inputs[0], outputs)
        size = sum(out[0].numel() * out[0].element_size() for module, out in outputs.items() if module in worth)
        self._outputs: dict[nn.Module, list[torch.Tensor]] = {}
        if size * len(inputs) > LARGEST_CACHE:
            return
        handles = [
            module.register_forward_hook(self._remember)
            for module in outputs
            if module in worth and module not in again
        ]
        for x in inputs:
            network(x)
        for handle in handles:
            handle.remove()

    def _time(self, x: torch.Tensor, outputs: dict[nn.Module, list[torch.Tensor]]) -> set[nn.Module]:
        """Record the order in which modules start and end, and their outputs; return the modules that run twice."""
        clock, again = itertools.count(), set()

        def start(module: nn.Module, _: tuple) -> None:
            if module in self._started:
                again.add(module)
            else:
                self._started[module] = next(clock)

        def end(module: nn.Module, _: tuple, output: object) -> None:
            self._ended[module] = next(clock)
            if isinstance(output, torch.Tensor):
                outputs[module] = [output]

        handles = [module.register_forward_pre_hook(start) for module in self._network.modules()]
        handles += [module.register_forward_hook(end) for module in self._network.modules()]
        self._network(x)
        for handle in handles:
            handle.remove()
        return again

    def _remember(self, module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        self._outputs.setdefault(module, []).append(output.detach().clone())  # later modules may work in place

    @contextmanager
    def before(self, layer: nn.Module | None) -> Iterator[Callable[[int, torch.Tensor], torch.Tensor]]:
        """The network as a function of a batch's index and input; all that ends before `layer` comes from the cache."""
        done = [m for m in self._outputs if layer is not None and self._ended[m] < self._started[layer]]
        inner = {part for module in done for part in module.modules() if part is not module}
        done = [module for module in done if module not in inner]
        for module in done:
            module.forward = lambda *_, module=module, **__: self._outputs[module][self._batch].clone()

        def network(batch: int, x: torch.Tensor) -> torch.Tensor:
            self._batch = batch
            return self._network(x)

        try:
            yield network
        finally:
            for module in done:
                del module.forward
