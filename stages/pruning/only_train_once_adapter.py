"""The only module that uses only_train_once: it converts the package's dependency graph to typed channel groups.

Only the package's graph and partition are used. Its optimizer needs CUDA, and its subnets are pickled modules that
change the output of LayerNorm networks. All that the package changes in the interpreter (search path, module names,
torch's ONNX settings, printing) is restored when the call returns.
"""

import contextlib
import copy
import importlib.util
import io
import math
import re
import sys
import types
import warnings
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.common.errors import UserError
from stages.networks.modules import channels_of
from stages.networks.spec import NetworkSpec
from stages.pruning.groups import PARTIAL_REMEDY, ChannelGroup, Slice, check_exact, inexact_groups

NOT_ITS_OWN = ("graph", "operation", "transform")
"""Top-level names under which the package imports its own parts a second time."""
RECURSION_LIMIT = 20_000  # its searches recurse along the longest path of operators: ConvNeXt-Base exceeds the default
OPSET = 16  # from 17 on LayerNorm is one operator, whose parameters the package does not find
CUTTABLE = (nn.Conv2d, nn.Linear, _BatchNorm, nn.LayerNorm, GlobalResponseNorm)


def channel_groups(network: nn.Module, input_size: int, excluded: Set[str] = frozenset()) -> list[ChannelGroup]:
    """Partition a classifier into groups of channels that can be removed together.

    Args:
        network: Layer scale folded, on any device; it stays as it is.
        input_size: Side S of its input `[N, C, S, S]`, in pixels.
        excluded: Names of modules whose output channels stay.

    Returns:
        The groups in the network's order, without those that make the logits or channels of excluded modules.

    Raises:
        UserError: If the graph cannot be built, a named module cannot be pruned exactly, or no group can be pruned.
    """
    groups, refused = _partition(network, input_size, excluded)
    if refused:
        raise UserError(next(iter(refused.values())) + (PARTIAL_REMEDY if groups else ""))
    if not groups:
        raise UserError(f"{type(network).__name__}: has no channels that could be pruned ({_none_left(excluded)})")
    return groups


def exact_groups(
    network: nn.Module, spec: NetworkSpec, input_size: int, allow_partial: bool, excluded: Set[str] = frozenset()
) -> tuple[list[ChannelGroup], list[str]]:
    """The groups of the network of `spec` with a proof that cutting zeroed channels changes nothing.

    Args:
        allow_partial: Leave whole what cannot be cut exactly, instead of refusing the network.
        excluded: Names of modules whose output channels stay; what is whole because of them needs no exact cut.

    Returns:
        The groups, and the names of the layers whose channels stay whole (empty unless `allow_partial`).

    Raises:
        UserError: If a named layer cannot be cut exactly, or nothing can be cut.
    """
    if not allow_partial:
        groups = channel_groups(network, input_size, excluded)
        check_exact(network, spec, groups, input_size)
        return groups, []
    groups, refused = _partition(network, input_size, excluded)
    culprits = inexact_groups(network, spec, groups, input_size)
    groups = [group for group in groups if group.name not in culprits]
    whole = [*refused, *culprits]
    if not groups:
        reason = f"of {len(whole)} layers such as {whole[0]} none can be cut exactly" if whole else _none_left(excluded)
        raise UserError(f"{spec.library} {spec.architecture}: has no channels that could be pruned ({reason})")
    return groups, whole


def _none_left(excluded: Set[str]) -> str:
    return "all make the logits" + (", or channels of layers in exclude: shorten it" if excluded else "")


