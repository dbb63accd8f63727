"""The base class of every section of `params.yaml`, and the types that its fields share.

A field's docstring is its documentation: `python -m stages.params.document` writes `docs/parameters.md` from it. A
docstring may name its unit after "Unit:", and the setting that the field needs after "Only with" (the field is
refused without it) or "Applies with".
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, le=10)]
Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=8, le=1024)]
Geometry = Literal["crop", "letterbox", "stretch"]  # see `data.geometry`
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range that every random generator accepts
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]  # names become folders and DVC keys: no dots


class Section(BaseModel):
    """A mapping with known keys and strict types. Rules that join several keys are in `stages.params.rules`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Excluding(Section):
    """A method that can leave layers of the network as they are."""

    exclude: list[str] = []
    """Modules that stay as they are, by name or by a pattern such as `stages.0.*`, as PyTorch's `named_modules` names
    them; a name covers all modules inside it. A quantizer leaves them in float. A structured pruner removes none of
    their output channels, nor channels that these are added to; their inputs still follow the cuts of other layers, as
    with Torch-Pruning's `ignored_layers`."""
