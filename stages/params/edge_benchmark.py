"""The section `edge_benchmark`: the timing protocol, the device and its runtimes."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stages.params.section import Count, Name, Positive, Section, Seed

SSH_TARGET = re.compile(r"ssh://(?:(?P<user>[^\s@/:-][^\s@/:]*)@)?(?P<host>[^\s@/:-][^\s@/:]*)(?::(?P<port>\d+))?/?")


class Soak(Section):
    """A long run of one variant that shows whether its latency drifts."""

    FEWEST_WINDOWS: ClassVar[int] = 4

    variant: Name
    """Entry of `variants`."""
    minutes: Annotated[float, Field(gt=0, le=10080)]
    """Duration. Unit: minutes."""
    images_per_second: Annotated[float, Field(ge=0)] = 0.0
    """Rate of a camera; 0 runs one inference after the other. Unit: images per second."""
    window_seconds: Positive = 5.0
    """Duration of a window. Unit: seconds."""


class Printed(Section):
    """One variant on test images that are printed and filmed in simulation."""

    variant: Name
    """Entry of `variants`."""
    images: Count | None = None
    """Number of test images; null takes 1,000, or all if there are fewer. Unit: images."""
    seed: Seed = 0
    """Seed of the simulation and of the choice of images."""


class EdgeBenchmark(Section):
    target: str = "local"
    """`local`, or a device that is reached by SSH: `ssh://user@host[:port]`."""
    runtimes: Annotated[
        list[Literal["onnxruntime", "openvino", "torch-eager", "torch-compile"]],
        Field(min_length=1),
    ] = ["onnxruntime"]
    """Runtimes in which every variant is timed. `onnxruntime` is required; `openvino` needs `uv sync --extra openvino`.
    The PyTorch runtimes time only dense float networks; `torch-eager` always does, as the baseline."""
    threads: Count = 1
    """Threads of each runtime. Unit: threads."""
    affinity: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Cores that may be used; null leaves the choice to the operating system."""
    batch: Count = 1
    """Images in each call. Unit: images."""
    warmup_runs: Count = 20
    """Calls of each variant before timing; they are not recorded."""
    windows: Annotated[int, Field(ge=2)] = 10
    """Rounds of the timing. In each round every variant gets one window, in random order."""
    window_seconds: Positive = 0.3
    """Shortest duration of a window. Unit: seconds."""
    minimum_runs: Count = 5
    """Recorded calls in each window at least, however long they take."""
    seed: Seed = 0
    """Seed of the order of variants, the input pixels and the bootstrap."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence level of the intervals of speed-ups, drift and printed samples."""
    soak: Soak | None = None
    """A long run of one variant; null skips it."""
    printed: Printed | None = None
    """Accuracy of one variant on images that are printed and filmed in simulation; null skips it."""
