"""Classifiers of timm, torchvision and the user: find one by name, construct it, check that it can be trained."""

import difflib
import importlib.util
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError
from stages.common.files import sha256_of

if TYPE_CHECKING:
    from torch import nn

FRACTIONS = ("drop_rate", "drop_path_rate", "stochastic_depth_prob", "dropout")
"""Constructor arguments that must be in [0, 1); the constructors do not check them, and training fails later."""
CLASSES = 7
"""Number of classes with which `refused` builds a network; no data set's own, so that a fixed head is noticed."""
CUSTOM = Path(__file__).parent / "custom"
"""Folder of the users' own networks, which every stage that builds a network depends on."""


def unknown(library: str, architecture: str) -> str | None:
    """A message with the nearest names if the library has no such classifier, else None."""
    if library == "custom":
        known = sorted(path.name for path in CUSTOM.glob("*.py") if path.name != "__init__.py")
        return None if architecture in known else f"stages/networks/custom holds {', '.join(known) or 'no file'}"
    if library == "timm":
        import timm

        known = timm.list_models() + timm.list_pretrained()  # without and with the tag of pretrained weights
    else:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
    if architecture in known:
        return None
    near = ", ".join(difflib.get_close_matches(architecture, known, n=5, cutoff=0.5))
    hint = f"nearest: {near}" if near else f"`{library}.list_models()` lists all"
    return f"{library} has no such classifier; {hint}"


def construct(
    library: str, architecture: str, arguments: dict[str, Any], classes: int, channels: int = 3
) -> "nn.Module":
    """A freshly initialized network with `classes` logits for images of `channels` channels, in training mode.

    Raises:
        UserError: if the library has no such classifier, or it refuses the arguments.
    """
    where = f"{library} {architecture}"
    if "num_classes" in arguments:
        raise UserError(f"{where}: num_classes is set from the images' classes: remove it from the arguments")
    if "in_chans" in arguments:
        remedy = "set data.channels and remove in_chans from the arguments"
        raise UserError(f"{where}: in_chans = {arguments['in_chans']}: is set from the images' channels: {remedy}")
    for name in FRACTIONS:
        fraction = arguments.get(name) or 0
        if not (isinstance(fraction, int | float) and 0 <= fraction < 1):
            raise UserError(f"{where}: {name} = {fraction!r}: must be at least 0 and less than 1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision announces future changes of its initialization
            if library == "timm":
                stem = {} if channels == 3 else {"in_chans": channels}  # a few networks have no such argument
                return _timm_model(architecture, num_classes=classes, **stem, **arguments)
            if library == "custom":
                return _custom_model(architecture, arguments, classes, channels)
            network = _torchvision_model(architecture, arguments, classes)
            return network if channels == 3 else _for_gray_images(network)
    except UserError:
        raise
    except Exception as error:  # constructors raise any class for arguments that they do not take
        if problem := unknown(library, architecture):
            raise UserError(f"{architecture!r}: {problem}") from None
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error or type(error).__name__
        raise UserError(f"{where} does not take arguments {arguments}: {reason}") from None


def _timm_model(architecture: str, **arguments: Any) -> "nn.Module":
    """`timm.create_model` without its filter of arguments that are None: `ls_init_value: null` is a choice."""
    import timm

    name, _, tag = architecture.partition(".")  # `convnext_tiny.in12k`: the tag names the pretrained weights
    return timm.models.model_entrypoint(name)(pretrained_cfg=tag or None, **arguments)


def _torchvision_model(architecture: str, arguments: dict[str, Any], classes: int) -> "nn.Module":
    """A ConvNeXt may set `block_setting`, a list of `[input channels, output channels, blocks]`, to have any size."""
    import torchvision

    if architecture.startswith("convnext") and "block_setting" in arguments:  # torchvision's entry points fix it
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        setting = [CNBlockConfig(*stage) for stage in arguments["block_setting"]]
        return ConvNeXt(**arguments | {"block_setting": setting}, num_classes=classes)
    return torchvision.models.get_model(architecture, num_classes=classes, **arguments)


def _for_gray_images(network: "nn.Module") -> "nn.Module":
    """A network of torchvision, which has no argument for it, with a first convolution for one channel.

    Its filters are the sums over the colors, as timm does it: a gray image gives the output that it gives as RGB.
    """
    from timm.models import adapt_input_conv
    from torch import nn

    stem = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    stem.weight, stem.in_channels = nn.Parameter(adapt_input_conv(1, stem.weight.detach())), 1
    return network


def custom_hash(architecture: str) -> str:
    """sha256 of the user's file; empty if there is none."""
    path = CUSTOM / architecture
    return sha256_of(path) if path.is_file() else ""


def custom_module(architecture: str) -> ModuleType:
    """The user's file, imported.

    Raises:
        UserError: if there is no such file, it cannot be imported, or it has no function `build`.
    """
    path = CUSTOM / architecture
    where = f"stages/networks/custom/{architecture}"
    if problem := unknown("custom", architecture):
        raise UserError(f"{where}: no such file; {problem}")
    name = f"stages.networks.custom.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # it is only for a suffix that Python does not know
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as `import` does: its classes then know their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file's own, of any kind
        del sys.modules[name]
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else inside[-1]
        raise UserError(f"{where} cannot be imported: {type(error).__name__} in line {line}: {error}") from None
    if not callable(getattr(module, "build", None)):
        raise UserError(f"{where} has no function build(classes, channels, **arguments)")
    return module


def _custom_model(architecture: str, arguments: dict[str, Any], classes: int, channels: int) -> "nn.Module":
    from torch import nn

    network = custom_module(architecture).build(classes, channels, **arguments)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"stages/networks/custom/{architecture}: build returns a {type(network).__name__}, no nn.Module"
        )
    return network


