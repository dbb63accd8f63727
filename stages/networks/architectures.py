"""The classifiers of timm and torchvision by name: which there are, and how one is constructed."""

import difflib
import warnings
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError

if TYPE_CHECKING:
    from torch import nn

SHARES = ("drop_rate", "drop_path_rate", "stochastic_depth_prob", "dropout")
"""Arguments that constructors take as they come, and training stumbles over."""


def unknown(library: str, architecture: str) -> str | None:
    """What is wrong with an architecture that its library does not have, with the nearest names; None if it has it."""
    known = _names(library)
    if architecture in known:
        return None
    near = difflib.get_close_matches(architecture, known, n=5, cutoff=0.5)
    return f"{library} has no such classifier" + (
        f"; nearest: {', '.join(near)}" if near else f"; `{library}.list_models()` names all"
    )


def _names(library: str) -> list[str]:
    if library == "timm":
        import timm

        return timm.list_models() + timm.list_pretrained()  # with and without the tag of their weights
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def construct(library: str, architecture: str, arguments: dict[str, Any], classes: int) -> "nn.Module":
    """A freshly initialised network with `classes` logits, in training mode.

    Raises:
        UserError: if the library has no such classifier, or it refuses the arguments.
    """
    if "num_classes" in arguments:
        raise UserError(f"{library} {architecture}: num_classes is as many classes as the images have: leave it out")
    for name in SHARES:
        share = arguments.get(name) or 0
        if not (isinstance(share, int | float) and 0 <= share < 1):
            raise UserError(f"{library} {architecture}: {name} = {share!r}: must be at least 0 and less than 1")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how torchvision will initialise some day, and the like
            return _constructed(library, architecture, arguments, classes)
    except Exception as error:  # whatever a constructor stumbles over
        if problem := unknown(library, architecture):
            raise UserError(f"{architecture!r}: {problem}") from None
        reason = f"{type(error).__name__}: {error}" if isinstance(error, LookupError) else error or type(error).__name__
        raise UserError(f"{library} {architecture} does not take arguments {arguments}: {reason}") from None


def _constructed(library: str, architecture: str, arguments: dict[str, Any], classes: int) -> "nn.Module":
    if library == "timm":
        return timm_model(architecture, num_classes=classes, **arguments)
    if architecture.startswith("convnext") and "block_setting" in arguments:
        return _torchvision_convnext(arguments, classes)
    import torchvision

    return torchvision.models.get_model(architecture, num_classes=classes, **arguments)


def refused(
    library: str, architecture: str, arguments: dict[str, Any], sizes: dict[str, int]
) -> tuple[str, str] | None:
    """Why the classifier cannot be constructed, or gives no logits for RGB images of all sizes that it will see.

    Nothing is allocated unless something is wrong.

    Args:
        sizes: the images' side in pixels, by the key of the params that says so.

    Returns:
        Where in the model's params the reason lies ("": in more than one key), and the reason; or None.
    """
    import torch

    given = f"{library} {architecture}{f' with arguments {arguments}' if arguments else ''}"
    key, size = next(iter(sizes.items()))
    for device in ("meta", "cpu"):  # the meta device lacks some operators, and some constructors compute
        try:
            with torch.device(device), torch.no_grad():
                network = construct(library, architecture, arguments, classes=2).eval()
                for key, size in sizes.items():  # noqa: B007, the last one is told below
                    output = network(torch.zeros(1, 3, size, size))
        except UserError as error:
            found = ".arguments", str(error)
        except Exception as error:  # whatever a layer stumbles over
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            remedy = f"change {key}, or the arguments (some networks have `img_size`)"
            found = "", f"{given} takes no RGB images of {size} pixels ({reason}): {remedy}"
        else:
            problem = more_than_logits(network, output)
            return ("", f"{given} {problem}") if problem else None
    return found


def more_than_logits(network: "nn.Module", output: object) -> str | None:
    """What is wrong with a network whose output is not `[N, classes]` alone; None where it is."""
    if getattr(network, "aux_logits", False):
        return "has auxiliary outputs, which cannot be trained: set arguments: {aux_logits: false, init_weights: false}"
    if getattr(output, "ndim", None) != 2:
        return "gives something other than logits [N, classes]: it cannot be trained as a classifier"
    return None


def timm_model(architecture: str, **arguments: Any) -> "nn.Module":
    """As `timm.create_model`, which drops arguments that are None: `ls_init_value: null` is a choice."""
    import timm

    name, _, tag = architecture.partition(".")  # `convnext_tiny.in12k`: the tag says which pretrained weights
    return timm.models.model_entrypoint(name)(pretrained_cfg=tag or None, **arguments)


def _torchvision_convnext(arguments: dict[str, Any], classes: int) -> "nn.Module":
    """Of any size: torchvision's own entry points fix `block_setting`, here `[input channels, output, blocks]` each."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    setting = [CNBlockConfig(*stage) for stage in arguments["block_setting"]]
    rest = {name: value for name, value in arguments.items() if name != "block_setting"}
    return ConvNeXt(setting, num_classes=classes, **rest)
