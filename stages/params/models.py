"""The section `models`: the networks that are fine-tuned."""

from typing import Annotated, Any, Literal

from pydantic import Field

from stages.params.section import Pixels, Section, Seed

Channels = float | Annotated[list[float], Field(min_length=1, max_length=3)]


class Model(Section):
    library: Literal["timm", "torchvision", "custom"]
    """Library that defines the architecture; `custom` is a Python file of your own."""
    architecture: str
    """Name of a classifier, as `timm.list_models()` or `torchvision.models.list_models()` gives it. For `custom`, the
    name of a file in `stages/networks/custom/` with a function `build(classes, channels, **arguments)` that returns a
    `torch.nn.Module`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the constructor; the number of classes comes from the data."""
    input_size: Pixels
    """Side of the network's input; stored images are scaled to it, inside `model.onnx` too. Unit: pixels."""
    weights: str = "none"
    """Initial weights: `none` (random); `pretrained` (downloaded by the library); `hf:<owner>/<repository>` (downloaded
    from the Hugging Face Hub); the path of a weights file (`.safetensors`, `.pth`, `.ckpt`) or of the folder of a dense
    Edgewise artifact, relative to `params.yaml`. DVC does not watch that path. A head of another number of classes is
    replaced by one that starts at zero."""
    weights_tag: str | None = None
    """Which of several pretrained weights: the tag of timm (`in12k_ft_in1k`) or the name of torchvision
    (`IMAGENET1K_V1`); null is the library's default. Only with `weights: pretrained`."""
    normalization: (
        Literal["weights", "dataset", "imagenet"] | Annotated[list[Channels], Field(min_length=2, max_length=2)] | None
    ) = None
    """Mean and standard deviation that normalize the images: `weights` (those that the weights were trained with, as
    the library, the artifact or the custom file gives them), `dataset` (those of the training images), `imagenet`, or
    `[mean, std]` for pixels in [0, 1], each one number or one for each channel. null is `weights` for a model with
    weights and `dataset` for one without."""
    epochs: Annotated[int, Field(ge=0)] | None = None
    """Replaces `finetune.epochs` for this model. 0 takes the weights as they are. Unit: epochs."""
    seed: Seed | None = None
    """Seed that replaces `base.seed`. The same settings under another seed are another entry of `models`."""

    def seed_or(self, base_seed: int) -> int:
        """The model's own seed, or `base.seed` without one."""
        return base_seed if self.seed is None else self.seed
