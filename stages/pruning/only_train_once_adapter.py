"""Everything that touches only_train_once: its dependency graph, read off as typed channel groups.

The package is used for its graph and partition only. Its optimizer needs CUDA and its subnets are whole-module
pickles that change the output of LayerNorm networks, so those parts are never called. Whatever the package does to
the interpreter (search path, module names, torch's ONNX settings, printing) is undone when the call returns.
"""

import contextlib
import copy
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.pruning.costs import output_positions
from stages.pruning.groups import ChannelGroup, Slice

NOT_ITS_OWN = ("graph", "operation", "transform")
"""Top-level names under which the package imports parts of itself a second time."""
RECURSION_LIMIT = 20_000  # its searches go as deep as the longest path of operators; ConvNeXt-Base exceeds the default
OPSET = 16  # the one it was written for: from 17 on LayerNorm is one operator whose parameters it does not find
CUTTABLE = (nn.Conv2d, nn.Linear, _BatchNorm, nn.LayerNorm)


def channel_groups(network: nn.Module, input_size: int) -> list[ChannelGroup]:
    """Partition a classifier into groups of channels that can be removed together.

    Args:
        network: layer scale folded (`networks.layer_scale.fold_layer_scale`); left as it is, on any device.
        input_size: side S of its input `[N, 3, S, S]`, in pixels.

    Returns:
        The groups in the network's order, without those that make the logits.

    Raises:
        UserError: naming the module that cannot be pruned exactly, or if the graph cannot be built, or if no group
            can be pruned.
    """
    model = copy.deepcopy(network).cpu().float().eval().requires_grad_(True)
    with _library(model) as library:
        try:
            # Graph and partition one by one: the package's own entry point adds its clustering and a second pass.
            graph = library.Graph(model, torch.zeros(1, 3, input_size, input_size))
            _remember_neighbours(graph)
            library.build_pruning_dependency_graph(graph)
        except Exception as error:  # it raises whatever its string parsing stumbles over
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{type(network).__name__}: only_train_once cannot build its dependency graph, so pruner method `oto`"
                f" does not work for this network ({type(error).__name__}: {reason})"
            ) from error
    groups = _typed_groups(model, graph, output_positions(model, input_size))
    if not groups:
        raise UserError(f"{type(network).__name__}: has no channels that could be pruned (all make the logits)")
    return groups


@contextlib.contextmanager
def _library(model: nn.Module) -> Iterator[types.ModuleType]:
    """only_train_once with all that it needs in place and the module types of `model` made known to it."""
    import torch.onnx._internal.torchscript_exporter._globals as onnx_globals
    import torch.onnx._internal.torchscript_exporter.utils as onnx_utils

    opset, limit, path = onnx_globals.GLOBALS.export_onnx_opset_version, sys.getrecursionlimit(), sys.path[:]
    optimize = getattr(torch.onnx, "_optimize_graph", None)
    hidden = {name: sys.modules.pop(name) for name in _borrowed_names()}
    sys.modules["torch.onnx._globals"] = onnx_globals  # their places before torch 2.9
    torch.onnx._optimize_graph = onnx_utils._optimize_graph
    sys.modules["imp"] = types.ModuleType("imp")  # imported, never used, and gone from Python 3.12
    try:
        sys.path[:0] = importlib.util.find_spec("only_train_once").submodule_search_locations
        sys.setrecursionlimit(max(limit, RECURSION_LIMIT))
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import only_train_once
            from only_train_once.operation import BASIC_MODULES, operator

            onnx_globals.GLOBALS.export_onnx_opset_version = OPSET
            known = dict(BASIC_MODULES)
            try:
                BASIC_MODULES.update(_unknown_types(model, known, operator))
                yield only_train_once
            finally:
                BASIC_MODULES.clear()
                BASIC_MODULES.update(known)
    finally:
        onnx_globals.GLOBALS.export_onnx_opset_version = opset
        sys.setrecursionlimit(limit)
        sys.path[:] = path
        if optimize is None:
            del torch.onnx._optimize_graph
        else:
            torch.onnx._optimize_graph = optimize
        for name in _borrowed_names():
            del sys.modules[name]
        sys.modules.update(hidden)


def _borrowed_names() -> list[str]:
    """Module names that mean something else while the package is at work."""
    return [n for n in sys.modules if n.split(".")[0] in NOT_ITS_OWN or n in ("imp", "torch.onnx._globals")]


def _unknown_types(model: nn.Module, known: dict[str, type], operator: types.ModuleType) -> dict[str, type]:
    """Its operator for each type that it does not know by name, by what the type descends from (`LayerNorm2d`, ...)."""
    families = {
        nn.Conv2d: operator.Conv2dOTO,
        nn.Linear: operator.LinearOTO,
        _BatchNorm: operator.BatchNormOTO,
        nn.LayerNorm: operator.LayerNormOTO,
    }
    return {
        type(module).__name__: own
        for module in model.modules()
        for family, own in families.items()
        if isinstance(module, family) and type(module).__name__ not in known
    }


