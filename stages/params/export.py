"""The section `export`: how `model.onnx` is written."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.section import Section


class Export(Section):
    opset: Annotated[int, Field(ge=21, le=23)] = 21
    """ONNX operator set. 21 is the first with 4-bit integers; older runtimes open no later one."""
    batch: Literal["dynamic", 1] = "dynamic"
    """First axis of the input: any number of images, or one image at a time, which some runtimes need."""
