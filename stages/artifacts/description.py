"""`model.json`, the description of a model artifact; reading it does not import torch."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import read_json, sha256_of
from stages.networks.spec import NetworkSpec
from stages.params.section import Geometry

if TYPE_CHECKING:
    from stages.networks.preprocess import Preprocess

VERSION = 5
TENSORS, DESCRIPTION, ONNX = "model.safetensors", "model.json", "model.onnx"
FLOAT_BITS = 32  # of weights and activations that are not quantized
AGAIN = "make it again with `dvc repro`"
SECTIONS: dict[str, dict[str, type]] = {
    "data": {"name": str, "sha256": str},
    "parent": {"name": str, "sha256": str, "metrics": dict},
    "tensors": {"sha256": str, "bytes": int},
    "onnx": {"sha256": str, "bytes": int, "quantized_operators": int},
}
"""Keys that the free-form sections of `model.json` must hold. `parent` and `onnx` may be empty."""


@dataclass
class LayerStorage:
    """How one layer's weight is stored and computed; layers that are not listed are float32."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    weight_bits: int
    activation_bits: int
    scheme: str  # `symmetric_per_channel` or `symmetric_per_tensor`
    activations: Literal["float", "dynamic", "static"] = "dynamic"
    """Left in float, quantized with scales that every call finds, or with scales found once on calibration images."""


@dataclass
class Description:
    """The contents of `model.json`: what the tensors are, where they come from and what made them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    stage: str
    model: str  # entry of `models` that the artifact descends from
    network: NetworkSpec
    classes: list[str]
    image_size: int  # side of the stored images, which `model.onnx` takes, in pixels
    geometry: Geometry  # how pictures of other proportions become the stored squares
    input_size: int  # side of the network's input, after scaling, in pixels
    mean: list[float]
    std: list[float]
    data: dict[str, str]  # `name` and `sha256` of the images that the artifact was made from
    parameters: dict[str, Any]  # parameters of the stage
    seed: int
    levels: list[float] | None = None
    """Gray values of more than 8 bits that became 0 and 255, as `data.levels`."""
    weights: dict[str, Any] = field(default_factory=dict)
    """The weights that the model started from, as `InitialWeights`; empty if it started from random ones."""
    parent: dict[str, Any] | None = None
    """`name`, `sha256` and `metrics` of the artifact that this one was made from; None for a dense network."""
    layers: dict[str, LayerStorage] = field(default_factory=dict)
    float_layers: list[str] = field(default_factory=list)  # layers with weights that the quantizer left in float
    search: dict[str, Any] = field(default_factory=dict)
    """A bit search's record: the loss of each allocation that it tried, the budget, each layer's sensitivity."""
    metrics: dict[str, int | float] = field(default_factory=dict)  # figures on validation images, never on test images
    never_right: list[str] = field(default_factory=list)
    """Classes with validation images of which the model classifies none correctly."""
    onnx: dict[str, Any] = field(default_factory=dict)
    """`sha256` and `bytes` of `model.onnx`, and what `export_onnx` returns; empty without the file."""
    versions: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)  # `sha256` and `bytes` of `model.safetensors`
    version: int = VERSION

    def preprocess(self) -> "Preprocess":
        from stages.networks.preprocess import Preprocess  # imports torch

        return Preprocess(self.mean, self.std, self.input_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the stored images."""
        return self.image_size, self.image_size, self.network.channels

    def metadata(self) -> dict[str, str]:
        """What a program must know to use `model.onnx`; it stands in the file's metadata."""
        return {
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "image_size": str(self.image_size),
            "geometry": self.geometry,
            "levels": json.dumps(self.levels),
            "channels": "gray" if self.network.channels == 1 else "RGB",
        }

    @property
    def fresh(self) -> list[str] | None:
        """Names of the tensors that did not come from initial weights; None if no weights were loaded."""
        return self.weights.get("fresh") if self.weights else None

    def spans_batch(self) -> bool:
        """True if every call finds scales over its whole batch: then only batches of one image match a device."""
        return any(layer.activations == "dynamic" for layer in self.layers.values())

    def require_metrics(self, folder: Path, *names: str) -> None:
        """Raise a `UserError` if the artifact in `folder` lacks one of these metrics."""
        if missing := [name for name in names if name not in self.metrics]:
            raise UserError(f"{folder / DESCRIPTION}: metrics.{missing[0]} is missing: {AGAIN}")

    def require_images(self, folder: Path, sha256: str) -> None:
        """Raise a `UserError` if the artifact in `folder` was made from other images than the present ones."""
        if self.data["sha256"] != sha256:
            raise UserError(
                f"{folder} was made from other images ({self.data['name']}) than {paths.IMAGES} holds: run `dvc repro`"
            )


def read_description(folder: Path) -> Description:
    """Read `model.json`; a `UserError` if it is missing, of another version, or holds a wrong key or value."""
    path = folder / DESCRIPTION
    raw = read_json(path)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: artifact version {version!r}, this program reads {VERSION}: {AGAIN}")
    if missing := sorted({f.name for f in fields(Description)} - raw.keys()):
        raise UserError(f"{path}: keys missing: {', '.join(missing)}: {AGAIN}")
    try:
        description = TypeAdapter(Description).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        given = "" if isinstance(detail["input"], dict | list) else f" = {detail['input']!r}"
        raise UserError(f"{path}: {where}{given}: {detail['msg']}: {AGAIN}") from None
    for section, keys in SECTIONS.items():
        given = raw[section]
        for key, kind in keys.items() if given or section not in ("parent", "onnx") else ():
            if not isinstance(given.get(key), kind):
                raise UserError(f"{path}: {section}.{key} is missing or not of type {kind.__name__}: {AGAIN}")
    return description


def check_onnx(folder: Path, description: Description) -> None:
    """Raise a `UserError` if `model.onnx` is missing or not the file that `model.json` describes."""
    path = folder / ONNX
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro` or `dvc pull`")
    if sha256_of(path) != description.onnx.get("sha256"):
        raise UserError(f"{path} is not the file that model.json describes: run `dvc repro`")


def parent_of(folder: Path, description: Description) -> dict[str, Any]:
    """The section `parent` of an artifact made from this one; `model.json` holds the hashes of all other files."""
    return {"name": description.name, "sha256": sha256_of(folder / DESCRIPTION), "metrics": description.metrics}