def _partition(
    network: nn.Module, input_size: int, excluded: Set[str] = frozenset()
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be typed, and the reasons why others cannot, by name; both in the network's order."""
    model = copy.deepcopy(network).cpu().float().eval().requires_grad_(True)
    with _library(model) as library:
        try:
            # The package's own entry point would add a clustering and a second pass.
            with _resizing_pools():
                graph = library.Graph(model, torch.zeros(1, channels_of(model), input_size, input_size))
            _index_neighbors(graph)
            library.build_pruning_dependency_graph(graph)
        except Exception as error:  # its string parsing raises errors of many kinds
            raise UserError(
                f"{type(network).__name__}: only_train_once cannot tell which of its channels belong together"
                f" ({_obstacle(model, error)}): only l1_unstructured and random_unstructured can prune it"
            ) from error
    return _typed_groups(model, graph, excluded)


def _obstacle(model: nn.Module, error: Exception) -> str:
    """The reason why the package cannot build its graph; its own messages name internal nodes."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    if shared := next((several for several in names.values() if len(several) > 1), None):
        return f"{' and '.join(shared)} are one shared parameter"
    if operator := re.search(r"operator '([\w:]+)'", str(error)):
        return f"the package cannot follow {operator[1]}"
    return "its graph holds operations that the package does not know"


@contextlib.contextmanager
def _resizing_pools() -> Iterator[None]:
    """Replace adaptive pooling by resizing, since the tracer needs sizes that divide each other.

    Only the trace's channel dependencies are used, not its values, and neither operator mixes channels.
    """
    pool = F.adaptive_avg_pool2d

    def resize(input: torch.Tensor, output_size: int | Sequence[int | None]) -> torch.Tensor:
        height, width = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
        if height == width == 1:
            return pool(input, 1)
        return F.interpolate(input, size=(height or input.shape[2], width or input.shape[3]))

    F.adaptive_avg_pool2d = resize
    try:
        yield
    finally:
        F.adaptive_avg_pool2d = pool


@contextlib.contextmanager
def _library(model: nn.Module) -> Iterator[types.ModuleType]:
    """only_train_once, with all that it needs, and with the module types of `model` registered."""
    import torch.onnx._internal.torchscript_exporter._globals as onnx_globals
    import torch.onnx._internal.torchscript_exporter.utils as onnx_utils

    exporter = onnx_globals.GLOBALS
    with contextlib.ExitStack() as undo:
        undo.callback(sys.modules.update, {name: sys.modules.pop(name) for name in _borrowed_names()})
        undo.callback(lambda: [sys.modules.pop(name) for name in _borrowed_names()])
        sys.modules["torch.onnx._globals"] = onnx_globals  # its name before torch 2.9
        sys.modules["imp"] = types.ModuleType("imp")  # imported but never used; Python 3.12 has no such module
        if not hasattr(torch.onnx, "_optimize_graph"):  # torch before 2.9 has it
            torch.onnx._optimize_graph = onnx_utils._optimize_graph
            undo.callback(delattr, torch.onnx, "_optimize_graph")
        package = importlib.util.find_spec("only_train_once")
        undo.callback(sys.path.__setitem__, slice(None), sys.path[:])
        sys.path[:0] = (package and package.submodule_search_locations) or []
        undo.callback(sys.setrecursionlimit, sys.getrecursionlimit())
        sys.setrecursionlimit(max(sys.getrecursionlimit(), RECURSION_LIMIT))
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        import only_train_once
        from only_train_once.operation import BASIC_MODULES, operator

        undo.callback(setattr, exporter, "export_onnx_opset_version", exporter.export_onnx_opset_version)
        exporter.export_onnx_opset_version = OPSET
        undo.callback(BASIC_MODULES.update, dict(BASIC_MODULES))
        undo.callback(BASIC_MODULES.clear)
        BASIC_MODULES.update(_unknown_types(model, BASIC_MODULES, operator))
        yield only_train_once


def _borrowed_names() -> list[str]:
    """Loaded modules under names that the package uses for others."""
    return [n for n in sys.modules if n.split(".")[0] in NOT_ITS_OWN or n in ("imp", "torch.onnx._globals")]


def _unknown_types(model: nn.Module, known: dict[str, type], operator: types.ModuleType) -> dict[str, type]:
    """The package's operator for each type that it does not know by name, by its base class (`LayerNorm2d`, ...)."""
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


def _index_neighbors(graph: Any) -> None:
    """Look up neighbors in tables: the package searches the list of all edges thousands of times."""
    before: dict[str, list] = {}
    after: dict[str, list] = {}
    for source, target, _ in graph.edges:
        if source in graph.nodes and target in graph.nodes:
            before.setdefault(target, []).append(graph.nodes[source])
            after.setdefault(source, []).append(graph.nodes[target])
    graph.incoming = lambda node: before.get(node.id, [])
    graph.outgoing = lambda node: after.get(node.id, [])


@dataclass
class _Union:
    """Node groups that can only be cut together, if they can be cut at all."""

    makes: list[str]
    """Parameters and buffers, in the network's order."""
    reads: list[str]
    conv_groups: int
    """Greatest common divisor of the group counts of its grouped convolutions; 0 where it has none."""
    problem: str | None


def _typed_groups(model: nn.Module, graph: Any, excluded: Set[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
    order = {name: position for position, name in enumerate(model.state_dict())}
    groups, refused = [], {}
    for union in _unions(model, graph, order):
        if any(_owner(name) in excluded for name in union.makes):
            continue
        try:
            groups.append(_typed_group(union, model))
        except UserError as error:
            layers = _layers(union, model)
            refused[layers[0] if layers else _owner(union.makes[0])] = str(error)
    return groups, refused


def _unions(model: nn.Module, graph: Any, order: dict[str, int]) -> list[_Union]:
    """The package's prunable node groups in order, where a grouped convolution ties several into one."""
    makes = {
        group_id: names
        for group_id, node_group in graph.node_groups.items()
        if (node_group.is_prunable or node_group.is_auxiliary)
        and (names := {name for node in node_group.nodes.values() for name in node.param_names})
    }
    reads, grouped, problems = _readers(graph, dict(model.named_modules()), makes.keys())
    for group_id in _concatenated(graph, makes.keys()):
        where = _owner(min(makes[group_id], key=order.__getitem__))
        problems[group_id] = f"{where}: its channels pass a concatenation, which cannot be pruned exactly yet"
    tied = {group_id: {group_id} for group_id in makes}
    for members, _ in grouped:
        together = set().union(*(tied[member] for member in members))
        tied |= dict.fromkeys(together, together)

    unions = [
        _Union(
            makes=sorted(set().union(*(makes[member] for member in ids)), key=order.__getitem__),
            reads=sorted(set().union(*(reads[member] for member in ids)), key=order.__getitem__),
            conv_groups=math.gcd(*(count for members, count in grouped if members <= ids)),
            problem=next((problems[member] for member in sorted(ids) if member in problems), None),
        )
        for ids in {id(ids): ids for ids in tied.values()}.values()
    ]
    unions.sort(key=lambda union: [order[name] for name in union.makes])
    owner: dict[tuple[str, int], _Union] = {}
    for union in unions:
        for key in [*((name, 0) for name in union.makes), *((name, 1) for name in union.reads)]:
            other = owner.setdefault(key, union)
            if other is not union:
                other.problem = union.problem = f"{_owner(key[0])}: is shared by layers of different widths"
    return unions


def _readers(
    graph: Any, modules: dict[str, nn.Module], cuttable: Set[str]
) -> tuple[dict[str, set[str]], list[tuple[set[str], int]], dict[str, str]]:
    """Relate the cuttable node groups to the layers behind them.

    Returns:
        The names of the weights that read a node group's channels along axis 1, by node group; for each grouped
        convolution the node groups before and behind it and its number of groups; the problems of node groups that
        cannot be cut.
    """
    reads: dict[str, set[str]] = {group_id: set() for group_id in cuttable}
    grouped: list[tuple[set[str], int]] = []
    problems: dict[str, str] = {}
    for node in graph.nodes.values():
        if not node.is_stem():
            continue
        weight = next(name for name in node.param_names if name.endswith("weight"))  # stems are modules, which have one
        module, own = modules[_owner(weight)], set(node.node_group_ids)
        sources = {group_id for before in graph.incoming(node) for group_id in before.node_group_ids}
        touched = (own | sources) & cuttable
        if not isinstance(module, nn.Conv2d | nn.Linear):
            problem = f"{_owner(weight)}: {type(module).__name__} cannot be pruned exactly"
            problems |= dict.fromkeys(touched, problem)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            if touched:
                grouped.append((touched, module.groups))
            if not sources or touched != own | sources:
                ends = f"{_owner(weight)}: a convolution in {module.groups} groups between channels that must stay"
                problems |= dict.fromkeys(touched, ends)
        else:
            for group_id in sources & cuttable:
                reads[group_id].add(weight)
    return reads, grouped, problems


def _concatenated(graph: Any, cuttable: Set[str]) -> list[str]:
    """The node groups whose channels enter or leave a concatenation, each once."""
    found: dict[str, None] = {}
    for node in graph.nodes.values():
        if node.is_concat(axis=1):
            for near in (node, *graph.incoming(node)):
                found |= dict.fromkeys(near.node_group_ids)
    return [group_id for group_id in found if group_id in cuttable]


def _typed_group(union: _Union, model: nn.Module) -> ChannelGroup:
    if union.problem:
        raise UserError(f"{union.problem}: not pruned")
    parameters = dict(model.named_parameters())
    tensors = parameters | dict(model.named_buffers())
    for name in union.makes:
        _require_cuttable(name, model.get_submodule(_owner(name)), tensors[name])
    layers = _layers(union, model)
    # The package's own count of channels is wrong where a norm follows a flatten.
    channels = union.conv_groups or len(tensors[f"{layers[0]}.weight"])
    made = [Slice(name, 0, _repeat(name, tensors[name], 0, channels)) for name in union.makes if tensors[name].dim()]
    reads = tuple(Slice(name, 1, _repeat(name, tensors[name], 1, channels)) for name in union.reads)
    makes = tuple(part for part in made if part.name in parameters)
    buffers = tuple(part for part in made if part.name not in parameters)
    return ChannelGroup(layers[0], channels, makes, reads, buffers)


def _layers(union: _Union, model: nn.Module) -> list[str]:
    """Names of its convolutions and linear layers, in the network's order."""
    paths = [_owner(name) for name in union.makes if name.endswith("weight")]
    return [path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d | nn.Linear)]


def _owner(name: str) -> str:
    """The name of the module that holds a tensor."""
    return name.rpartition(".")[0]


def _require_cuttable(name: str, module: nn.Module, tensor: torch.Tensor) -> None:
    """Raise a `UserError` for a tensor that `networks.reshape` cannot shorten.

    Besides the known kinds, a module of the network's own may hold vectors with one entry for each channel, such as a
    learned scale of shape `[C]` or `[C, 1, 1]`.
    """
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise UserError(f"{_owner(name)}: a LayerNorm over several axes cannot be pruned exactly: not pruned")
    own_vector = isinstance(tensor, nn.Parameter) and tensor.dim() and tensor.numel() == len(tensor)
    foreign = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.PReLU)
    if not isinstance(module, CUTTABLE) and (foreign or not own_vector):
        raise UserError(f"{_owner(name) or name}: {type(module).__name__} cannot be pruned exactly: not pruned")


def _repeat(name: str, tensor: torch.Tensor, axis: int, channels: int) -> int:
    if tensor.dim() <= axis or tensor.shape[axis] % channels:
        raise UserError(
            f"{_owner(name)}: {name} of shape {tuple(tensor.shape)} does not fit the {channels} channels"
            " that it belongs to: not pruned"
        )
    return tensor.shape[axis] // channels
