"""A folder that explains itself and can be opened safely: `model.json` beside `model.safetensors`, never a pickle.

`model.safetensors` holds the tensors as they are stored: integers with their scales where a layer is packed, those of
under 8 bits as `artifacts.packing` lays them out.
`model.json` holds a `Description`. Compressed artifacts have `model.onnx` as well, written by the quantize stage.
"""

import functools
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from stages.artifacts.packing import LARGEST, pack, unpack
from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import atomic_folder, read_json, sha256_of, write_json
from stages.networks.build import NetworkSpec, build_network
from stages.networks.dynamic_int8 import pack_layer
from stages.networks.integer_weights import KINDS, Grid, with_integers
from stages.networks.packed import packed_layers, tensors_of
from stages.networks.pointwise import replace_module
from stages.networks.preprocess import Classifier, Preprocess
from stages.networks.tensors import load_tensors

VERSION = 3
TENSORS, DESCRIPTION, ONNX = "model.safetensors", "model.json", "model.onnx"
SECTIONS: dict[str, dict[str, type]] = {
    "data": {"name": str, "sha256": str},
    "parent": {"name": str, "sha256": str, "metrics": dict},
    "tensors": {"sha256": str, "bytes": int},
    "onnx": {"sha256": str, "bytes": int, "quantized_operators": int},
}
"""What the free-form sections of `model.json` hold at least."""
OPTIONAL = ("parent", "onnx")
"""Those that may be empty: a dense network has no parent, a float artifact no `model.onnx`."""
FLOAT_BITS = 32
"""Of what is not packed."""
LAYER_TENSORS = (
    "weight",
    "weight_scale",
    "bias",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
)
"""What a packed layer may hold."""


@dataclass
class LayerStorage:
    """How one layer's weight is stored and computed; layers that are not listed are float32."""

    weight_bits: int
    activation_bits: int
    scheme: str
    """`symmetric_per_channel` or `symmetric_per_tensor`."""
    activations: Literal["float", "dynamic", "static"] = "dynamic"
    """Left in float, or rounded to a grid found in every call (by PyTorch's own dynamic layers), or found once on
    calibration images."""


@dataclass
class Description:
    """`model.json`: what the tensors are, where they come from and what they were made with."""

    name: str
    stage: str
    model: str
    """The entry of `models` that it descends from."""
    network: NetworkSpec
    classes: list[str]
    image_size: int
    """Side in pixels of the stored images, which `model.onnx` takes."""
    input_size: int
    """Side in pixels that the network sees, after scaling."""
    mean: list[float]
    std: list[float]
    data: dict[str, str]
    """`name` and `sha256` of the images that it was made from."""
    parameters: dict[str, Any]
    """The stage's own parameters."""
    seed: int
    parent: dict[str, Any] | None = None
    """`name`, `sha256` and `metrics` of the artifact that it was made from."""
    layers: dict[str, LayerStorage] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)
    """Layers with weights that the quantizer left in float."""
    search: dict[str, Any] = field(default_factory=dict)
    """Of a search for bits: the objective of each allocation tried, the budget, and how sensitive layers were."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures on validation images; never on test images."""
    onnx: dict[str, Any] = field(default_factory=dict)
    """`sha256`, `bytes` and `opset` of `model.onnx`."""
    versions: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    """`sha256` and `bytes` of `model.safetensors`."""
    version: int = VERSION

    def preprocess(self) -> Preprocess:
        return Preprocess(self.mean, self.std, self.input_size)

    def spans_batch(self) -> bool:
        """Whether scales are found over a whole batch in every call: a device sees one image at a time."""
        return any(layer.activations == "dynamic" for layer in self.layers.values())

    def require_metrics(self, folder: Path, *names: str) -> None:
        """Raise a `UserError` where the artifact, read from `folder`, does not tell these figures."""
        if missing := [name for name in names if name not in self.metrics]:
            raise UserError(f"{folder / DESCRIPTION}: metrics.{missing[0]} is missing: make it again with `dvc repro`")

    def require_images(self, folder: Path, sha256: str) -> None:
        """Raise a `UserError` where the artifact, read from `folder`, was made from other images than those at hand."""
        if self.data["sha256"] != sha256:
            raise UserError(
                f"{folder} was made from other images ({self.data['name']}) than {paths.IMAGES} holds: run `dvc repro`"
            )


def save_artifact(
    folder: Path, network: nn.Module, description: Description, extra: Callable[[Path], dict[str, Any]] | None = None
) -> None:
    """Write an artifact whole or not at all, then load it back and compare a forward pass.

    Args:
        folder: its final place; what was there is replaced.
        network: float, or with the packed layers of `networks.packed` that `description.layers` lists; left as it is.
        description: `tensors` and `versions` are filled in here.
        extra: called with the unfinished folder, before `model.json` is written, to add `model.onnx`; what it
            returns becomes `description.onnx`.

    Raises:
        UserError: if a weight is NaN or infinite, or what was written does not load to the same network.
    """
    state = _stored_tensors(network, description.layers)
    _refuse_not_finite(
        folder, state, "not saved; lower finetune.learning_rate, or the pruner's or quantizer's learning_rate_factor"
    )
    with atomic_folder(folder) as unfinished:
        _save_tensors(state, unfinished / TENSORS, folder)
        description.tensors = _hash_and_size(unfinished / TENSORS)
        description.versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")}
        if extra is not None:
            description.onnx = extra(unfinished) | _hash_and_size(unfinished / ONNX)
        write_json(unfinished / DESCRIPTION, asdict(description))
        _compare(network, unfinished, description)


