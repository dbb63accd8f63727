"""Save and load a model artifact: a folder with `model.json` and `model.safetensors`; nothing is pickled.

`model.safetensors` holds the tensors as they are stored: a packed layer has integers and scales, and integers of less
than 8 bits are laid out by `artifacts.packing`. `model.json` holds a `Description`. A compressed artifact also has
`model.onnx`, which the quantize stage writes.
"""

import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.artifacts.description import AGAIN, DESCRIPTION, ONNX, TENSORS, Description, LayerStorage, read_description
from stages.artifacts.packing import LARGEST, pack, unpack
from stages.common.errors import UserError
from stages.common.files import atomic_folder, sha256_of, write_json
from stages.networks.build import build_network
from stages.networks.dynamic_int8 import pack_layer
from stages.networks.integer_weights import KINDS, Grid, packed_layers, tensors_of, with_integers
from stages.networks.modules import load_tensors, replace_module
from stages.networks.preprocess import Classifier

GRIDS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
LAYER_TENSORS = ("weight", "weight_scale", "bias", *GRIDS)  # that a packed layer may hold


def save_artifact(
    folder: Path, network: nn.Module, description: Description, extra: Callable[[Path], dict[str, Any]] | None = None
) -> None:
    """Write an artifact whole or not at all, then load it back and compare a forward pass.

    Args:
        folder: final place of the artifact, which replaces an older one.
        network: a network whose packed layers are those that `description.layers` lists; it is not changed.
        description: this function fills in `tensors` and `versions`.
        extra: called with the unfinished folder before `model.json` is written, to add `model.onnx`; its result goes
            into `description.onnx`.

    Raises:
        UserError: if a weight is NaN or infinite, or the written files do not load to the same network.
    """
    state = _stored_tensors(network, description.layers)
    remedy = "not saved; lower finetune.learning_rate, or the pruner's or quantizer's learning_rate_factor"
    _refuse_not_finite(folder, state, remedy)
    with atomic_folder(folder) as unfinished:
        try:
            save_file(state, unfinished / TENSORS)
        except SafetensorError as error:  # also if the disk is full or write-protected
            remedy = "free disk space or allow writing, then run again"
            raise UserError(f"cannot write {folder}: {error}: {remedy}") from None
        description.tensors = _hash_and_size(unfinished / TENSORS)
        description.versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
        if extra is not None:
            description.onnx = extra(unfinished) | _hash_and_size(unfinished / ONNX)
        write_json(unfinished / DESCRIPTION, asdict(description))
        _compare(network, unfinished, description)


def load_artifact(folder: Path) -> tuple[nn.Module, Description]:
    """The network, in evaluation mode on the CPU, and its description.

    Raises a `UserError` if a file is missing, of another version, changed since it was written, does not fit the
    network, or holds NaN or infinite values.
    """
    description = read_description(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro` or `dvc pull`")
    if (found := sha256_of(path)) != description.tensors["sha256"]:
        hashes = f"has sha256 {found[:12]}…, but model.json says {description.tensors['sha256'][:12]}…"
        raise UserError(f"{path} {hashes}: it is not the file that model.json describes; run `dvc repro`")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    _refuse_not_finite(folder, state, AGAIN)
    try:
        network = build_network(description.network)
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION}: network: {error}") from None
    packed = {
        name: {part: state.pop(f"{name}.{part}") for part in LAYER_TENSORS if f"{name}.{part}" in state}
        for name in description.layers
    }
    expected = {name: tuple(tensor.shape) for name, tensor in _float_tensors(network, packed).items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | given.keys()):
        if (shape := given.get(name, "none")) != (needed := expected.get(name, "none")):
            raise UserError(f"{path}: {name} has shape {shape}, the described network needs {needed}")
    load_tensors(network, state, strict=False)
    modules = dict(network.named_modules())
    for name, tensors in packed.items():
        try:
            layer = _packed_layer(modules.get(name), description.layers[name], tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            problem = "is not in the described network, or its tensors do not fit"
            raise UserError(f"{path}: packed layer {name} {problem}: {error}") from None
        replace_module(network, name, layer)
    return network.eval(), description


def load_classifier(folder: Path) -> tuple[Classifier, Description]:
    """`load_artifact` with the preprocessing in front: the result takes uint8 pixels `[N, H, W, C]`."""
    network, description = load_artifact(folder)
    return Classifier(description.preprocess(), network).eval(), description


def _refuse_not_finite(folder: Path, tensors: dict[str, torch.Tensor], remedy: str) -> None:
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinite values: {remedy}")


def _stored_tensors(network: nn.Module, layers: dict[str, LayerStorage]) -> dict[str, torch.Tensor]:
    packed = packed_layers(network)
    state = _float_tensors(network, packed)
    for name, layer in packed.items():
        tensors = tensors_of(layer)
        if (bits := layers[name].weight_bits) < LARGEST:
            tensors["weight"] = torch.from_numpy(pack(tensors["weight"].cpu().numpy(), bits))
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def _float_tensors(network: nn.Module, packed: Iterable[str]) -> dict[str, torch.Tensor]:
    prefixes = tuple(f"{name}." for name in packed)
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(prefixes)}


def _packed_layer(own: nn.Module | None, storage: LayerStorage, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The packed layer that replaces the float layer `own`; raises various errors if the tensors do not fit."""
    if own is None or type(own) not in KINDS:
        raise TypeError(f"{type(own).__name__} has no packed form")
    shape, bits = tuple(own.weight.shape), storage.weight_bits
    if bits < LARGEST:
        tensors["weight"] = torch.from_numpy(unpack(tensors["weight"].numpy(), bits, shape))
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != torch.int8 or tuple(weight.shape) != shape or scale.shape not in ((1,), (shape[0],)):
        raise ValueError(f"weight {weight.dtype} {tuple(weight.shape)} with {tuple(scale.shape)} scales")
    if ("bias" in tensors) != (own.bias is not None):
        raise ValueError("bias")
    if storage.activations == "dynamic":
        return pack_layer(tensors)
    grids = {
        side: Grid(tensors[f"{side}_scale"].item(), int(tensors[f"{side}_zero_point"]))
        for side in ("input", "output")
        if f"{side}_scale" in tensors
    }
    layer = with_integers(own, weight, scale, bits, grids)
    layer.load_state_dict(tensors)
    return layer


def _compare(network: nn.Module, folder: Path, description: Description) -> None:
    loaded, _ = load_artifact(folder)
    size = description.input_size
    x = torch.randn(2, description.network.channels, size, size, generator=torch.Generator().manual_seed(0))
    mode, device = network.training, next((p.device for p in network.parameters()), torch.device("cpu"))
    network.eval().cpu()
    with torch.no_grad():
        same = torch.allclose(network(x), loaded(x), rtol=1e-4, atol=1e-5)
    network.train(mode).to(device)
    if not same:
        raise UserError(f"{description.name}: the saved network gives another output than the one in memory: not saved")


def _hash_and_size(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}
