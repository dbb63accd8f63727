"""The section `models`: the networks that are fine-tuned."""

from typing import Any, Literal

from stages.params.section import Pixels, Section, Seed


class Model(Section):
    library: Literal["timm", "torchvision"]
    """Library that defines the architecture."""
    architecture: str
    """Name of a classifier, as `timm.list_models()` or `torchvision.models.list_models()` gives it."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the constructor; the number of classes comes from the data."""
    input_size: Pixels
    """Side of the network's input; stored images are scaled to it, inside `model.onnx` too. Unit: pixels."""
    weights: str = "none"
    """Initial weights: `none` (random), `pretrained` (downloaded by the library) or the path of a weights
    file, relative to `params.yaml`. DVC does not watch that file."""
    seed: Seed | None = None
    """Seed that replaces `base.seed`. The same settings under another seed are another entry of `models`."""

    def seed_or(self, base_seed: int) -> int:
        """The model's own seed, or `base.seed` without one."""
        return base_seed if self.seed is None else self.seed