def load_artifact(folder: Path) -> tuple[nn.Module, Description]:
    """The network, in evaluation mode on the CPU, and its description.

    Raises:
        UserError: if a file is missing, of another version, changed since it was written, does not fit, or holds NaN or
            infinite values.
    """
    description = read_description(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro` or `dvc pull`")
    if (found := sha256_of(path)) != description.tensors["sha256"]:
        raise UserError(
            f"{path} has sha256 {found[:12]}…, model.json says {description.tensors['sha256'][:12]}…: it is not the"
            " file described there; run `dvc repro`"
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None
    _refuse_not_finite(folder, state, "make it again with `dvc repro`")
    try:
        network = build_network(description.network)
    except UserError as error:
        raise UserError(f"{folder / DESCRIPTION}: network: {error}") from None
    packed = {
        name: {part: state.pop(f"{name}.{part}") for part in LAYER_TENSORS if f"{name}.{part}" in state}
        for name in description.layers
    }
    prefixes = tuple(f"{name}." for name in packed)
    expected = {n: t.shape for n, t in network.state_dict().items() if not (prefixes and n.startswith(prefixes))}
    for name in sorted(expected.keys() | state.keys()):
        if (given := state[name].shape if name in state else None) != expected.get(name):
            raise UserError(
                f"{path}: {name} has shape {_shape(given)}, the network described needs {_shape(expected.get(name))}"
            )
    load_tensors(network, state, strict=False)
    modules = dict(network.named_modules())
    for name, tensors in packed.items():
        try:
            layer = _packed_layer(modules.get(name), description.layers[name], tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: packed layer {name} is not in the network described, or its tensors are not what it needs:"
                f" {error}"
            ) from None
        replace_module(network, name, layer)
    return network.eval(), description


def load_classifier(folder: Path) -> tuple[Classifier, Description]:
    """As `load_artifact`, with the preprocessing in front: takes uint8 pixels `[N, H, W, 3]`."""
    network, description = load_artifact(folder)
    return Classifier(description.preprocess(), network).eval(), description


def read_description(folder: Path) -> Description:
    """`model.json` alone.

    Raises:
        UserError: if it is missing, of another version, or damaged: a key or a value that does not belong.
    """
    path = folder / DESCRIPTION
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        found = raw.get("version") if isinstance(raw, dict) else None
        raise UserError(
            f"{path}: artifact version {found!r}, this program reads {VERSION}: make it again with `dvc repro`"
        )
    known = {f.name for f in fields(Description)}
    if odd := sorted(known ^ raw.keys()):
        raise UserError(f"{path}: keys missing or unknown: {', '.join(odd)}")
    try:
        _typed().validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UserError(f"{path}: {where}: {detail['msg']}: it is damaged, make it again with `dvc repro`") from None
    try:
        raw["network"] = NetworkSpec(**raw["network"])
        raw["layers"] = {name: LayerStorage(**layer) for name, layer in raw["layers"].items()}
    except TypeError as error:  # an unknown key
        raise UserError(f"{path}: {error}") from None
    for section, keys in SECTIONS.items():
        given = raw[section]
        for key, kind in keys.items() if given or section not in OPTIONAL else ():
            if not isinstance(given.get(key), kind):
                raise UserError(
                    f"{path}: {section}.{key} is missing or no {kind.__name__}: it is damaged, make it again with"
                    " `dvc repro`"
                )
    return Description(**raw)


def _refuse_not_finite(folder: Path, tensors: dict[str, torch.Tensor], remedy: str) -> None:
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise UserError(f"{folder}: {broken[0]} holds NaN or infinite values: {remedy}")


@functools.cache
def _typed() -> TypeAdapter:
    return TypeAdapter(Description)


def check_onnx(folder: Path, description: Description) -> None:
    """Raise a `UserError` where `model.onnx` is missing or not the file that `model.json` describes."""
    path = folder / ONNX
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro` or `dvc pull`")
    if sha256_of(path) != description.onnx.get("sha256"):
        raise UserError(f"{path} is not the file that model.json describes: run `dvc repro`")


def parent_of(folder: Path, description: Description) -> dict[str, Any]:
    """How a child names this artifact; `model.json` holds the hashes of all the rest."""
    return {"name": description.name, "sha256": sha256_of(folder / DESCRIPTION), "metrics": description.metrics}


def _stored_tensors(network: nn.Module, layers: dict[str, LayerStorage]) -> dict[str, torch.Tensor]:
    packed = packed_layers(network)
    prefixes = tuple(f"{name}." for name in packed)
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not (prefixes and name.startswith(prefixes))
    }
    for name, layer in packed.items():
        tensors = tensors_of(layer)
        if (bits := layers[name].weight_bits) < LARGEST:
            tensors["weight"] = torch.from_numpy(pack(tensors["weight"].cpu().numpy(), bits))
        state |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in tensors.items()}
    return dict(sorted(state.items()))


def _packed_layer(own: nn.Module | None, storage: LayerStorage, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The packed layer in the place of `own`, the float layer that the network is built with.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: if the tensors are not those of such a layer.
    """
    if type(own) not in KINDS:
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


def _save_tensors(state: dict[str, torch.Tensor], path: Path, folder: Path) -> None:
    try:
        save_file(state, path)
    except SafetensorError as error:  # also where there is no room, or no access
        raise UserError(f"cannot write {folder}: {error}: make room or give access to it, then run again") from None


def _compare(network: nn.Module, folder: Path, description: Description) -> None:
    loaded, _ = load_artifact(folder)
    size = description.input_size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mode, device = network.training, next((p.device for p in network.parameters()), torch.device("cpu"))
    network.eval().cpu()
    with torch.no_grad():
        same = torch.allclose(network(x), loaded(x), rtol=1e-4, atol=1e-5)
    network.train(mode).to(device)
    if not same:
        raise UserError(f"{description.name}: the saved network gives another output than the one in memory: not saved")


def _hash_and_size(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
