"""Sessions for networks that are built by hand, and search problems whose losses add up."""

import numpy as np
from torch import nn

from stages.artifacts.description import Description
from stages.datasets.store import Part
from stages.networks.spec import NetworkSpec
from stages.params.base import Base
from stages.params.finetune import Finetune
from stages.params.section import Section
from stages.quantization.layers import Layer
from stages.quantization.searches import BitBudget, Problem
from stages.training.session import Session

SIZE = 8
RECIPE = Finetune(
    epochs=6, batch_size=32, optimizer="adamw", learning_rate=0.01, horizontal_flip=False, crop_padding=0,
    precision="float32",
)  # fmt: skip


def part_of(count: int, pixel: int = 0, label: int = 0) -> Part:
    return Part(np.full((count, SIZE, SIZE, 3), pixel, np.uint8), np.full(count, label, np.int64))


def session_of(
    network: nn.Module,
    quantizer: Section,
    parts: tuple[Part, Part] | None = None,
    spec: NetworkSpec | None = None,
    input_size: int = SIZE,
    finetune: Finetune = RECIPE,
) -> Session:
    """Pixels of 0 and 255 become -2 and 2.

    Args:
        parts: The training and the validation part.
        spec: The spec of the network, if it is saved.
    """
    parent = Description(
        name="toy",
        stage="prune",
        model="toy",
        network=spec,
        classes=["zero", "one"],
        image_size=SIZE,
        geometry="crop",
        input_size=input_size,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        data={"name": "none", "sha256": ""},
        parameters={},
        seed=0,
    )
    parts = parts or (part_of(4), part_of(4))
    return Session("quantize", "toy", network, parent, quantizer, "quantizers.toy", Base(threads=1), finetune, *parts)


def toy_problem(
    weights: list[int],
    harm: list[float],
    choices: tuple[int, ...] = (2, 4, 8),
    average: float = 4,
    evaluations: int = 200,
    seed: int = 0,
) -> Problem:
    """Layer l at b bits adds harm[l] * 4^-b to a loss of 1."""
    layers = [Layer(f"layer{i}", "linear", w, 10 * w, w, w, 1) for i, w in enumerate(weights)]
    errors = np.array([[h * 4.0**-b for b in choices] for h in harm])
    column = {layer.name: dict(zip(choices, row, strict=True)) for layer, row in zip(layers, errors, strict=True)}
    return Problem(
        layers=layers,
        budget=BitBudget(np.array(weights), np.array(choices), int(average * sum(weights))),
        errors=errors,
        statistics=np.tile([0.0, 3.0], (len(layers), 1)),
        evaluate=lambda bits: 1 + sum(column[name][b] for name, b in bits.items() if b is not None),
        unquantized=1.0,
        evaluations=evaluations,
        seed=seed,
    )


def many_layers(seed: int, evaluations: int = 400) -> Problem:
    """Thirty layers of very different sizes and harms."""
    generator = np.random.default_rng(seed)
    weights, harm = generator.integers(10, 500, 30).tolist(), np.exp(generator.normal(1.5, 1.5, 30)).tolist()
    return toy_problem(weights, harm, (2, 3, 4, 5, 6, 7, 8), evaluations=evaluations, seed=seed)
