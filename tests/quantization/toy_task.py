"""The quantization of a network that was built by hand, without a project's folder."""

import numpy as np
from torch import nn

from stages.artifacts.description import Description
from stages.datasets.store import Part
from stages.networks.build import NetworkSpec
from stages.params.quantizers import Quantizer
from stages.params.variants import Variant
from stages.params.whole import Params
from stages.quantization.methods import Task

SIZE = 8


def part_of(count: int, pixel: int = 0, label: int = 0) -> Part:
    return Part(np.full((count, SIZE, SIZE, 3), pixel, np.uint8), np.full(count, label, np.int64))


def task_of(
    network: nn.Module,
    quantizer: Quantizer,
    parts: tuple[Part, Part] | None = None,
    spec: NetworkSpec | None = None,
    input_size: int = SIZE,
) -> Task:
    """Pixels of 0 and 255 become -2 and 2.

    Args:
        parts: to train on and to validate on.
        spec: of the network, where it is to be saved.
    """
    params = Params.model_construct(
        quantizers={"toy": quantizer}, variants={"toy": Variant(pruned="toy", quantizer="toy")}
    )
    parent = Description(
        name="toy",
        stage="prune",
        model="toy",
        network=spec,
        classes=["zero", "one"],
        image_size=SIZE,
        input_size=input_size,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        data={"name": "none", "sha256": ""},
        parameters={},
        seed=0,
    )
    return Task(params, "toy", network, parent, *(parts or (part_of(4), part_of(4))))
