"""A search problem with a known answer: layers whose losses add up."""

import numpy as np

from stages.quantization.budget import Budget
from stages.quantization.layers import Layer
from stages.quantization.searches import Problem


def toy_problem(
    weights: list[int],
    harm: list[float],
    choices: tuple[int, ...] = (2, 4, 8),
    average: float = 4,
    evaluations: int = 200,
) -> Problem:
    """Layer l at b bits adds harm[l] * 4^-b to an objective of 1."""
    layers = [Layer(f"layer{i}", "linear", w, 10 * w, w, w, 1) for i, w in enumerate(weights)]
    errors = np.array([[h * 4.0**-b for b in choices] for h in harm])
    column = {layer.name: dict(zip(choices, row, strict=True)) for layer, row in zip(layers, errors, strict=True)}
    return Problem(
        layers=layers,
        budget=Budget(np.array(weights), np.array(choices), int(average * sum(weights))),
        errors=errors,
        statistics=np.tile([0.0, 3.0], (len(layers), 1)),
        evaluate=lambda bits: 1 + sum(column[name][b] for name, b in bits.items() if b is not None),
        unquantized=1.0,
        evaluations=evaluations,
        seed=0,
    )


def many_layers(seed: int, evaluations: int = 400) -> Problem:
    """Thirty layers of very different sizes and harms."""
    generator = np.random.default_rng(seed)
    weights, harm = generator.integers(10, 500, 30).tolist(), np.exp(generator.normal(1.5, 1.5, 30)).tolist()
    problem = toy_problem(weights, harm, (2, 3, 4, 5, 6, 7, 8), evaluations=evaluations)
    problem.seed = seed
    return problem