def _remember_neighbours(graph: Any) -> None:
    """Look up neighbours in tables: the package walks the list of all edges each time, thousands of times."""
    before: dict[str, list] = {}
    after: dict[str, list] = {}
    for source, target, _ in graph.edges:
        if source in graph.nodes and target in graph.nodes:
            before.setdefault(target, []).append(graph.nodes[source])
            after.setdefault(source, []).append(graph.nodes[target])
    graph.incoming = lambda node: before.get(node.id, [])
    graph.outgoing = lambda node: after.get(node.id, [])


def _typed_groups(model: nn.Module, graph: Any, positions: dict[str, int]) -> list[ChannelGroup]:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    order = {name: position for position, name in enumerate(model.state_dict())}
    names_of = {
        group_id: sorted({n for node in node_group.nodes.values() for n in node.param_names}, key=order.__getitem__)
        for group_id, node_group in graph.node_groups.items()
        if node_group.is_prunable or node_group.is_auxiliary
    }
    prunable = dict(sorted(names_of.items(), key=lambda item: [order[name] for name in item[1]]))
    for group_id, names in prunable.items():
        node_group = graph.node_groups[group_id]
        if node_group.is_auxiliary or any(node.is_concat(axis=1) for node in node_group.nodes.values()):
            where = names[0].rpartition(".")[0] if names else type(model).__name__
            raise UserError(f"{where}: works on concatenated channels, which cannot be pruned exactly yet: not pruned")
        for name in names:
            module = modules[name.rpartition(".")[0]]
            if not isinstance(module, CUTTABLE):
                where = name.rpartition(".")[0] or name
                raise UserError(f"{where}: {type(module).__name__} cannot be pruned exactly: not pruned")
    reads = _readers(graph, modules, prunable)

    groups, owner = [], {}
    for group_id, names in prunable.items():
        layers = [name.rpartition(".")[0] for name in names if name.endswith("weight")]
        layers = [path for path in layers if isinstance(modules[path], nn.Conv2d | nn.Linear)]
        channels = modules[layers[0]].weight.shape[0]  # the package's own count is wrong where a norm follows a flatten
        makes, kept_buffers = [], []
        for name in names:
            tensor = parameters.get(name, buffers.get(name))
            if tensor.dim() == 0:
                continue
            part = Slice(name, 0, _repeat(name, tensor, 0, channels))
            (makes if name in parameters else kept_buffers).append(part)
        cut = [
            Slice(name, 1, _repeat(name, parameters[name], 1, channels))
            for name in sorted(reads[group_id], key=order.__getitem__)
        ]
        for part in [*makes, *cut]:
            if owner.setdefault((part.name, part.axis), group_id) != group_id:
                raise UserError(f"{part.name.rpartition('.')[0]}: is shared by layers of different widths: not pruned")
        sizes = [(part.name, parameters[part.name].numel() // channels) for part in [*makes, *cut]]
        cost = sum(size for _, size in sizes), sum(size * positions.get(name, 0) for name, size in sizes)
        groups.append(ChannelGroup(layers[0], channels, tuple(makes), tuple(cut), tuple(kept_buffers), *cost))
    return groups


def _readers(graph: Any, modules: dict[str, nn.Module], prunable: dict[str, list[str]]) -> dict[str, set[str]]:
    """For each prunable group, the names of the weights that read its channels along axis 1.

    Raises:
        UserError: if a convolution divides such channels into groups.
    """
    reads: dict[str, set[str]] = {group_id: set() for group_id in prunable}
    for node in graph.nodes.values():
        if not node.is_stem():
            continue
        weight = next(name for name in node.param_names if name.endswith("weight"))  # stems are modules: all have one
        path = weight.rpartition(".")[0]
        module = modules[path]
        own = set(node.node_group_ids)
        sources = {group_id for before in graph.incoming(node) for group_id in before.node_group_ids}
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            depthwise = module.groups == module.in_channels == module.out_channels
            if not (depthwise and own == sources) and (own | sources) & prunable.keys():
                raise UserError(
                    f"{path}: a convolution in {module.groups} groups cannot be pruned exactly yet: not pruned"
                )
            continue
        for group_id in sources & prunable.keys():
            reads[group_id].add(weight)
    return reads


def _repeat(name: str, tensor: torch.Tensor, axis: int, channels: int) -> int:
    if tensor.dim() <= axis or tensor.shape[axis] % channels:
        raise UserError(
            f"{name.rpartition('.')[0]}: {name} of shape {tuple(tensor.shape)} does not fit the {channels} channels"
            " that it belongs to: not pruned"
        )
    return tensor.shape[axis] // channels
