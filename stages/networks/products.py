"""Count the multiply-accumulates of a network's operators, and name the parameter that each of them reads.

One forward pass of one image runs under a dispatch mode, which sees every operator below PyTorch's modules and
functions. Products are the operators of torch's own FLOP registry (convolutions, matrix products, fused attention) and
products with a vector. They are counted wherever they happen: in a layer, in a function that a module calls with its
own weights, or between two activations.

Every other operator costs no MAC. A parameter that only such operators read (layer scales, position tables, learned
activations) therefore costs none. An operator that is neither a product nor known to be free of products might hide
some, so a weight that it reads cannot be counted.
"""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.modules import channels_of
from stages.networks.spec import NetworkSpec

aten = torch.ops.aten

WITH_ADDEND = {aten.addmm, aten.baddbmm, aten.addmv}
"""Products whose first argument is added and not multiplied."""
ATTENTION = {packet for packet in flop_registry if "attention" in str(packet)}
"""Fused products of three activations."""
VECTOR_PRODUCTS = {aten.mv, aten.addmv, aten.dot}
"""Products that torch's registry lacks; one MAC for each element of the matrix."""
FREE_OF_PRODUCTS = {
    *(aten.cat, aten.copy_, aten.slice_scatter, aten.index_put, aten.index_put_),
    *(aten.index, aten.index_select, aten.embedding, aten.gather),  # a table that the image indexes
    *(
        aten.native_layer_norm,
        aten.native_group_norm,
        aten.native_batch_norm,
        aten._native_batch_norm_legit_no_training,
    ),
}
"""Operators beside the pointwise ones that may read an activation and a weight without any product of theirs."""


@dataclass
class Products:
    """MACs of one image."""

    by_parameter: Counter[str] = field(default_factory=Counter)
    """Products that read a weight, by the weight's name in `named_parameters`."""
    between_activations: int = 0
    with_constants: int = 0
    """Products with tensors that are neither trained nor computed from the image, such as blurring filters."""

    @property
    def total(self) -> int:
        return self.by_parameter.total() + self.between_activations + self.with_constants


def uncountable(spec: NetworkSpec, input_size: int) -> str | None:
    """Why the products of a network that can be built and run cannot be counted, else None."""
    for device in ("meta", "cpu"):  # some constructors compute, which the meta device cannot
        try:
            with torch.device(device):
                count_products(build_network(spec), input_size)
        except UserError as error:
            problem = str(error)
        except NotImplementedError:  # the network was built on the meta device and cannot run there
            if device == "cpu":
                raise
        else:
            return None
    return problem


def count_products(network: nn.Module, input_size: int) -> Products:
    """Count the MACs of a float network for one image `[C, input_size, input_size]`.

    A copy runs once in evaluation mode on the meta device, which computes shapes alone, or on the CPU if it uses what
    the meta device lacks.

    Raises:
        UserError: if a module hides its weights from `parameters`, or from the operators whose products are known.
    """
    for name, module in network.named_modules():
        if hasattr(module, "_packed_params"):
            raise _uncountable(name, module, "hides its parameters")
    try:
        return _run(copy.deepcopy(network).to("meta"), input_size)
    except UserError:
        raise
    except Exception:  # the meta device lacks some operators, and tensors that are no buffers stay on the CPU
        return _run(copy.deepcopy(network).cpu(), input_size)


@torch.no_grad()
def _run(network: nn.Module, input_size: int) -> Products:
    device = next(network.parameters()).device
    image = torch.zeros(1, channels_of(network), input_size, input_size, device=device)
    counter = _Counter(network, image)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it fuses a whole encoder layer into one operator
    try:
        with torch.device(device), counter:  # the default device is that of tensors that `forward` makes
            network.eval()(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.products


def _uncountable(name: str, module: nn.Module, reason: str) -> UserError:
    kind = type(module).__name__
    return UserError(f"{name or 'the network'}: {kind} {reason}, so its MACs cannot be counted")


class _Counter(TorchDispatchMode):
    """Follows through each operator which storages hold activations, and which hold values of weights alone.

    Activations are the image, and what depends on it or is the result of a product. `sources` maps other storages to
    the parameters from which they are computed, e.g. a standardized weight.
    """

    def __init__(self, network: nn.Module, image: torch.Tensor) -> None:
        super().__init__()
        self.network, self.products = network, Products()
        self.parameters = dict(network.named_parameters())
        self.activations = {_storage(image)}
        self.sources = {_storage(parameter): frozenset([name]) for name, parameter in self.parameters.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        product = operator in flop_registry or operator in VECTOR_PRODUCTS
        if not product:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        read = _tensors((args, kwargs))
        if product:
            self._count(operator, args, kwargs, result)
        else:
            self._refuse_hidden(func, read)
        self._follow(read, _tensors(result), product)
        return result

    def _count(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        first, second = args[1:3] if operator in WITH_ADDEND else args[:2]
        if operator in VECTOR_PRODUCTS:
            macs = first.numel()
        else:
            macs = flop_registry[operator](*args, **kwargs, out_val=result) // 2
        operands = [tensor for tensor in (first, second) if _storage(tensor) not in self.activations]
        weights = self._weights(operands)
        if operator in ATTENTION or not operands:
            self.products.between_activations += macs
        elif weights:  # the largest one, for a weight that is computed from a direction and a gain
            self.products.by_parameter[max(weights, key=lambda name: self.parameters[name].numel())] += macs
        else:
            self.products.with_constants += macs

    def _refuse_hidden(self, func: Any, read: list[torch.Tensor]) -> None:
        if torch.Tag.pointwise in func.tags or func._overloadpacket in FREE_OF_PRODUCTS:
            return
        if any(_storage(tensor) in self.activations for tensor in read):
            for name in self._weights(tensor for tensor in read if _long_axes(tensor) > 1):
                owner = name.rpartition(".")[0]
                raise _uncountable(owner, self.network.get_submodule(owner), f"multiplies in {func}")

    def _follow(self, read: list[torch.Tensor], written: list[torch.Tensor], product: bool) -> None:
        activation = product or any(_storage(tensor) in self.activations for tensor in read)
        sources = frozenset(self._weights(read))
        before = {_storage(tensor) for tensor in read}
        for storage in map(_storage, written):
            kept = storage in before  # a view, or an operator that works in place
            if activation or (kept and storage in self.activations):
                self.activations.add(storage)
            else:
                self.activations.discard(storage)  # the address of an activation that is gone
                self.sources[storage] = sources

    def _weights(self, tensors: Iterable[torch.Tensor]) -> list[str]:
        """Names of the parameters from which the tensors are computed, without those of activations, in order."""
        found = [self.sources.get(s, frozenset()) for s in map(_storage, tensors) if s not in self.activations]
        return sorted(frozenset().union(*found))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _long_axes(tensor: torch.Tensor) -> int:
    return sum(length > 1 for length in tensor.shape)
