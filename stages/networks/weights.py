"""Find the tensors of a network in a file of weights and load them.

Files differ in where they put the tensors and how they name them: training scripts wrap the state dict beside the
optimizer's, wrappers put a prefix before each name, and a file may hold the raw weights beside their average.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import nn

from stages.common.errors import UserError
from stages.networks.modules import MULTIPLYING, load_tensors

Tensors = dict[str, torch.Tensor]
AVERAGED = re.compile(r"(^|_)ema($|_)")
"""Entries that hold averaged weights, such as timm's `state_dict_ema` and `model_ema`: timm prefers them too."""
COUNTER = "num_batches_tracked"
"""Batch norm's counter of updates, which older files lack and nothing here reads."""
DEPTH = 2
"""Number of mappings around a state dict that are searched."""


@dataclass
class Match:
    """Which tensors of a state dict belong to a network."""

    entry: str
    """Place of the state dict in the file; empty if the file is one."""
    tensors: Tensors = field(repr=False)
    """By the network's names; without those of the head if the head has to start afresh."""
    prefix: str = ""
    """Text before each of the network's names in the file."""
    fresh: list[str] = field(default_factory=list)
    """The network's tensors that the file does not provide: a head of another number of classes."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of the file that are not the network's."""
    converted: bool = False
    """The library's own converter renamed the tensors."""
    problem: str = ""
    """Why the state dict does not fit; empty if it does."""
    shared: int = 0
    """Number of the network's names that the state dict has."""

    def __str__(self) -> str:
        parts = [f"{len(self.tensors)} tensors"]
        parts += [f"from the entry {self.entry!r}"] if self.entry else []
        parts += [f"without the prefix {self.prefix!r}"] if self.prefix else []
        parts += ["names converted by timm"] if self.converted else []
        parts += [f"fresh, starting at zero: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"ignored: {_some(self.ignored)}"] if self.ignored else []
        return "; ".join(parts)


def read_tensors(path: Path) -> Any:
    """The contents of a `.safetensors` or PyTorch file, without running code from it.

    Raises:
        UserError: if the file is missing, broken or holds other objects than tensors, containers and numbers.
    """
    if not path.is_file():
        raise UserError(f"weights {str(path)!r}: no such file (relative to the folder of params.yaml)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its options
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # safetensors and torch each raise their own classes for a broken file
        found = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        reason = f"it holds a {found[1]}, which only running its code can read" if found else "the file is broken"
        raise UserError(
            f"weights {str(path)!r} cannot be read as tensors: {reason}; save it by torch.save(model.state_dict(), ...)"
            " or as .safetensors"
        ) from None


def find_weights(network: nn.Module, contents: Any, where: str, classes: int, head_fits: bool = True) -> Match:
    """The one state dict in a file that fits the network; averaged weights go before raw ones.

    Args:
        contents: what `read_tensors` returns.
        where: the file, for messages.
        classes: number of logits of the network.
        head_fits: false if the file's head is of other classes, whatever its shape.

    Raises:
        UserError: if no entry fits, or several do.
    """
    matches = [_match(network, state, entry, classes, head_fits) for entry, state in _state_dicts(contents)]
    if not matches:
        raise UserError(f"{where} does not hold a state dict (names and tensors)")
    fitting = [match for match in matches if not match.problem]
    averaged = [match for match in fitting if AVERAGED.search(match.entry.rpartition(".")[2])]
    chosen = averaged or fitting
    if len(chosen) > 1:
        names = " and ".join(repr(match.entry or "the file itself") for match in chosen)
        raise UserError(f"{where}: the entries {names} both fit the network: save the one that you want alone")
    if chosen:
        return chosen[0]
    best = max(matches, key=lambda match: match.shared)
    entry = f" (entry {best.entry!r})" if best.entry else ""
    raise UserError(f"{where}{entry}: {best.problem}")


def load_match(network: nn.Module, match: Match, where: str) -> None:
    """Load the tensors in place; the tensors of a fresh head become zero, so that all classes start equally likely.

    Raises:
        UserError: if a tensor holds NaN or infinite values.
    """
    if broken := [name for name, tensor in match.tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{where}: {broken[0]} holds values that are not finite: use another file")
    own = network.state_dict()
    load_tensors(network, match.tensors | {name: torch.zeros_like(own[name]) for name in match.fresh}, strict=False)


def head_tensors(network: nn.Module, classes: int) -> list[str]:
    """Names of the tensors of the layers that give the logits, which may start afresh.

    timm names them; elsewhere it is the last layer with one output for each class.
    """
    named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    layers = [named] if isinstance(named, str) else list(named)
    modules = dict(network.named_modules())
    if not layers or any(name not in modules for name in layers):
        fitting = [name for name, m in modules.items() if isinstance(m, MULTIPLYING) and m.weight.shape[0] == classes]
        layers = fitting[-1:]
    return [name for name in network.state_dict() if name.startswith(tuple(f"{layer}." for layer in layers))]


def _state_dicts(contents: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensors]]:
    if not isinstance(contents, Mapping):
        return
    if tensors := {str(name): value for name, value in contents.items() if isinstance(value, torch.Tensor)}:
        yield ".".join(place), tensors
    if len(place) < DEPTH:
        for name, value in contents.items():
            yield from _state_dicts(value, (*place, str(name)))


def _match(network: nn.Module, state: Tensors, entry: str, classes: int, head_fits: bool) -> Match:
    found = _match_names(network, state, entry, classes, head_fits)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if found.problem and convert is not None:
        try:
            renamed = convert({name.removeprefix(found.prefix): tensor for name, tensor in state.items()}, network)
            other = _match_names(network, renamed, entry, classes, head_fits)
        except Exception:  # converters assume a certain file and raise anything for another
            return found
        if not other.problem:
            other.converted = True
            return other
    return found


def _match_names(network: nn.Module, state: Tensors, entry: str, classes: int, head_fits: bool) -> Match:
    own, head = network.state_dict(), head_tensors(network, classes)
    prefix = _common_prefix(own, state)
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = Match(entry, {}, prefix, ignored=sorted(name for name in state if not name.startswith(prefix)))
    if not head_fits or _is_other_head({name: own[name].shape for name in head}, inside):
        found.fresh = head
    needed = own.keys() - found.fresh
    unknown = sorted(inside.keys() - own.keys())
    missing = sorted(name for name in needed - inside.keys() if not name.endswith(COUNTER))
    for name in sorted(needed & inside.keys()):
        tensor = inside[name]
        found.tensors[name] = _for_gray(tensor, own[name]) if tensor.shape != own[name].shape else tensor
    found.shared = len(found.tensors)
    wrong = [name for name, tensor in found.tensors.items() if tensor.shape != own[name].shape]
    if missing or unknown:
        found.problem = (
            f"is not of this network: {len(missing)} of its {len(own)} tensors are missing ({_some(missing)}),"
            f" {len(unknown)} are unknown ({_some(unknown)}): check architecture, arguments and weights"
        )
    elif wrong:
        shapes = f"{tuple(found.tensors[wrong[0]].shape)}, but the network needs {tuple(own[wrong[0]].shape)}"
        found.problem = f"{wrong[0]} has shape {shapes}: check architecture and arguments"
    return found


def _is_other_head(head: dict[str, torch.Size], state: Tensors) -> bool:
    """True if the state dict has no head, or one for another number of classes."""
    found = {name: state[name].shape for name in head if name in state}
    return not found or (found != head and {n: s[1:] for n, s in found.items()} == {n: s[1:] for n, s in head.items()})


def _for_gray(tensor: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """The filters of a first layer for RGB images, summed over the colors if the network takes gray ones."""
    gray = tensor.dim() == 4 and tensor.shape[1] == 3 and needed.shape == (len(tensor), 1, *tensor.shape[2:])
    return adapt_input_conv(1, tensor) if gray else tensor


def _common_prefix(own: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """The text that stands before most of the network's names in the file."""
    prefixes: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for start in range(len(parts)):
            if (inner := ".".join(parts[start:])) in own:
                prefixes[name.removesuffix(inner)] += 1
    return min(prefixes, key=lambda prefix: (-prefixes[prefix], len(prefix)), default="")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
