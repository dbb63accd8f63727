"""The weights that a model starts from: of a library, the Hugging Face Hub, a file or an Edgewise artifact."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from torch import nn

from stages.artifacts.artifact import load_artifact
from stages.artifacts.description import DESCRIPTION, Description, read_description
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.networks.architectures import custom_module
from stages.networks.spec import NetworkSpec
from stages.networks.weights import find_weights, load_match, read_tensors
from stages.params.models import Model

HUB = "hf:"
BY_HAND = "without network access, download the file elsewhere and set weights to its path"
Statistics = tuple[list[float], list[float]]
"""Mean and standard deviation of each channel, for pixels in [0, 1]."""


@dataclass
class InitialWeights:
    """What was loaded into a network; `model.json` records it under `weights`."""

    source: str
    """`models.<model>.weights`, with the tag."""
    sha256: str
    """Of the file; empty if a library downloaded it."""
    loaded: int
    """Number of tensors that were loaded."""
    fresh: list[str] = field(default_factory=list)
    """Tensors of the head that start at zero because the source has other classes."""
    ignored: list[str] = field(default_factory=list)
    """Tensors of the source that the network does not have."""


def load_weights(network: nn.Module, spec: NetworkSpec, model: Model, classes: list[str]) -> tuple[InitialWeights, str]:
    """Load the weights that `model` names into the network, in place.

    Returns:
        The record for `model.json`, and a line for the user.

    Raises:
        UserError: if they cannot be downloaded or read, are not finite, or are of another network.
    """
    source = model.weights + (f" {model.weights_tag}" if model.weights_tag else "")
    sha256, head_fits, path = "", True, Path(model.weights)
    if model.weights == "pretrained":
        contents: Any = _downloaded(lambda: _library_network(model).state_dict(), f"weights of {spec.architecture}")
    elif model.weights.startswith(HUB):
        repository = model.weights.removeprefix(HUB)
        contents = _downloaded(lambda: load_state_dict_from_hf(repository, weights_only=True), source)
    elif path.is_dir():
        donor, description = _artifact(path)
        contents, sha256 = donor.state_dict(), description.tensors["sha256"]
        head_fits = description.classes == classes
    else:
        contents = read_tensors(path)
        sha256 = sha256_of(path)
    where = f"weights {source!r}"
    match = find_weights(network, contents, where, spec.classes, head_fits)
    load_match(network, match, where)
    return InitialWeights(source, sha256, len(match.tensors), match.fresh, match.ignored), f"{source}: {match}"


def statistics(model: Model, images: Statistics) -> Statistics:
    """The statistics by which the model's images are normalized, as `model.normalization` says.

    Args:
        images: the statistics of the training images.

    Raises:
        UserError: if the weights come without any, or the params give another number of channels than the images have.
    """
    choice, channels = model.normalization, len(images[0])
    if choice == "dataset" or (choice is None and model.weights == "none"):
        return images
    if choice == "imagenet":
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    elif isinstance(choice, list):
        mean, std = ([float(v)] * channels if isinstance(v, int | float) else list(v) for v in choice)
    else:
        mean, std = _statistics_of_weights(model)
    if channels == 1 and len(mean) == len(std) == 3:  # the filters for RGB images are summed for gray ones
        mean, std = [sum(mean) / 3], [sum(std) / 3]
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"normalization: {len(mean)} means and {len(std)} standard deviations for images with {channels} channels:"
            " give one number, or one for each channel"
        )
    if min(std) <= 0:
        raise UserError(f"normalization: a standard deviation of {min(std):g}: it must be above 0")
    return mean, std


def unknown_tag(model: Model) -> str | None:
    """A message with the known tags if the library has no weights of this tag for the architecture, else None."""
    if model.weights_tag is None:
        return None
    if model.library == "timm":
        known = [name.partition(".")[2] for name in timm.list_pretrained(f"{model.architecture}.*")]
    elif model.library == "torchvision":
        known = list(torchvision.models.get_model_weights(model.architecture).__members__)
    else:
        known = []
    return (
        None
        if model.weights_tag in known
        else f"{model.architecture} has {', '.join(known) or 'no pretrained weights'}"
    )


def _statistics_of_weights(model: Model) -> Statistics:
    unknown = UserError(
        f"normalization: {model.weights!r} does not say how its images were normalized: set normalization to dataset,"
        " imagenet or [mean, std]"
    )
    if Path(model.weights).is_dir():
        description = _artifact(Path(model.weights))[1]
        return description.mean, description.std
    if model.library == "custom":
        module = custom_module(model.architecture)
        config: Any = {"mean": getattr(module, "MEAN", None), "std": getattr(module, "STD", None)}
    elif model.weights.startswith(HUB):
        repository = model.weights.removeprefix(HUB)
        config = _downloaded(lambda: load_model_config_from_hf(repository)[0], f"config.json of {model.weights}")
    elif model.library == "timm":
        config = vars(timm.models.get_pretrained_cfg(_tagged(model)) or object)
    else:
        choices = torchvision.models.get_model_weights(model.architecture)
        transforms = (choices[model.weights_tag] if model.weights_tag else choices.DEFAULT).transforms()  # type: ignore
        config = vars(transforms)
    if not config.get("mean") or not config.get("std"):
        raise unknown
    return [float(v) for v in config["mean"]], [float(v) for v in config["std"]]


def _tagged(model: Model) -> str:
    """timm's name of an architecture with the tag of its weights: `convnext_tiny.in12k`."""
    return f"{model.architecture}.{model.weights_tag}" if model.weights_tag else model.architecture


def _library_network(model: Model) -> nn.Module:
    """The network with the classes of its pretrained weights; the hub's errors pass through."""
    if model.library == "timm":
        name, _, tag = _tagged(model).partition(".")
        arguments = model.arguments | {"pretrained": True}
        return timm.models.model_entrypoint(name)(pretrained_cfg=tag or None, **arguments)
    tag = model.weights_tag or "DEFAULT"
    return torchvision.models.get_model(model.architecture, weights=tag, **model.arguments)


def _downloaded(download: Any, what: str) -> Any:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns at each retry; one error is enough
    try:
        return download()
    except Exception as error:  # each hub client raises its own errors; for the user they all mean the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} could not be downloaded ({reason}): {BY_HAND}") from None


def _artifact(folder: Path) -> tuple[nn.Module, Description]:
    """The network of a dense float artifact.

    Raises:
        UserError: if the folder holds none.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"weights {str(folder)!r}: the folder holds no {DESCRIPTION}: name a dense artifact or a file")
    description = read_description(folder)
    if description.layers or description.network.widths:
        state = "quantized" if description.layers else "pruned"
        raise UserError(f"weights {str(folder)!r}: a {state} artifact; training starts from a dense one")
    return load_artifact(folder)
