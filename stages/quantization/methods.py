"""The quantizers' course, each from a float network to what is stored; their steps are in the modules beside."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.artifacts.description import FLOAT_BITS, Description, LayerStorage
from stages.common.progress import count_progress
from stages.datasets.store import Part
from stages.networks.modules import replace_module
from stages.networks.preprocess import Classifier
from stages.params.quantizers import (
    AllocatedBits,
    Bits,
    Fp32,
    Int8Dynamic,
    Int8Static,
    LearnedBits,
    Quantizer,
    UniformBits,
)
from stages.params.whole import Params
from stages.quantization.budget import Budget
from stages.quantization.calibration import calibration_images, hessians
from stages.quantization.controller import learn_bits
from stages.quantization.dynamic import int8_dynamic
from stages.quantization.evaluation import Evaluator
from stages.quantization.layers import Layer, integer_candidates, layers_with_weights, refuse_shared_weights
from stages.quantization.recovery import recover
from stages.quantization.rounding import Rounded, inverse_factor, round_gptq, round_nearest
from stages.quantization.searches import (
    Problem,
    Sensitivities,
    search_at_random,
    search_by_ilp,
    search_greedily,
)
from stages.quantization.static import int8_static
from stages.training.distributed import broadcast


@dataclass
class Task:
    """One quantization of one float network."""

    params: Params
    variant: str
    network: nn.Module
    """As the parent artifact has it; left as it is."""
    parent: Description
    train_part: Part
    validation_part: Part
    checkpoints: Path | None = None

    @property
    def quantizer(self) -> Quantizer:
        return self.params.quantizers[self.params.variants[self.variant].quantizer]

    @property
    def param(self) -> str:
        """The quantizer's place in params.yaml, for messages."""
        return f"quantizers.{self.params.variants[self.variant].quantizer}"

    @property
    def classifier(self) -> Classifier:
        return Classifier(self.parent.preprocess(), self.network).eval()

    @cached_property
    def calibration(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return calibration_images(self.train_part, self.quantizer, self.param)

    def identity(self) -> dict[str, Any]:
        """All that determines the result."""
        return {
            "parent": self.parent.tensors,
            "data": self.parent.data,
            "quantizer": self.quantizer.model_dump(),
            "finetune": self.params.finetune.model_dump(),
            "base": self.params.base.model_dump(),
            "seed": self.parent.seed,
        }


@dataclass
class Quantized:
    """What a quantizer leaves."""

    network: nn.Module
    layers: dict[str, LayerStorage] = field(default_factory=dict)
    pointwise_as_linear: bool = False
    pixel_stem: dict[str, int] = field(default_factory=dict)
    """As `NetworkSpec` has it: where it is not empty, the network takes stored pixels as they are."""
    float_layers: list[str] = field(default_factory=list)
    """Layers with weights that have no integer form, are better off without, or never run."""
    search: dict[str, Any] = field(default_factory=dict)
    """Of a search for bits: what it was given, what it tried and what it found."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Of the recovery training."""


def quantize(task: Task) -> Quantized:
    """Quantize the task's network as its quantizer says.

    Raises:
        UserError: if the network cannot be quantized so, or a setting does not fit it.
    """
    match task.quantizer:
        case Fp32():
            return Quantized(task.network)
        case Int8Dynamic(per_channel=per_channel):
            refuse_shared_weights(task.network)
            network, layers = int8_dynamic(task.network, per_channel)
            return Quantized(network, layers, pointwise_as_linear=True, float_layers=layers_with_weights(network))
        case Int8Static() as quantizer:
            classifier, layers, kept, stem = int8_static(task.classifier, quantizer, task.calibration[0])
            return Quantized(classifier.network, layers, pointwise_as_linear=True, float_layers=kept, pixel_stem=stem)
        case Bits():
            return quantize_to_bits(task)


def quantize_to_bits(task: Task) -> Quantized:
    """Choose each layer's bits, round its weight, and train on with rounded weights where epochs are given."""
    quantizer, network = task.quantizer, task.network
    layers, kept = integer_candidates(network, task.parent.input_size)
    if kept:
        print(f"{task.variant}: in float, since they have no integer form or are never run: {', '.join(kept)}")
    search: dict[str, Any] = {}
    if isinstance(quantizer, UniformBits):
        rounded = {name: by_bits[quantizer.bits] for name, by_bits in round_all(task, layers, [quantizer.bits]).items()}
    else:
        by_bits = round_all(task, layers, quantizer.choices)
        bits, search = broadcast(lambda: allocate(task, layers, by_bits))
        rounded = {name: by_bits[name][bits[name]] for name in bits}
    curve: list[dict[str, float]] = []
    if quantizer.epochs:
        parts = task.train_part, task.validation_part
        network, rounded, trained = recover(
            network,
            rounded,
            quantizer,
            task.params,
            parts,
            task.parent.preprocess(),
            seed=task.parent.seed,
            title=f"quantize {task.variant}",
            rate_key=f"{task.param}.learning_rate_factor",
            checkpoints=task.checkpoints,
        )
        curve = trained.curve
    network = copy.deepcopy(network).cpu().eval()
    for name, found in rounded.items():
        replace_module(network, name, found.layer(network.get_submodule(name)))
    storage = {
        name: LayerStorage(found.bits, FLOAT_BITS, "symmetric_per_channel", "float") for name, found in rounded.items()
    }
    return Quantized(network, storage, float_layers=kept, search=search, curve=curve)


def round_all(task: Task, layers: list[Layer], choices: list[int]) -> dict[str, dict[int, Rounded]]:
    """Every layer's weight at each number of bits: by name, then by bits."""
    modules = {layer.name: task.network.get_submodule(layer.name) for layer in layers}
    if task.quantizer.rounding == "nearest":
        return {n: {bits: round_nearest(m.weight, bits) for bits in choices} for n, m in modules.items()}
    moments = hessians(task.classifier, modules, task.calibration[0])
    rounded = {}
    for name, module in modules.items():
        factor = inverse_factor(moments.pop(name))
        rounded[name] = {bits: round_gptq(module.weight, bits, factor) for bits in choices}
    return rounded


def allocate(
    task: Task, layers: list[Layer], by_bits: Mapping[str, Mapping[int, Rounded]]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Search for the bits of each layer within the budget.

    Returns:
        The bits by layer name, and what `model.json` tells of the search.
    """
    quantizer: AllocatedBits = task.quantizer
    evaluator = Evaluator(task.classifier, [layer.name for layer in layers], by_bits, *task.calibration)
    problem = problem_of(layers, by_bits, evaluator, quantizer, task.parent.seed, f"{task.param}.evaluations")
    with count_progress(f"quantize {task.variant}", quantizer.evaluations, "evaluation") as step:
        problem.evaluate = _counted(step, problem, quantizer)
        sensitivities = _search(problem, quantizer)
    bits = problem.budget.choices[problem.best]
    told = {
        "search": getattr(quantizer, "search", "policy_gradient"),
        "objective": quantizer.objective,
        "float": problem.unquantized,
        "best": min(problem.tried),
        "tried": problem.tried,
        "evaluations": evaluator.evaluations,
        "weights": int(problem.budget.weights.sum()),
        "budget_bits": problem.budget.bits,
        "used_bits": problem.budget.used(problem.best),
        "sensitivities": {} if sensitivities is None else _told(layers, problem.budget, sensitivities),
    }
    print(
        f"{task.variant}: {told['search']} search: {quantizer.objective} {_shown(told['best'], quantizer)} on"
        f" {quantizer.calibration_images} training images (float {_shown(told['float'], quantizer)}),"
        f" {told['evaluations']} evaluations, {told['used_bits'] / told['weights']:.2f} bits on average"
    )
    return {layer.name: int(b) for layer, b in zip(layers, bits, strict=True)}, told


def problem_of(
    layers: list[Layer],
    by_bits: Mapping[str, Mapping[int, Rounded]],
    evaluator: Evaluator,
    quantizer: AllocatedBits,
    seed: int,
    param: str = "evaluations",
) -> Problem:
    """What a search is given of the evaluator's network, whose layers' integers are `by_bits`.

    Args:
        param: where `evaluations` stands in params.yaml, for messages.
    """
    weights = {name: evaluator.float_weight(name) for name in by_bits}
    return Problem(
        layers=layers,
        budget=Budget.of(layers, quantizer),
        errors=np.array(
            [
                [float((found.values() - weights[name]).square().sum()) for found in of_layer.values()]
                for name, of_layer in by_bits.items()
            ]
        ),
        statistics=np.array([_statistics(weight) for weight in weights.values()]),
        evaluate=lambda bits: evaluator(bits).objective(quantizer.objective),
        unquantized=evaluator.float_score.objective(quantizer.objective),
        evaluations=quantizer.evaluations,
        seed=seed,
        param=param,
    )


def _counted(
    step: Callable[[str], None], problem: Problem, quantizer: AllocatedBits
) -> Callable[[Mapping[str, int | None]], float]:
    """The problem's `evaluate`, which also calls `step` with the best that was tried before."""
    evaluate = problem.evaluate

    def counted(bits: Mapping[str, int | None]) -> float:
        value = evaluate(bits)
        step(f"best {quantizer.objective} {_shown(min(problem.tried), quantizer)}" if problem.tried else "")
        return value

    return counted


def _shown(objective: float, quantizer: AllocatedBits) -> str:
    return f"{objective:.4f}" if quantizer.objective == "loss" else f"{100 * (1 - objective):.2f} %"


def _search(problem: Problem, quantizer: AllocatedBits) -> Sensitivities | None:
    if isinstance(quantizer, LearnedBits):
        return learn_bits(problem, quantizer)
    match quantizer.search:
        case "random":
            return search_at_random(problem)
        case "greedy":
            return search_greedily(problem)
        case "ilp":
            return search_by_ilp(problem)


def _told(layers: list[Layer], budget: Budget, sensitivities: Sensitivities) -> dict[str, dict[str, float]]:
    """Measured rises of the objective by layer and bits."""
    columns = np.flatnonzero(sensitivities.measured)
    return {
        layer.name: {str(budget.choices[column]): float(row[column]) for column in columns}
        for layer, row in zip(layers, sensitivities.rises, strict=True)
    }


def _statistics(weight: torch.Tensor) -> tuple[float, float]:
    """Logarithm of the standard deviation, and kurtosis."""
    deviation = weight.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return float(deviation.log()), float(((weight - weight.mean()) / deviation).pow(4).mean())
