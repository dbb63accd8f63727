"""The section `quantizers`: how weights and activations are stored and computed."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.budget import Budget
from stages.params.section import Count, Excluding, Positive, Section, Seed


class Fp32(Section):
    """Float32: no quantization."""

    method: Literal["fp32"]


class Int8Dynamic(Excluding):
    """PyTorch's dynamic quantization of Linear layers; 1x1 convolutions are treated as Linear layers."""

    method: Literal["int8_dynamic"]
    per_channel: bool = True
    """Use one scale for each output channel instead of one for each layer."""


class Calibrated(Excluding):
    """Quantizers that look at images, which come from the training part."""

    calibration_images: Count = 256
    """Training images that calibration, searches and GPTQ read. Unit: images."""
    calibration_seed: Seed = 0
    """Seed that selects the calibration images."""


class Int8Static(Calibrated):
    """Int8 weights and activations, with activation scales that are fixed by calibration."""

    method: Literal["int8_static"]
    weight_bits: Literal[7, 8] = 8
    """7 avoids overflow on x86 processors without VNNI, which add pairs of 8-bit products in 16 bits. Unit: bits."""
    calibration: Literal["minmax", "percentile", "entropy"] = "percentile"
    """How an activation's range follows from its values on the calibration images."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Part of an activation's values that lies within its range. Unit: per cent. Only with
    `calibration: percentile`."""


class Bits(Calibrated, Budget):
    """Quantizers to few bits: weights become integers, activations stay in float."""

    rounding: Literal["nearest", "gptq"] = "nearest"
    """`gptq` rounds column by column and compensates each error in the next columns (arXiv 2210.17323)."""
    epochs: Annotated[int, Field(ge=0)] = 0
    """Length of quantization-aware recovery with straight-through gradients and learned scales (LSQ, arXiv
    1902.08153); 0 only rounds. Unit: epochs."""
    learning_rate_factor: Positive = 0.1
    """Factor on `finetune`'s learning rates at the peak of the schedule. Only with `epochs` above 0."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the distillation loss, with the float parent as the teacher. Only with `epochs` above 0."""


class UniformBits(Bits):
    """The same number of bits in every layer."""

    method: Literal["uniform_bits"]
    bits: Annotated[int, Field(ge=2, le=8)]
    """Bits of every weight. Unit: bits."""


class AllocatedBits(Bits):
    """Another number of bits in each layer, within a budget."""

    average_bits: Annotated[float, Field(ge=2, le=8)]
    """Budget: bits of all quantized weights over their number. Every allocation that a search tries keeps it. Unit:
    bits."""
    choices: Annotated[list[Annotated[int, Field(ge=2, le=8)]], Field(min_length=2)] = [2, 3, 4, 5, 6, 7, 8]
    """Bit widths that a layer may have. Unit: bits."""
    evaluations: Count = 256
    """How often a search may evaluate the network on the calibration images, measured sensitivities included."""


class SearchedBits(AllocatedBits):
    """The bits of each layer by a search without learning."""

    method: Literal["searched_bits"]
    search: Literal["random", "greedy", "ilp"]
    """`random` draws allocations around the budget. `greedy` and `ilp` (integer linear program) work on measured
    sensitivities."""


class LearnedBits(AllocatedBits):
    """The bits of each layer by a controller that policy gradient (REINFORCE) trains."""

    method: Literal["learned_bits"]
    samples: Annotated[int, Field(ge=2)] = 8
    """Allocations between two steps of the controller."""
    learning_rate: Annotated[float, Field(ge=0)] = 0.02
    """Learning rate of the controller; 0 keeps the initial policy, which shows what learning adds."""
    hidden_units: Annotated[int, Field(ge=1, le=4096)] = 32
    """Width of the controller's LSTM."""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.02
    """Initial weight of the entropy bonus, which falls to 0 over the search."""


Quantizer = Annotated[
    Fp32 | Int8Dynamic | Int8Static | UniformBits | SearchedBits | LearnedBits, Field(discriminator="method")
]