def refused(
    library: str, architecture: str, arguments: dict[str, Any], sizes: dict[str, int], channels: int = 3
) -> tuple[str, str] | None:
    """Check that a classifier can be constructed and gives logits for images of every size that it will see.

    The check runs on the meta device, which allocates nothing; only a failure is repeated on the CPU.

    Args:
        sizes: sides of the images in pixels, by the params key that sets each.

    Returns:
        None if it can. Otherwise the place in the model's params (empty if several keys are involved) and the reason.
    """
    import torch

    given = f"{library} {architecture}{f' with arguments {arguments}' if arguments else ''}"
    key, size = next(iter(sizes.items()))
    for device in ("meta", "cpu"):  # the meta device lacks some operators, and some constructors compute
        try:
            with torch.device(device), torch.no_grad():
                network = construct(library, architecture, arguments, CLASSES, channels).eval()
                for key, size in sizes.items():  # noqa: B007, the message names the last one
                    output = network(torch.zeros(1, channels, size, size))
        except UserError as error:
            found = ".arguments", str(error)
        except Exception as error:  # layers raise any class for an input that does not fit
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            remedy = f"change {key}, or the arguments (some networks have `img_size`)"
            found = (
                "",
                f"{given} takes no {'gray' if channels == 1 else 'RGB'} images of {size} pixels ({reason}): {remedy}",
            )
        else:
            if (problem := more_than_logits(network, output)) is None and output.shape[1] != CLASSES:
                problem = f"gives {output.shape[1]} logits for {CLASSES} classes: build must use `classes`"
            return ("", f"{given} {problem}") if problem else None
    return found


def more_than_logits(network: "nn.Module", output: object) -> str | None:
    """A message if the network's output is not logits `[N, classes]` alone, else None."""
    if getattr(network, "aux_logits", False):
        return "has auxiliary outputs, which cannot be trained: set arguments: {aux_logits: false, init_weights: false}"
    if getattr(output, "ndim", None) != 2:
        return "does not return logits [N, classes]: it cannot be trained as a classifier"
    return None
