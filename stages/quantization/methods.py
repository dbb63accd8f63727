"""The quantization methods: each turns the float network of a session into what the artifact stores."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.artifacts.description import FLOAT_BITS, LayerStorage
from stages.common.errors import UserError
from stages.common.progress import count_progress
from stages.networks.integer_weights import KINDS
from stages.networks.modules import excluded_modules, replace_module
from stages.networks.reparameterize import is_pointwise
from stages.params.quantizers import (
    AllocatedBits,
    Bits,
    Fp32,
    Int8Dynamic,
    Int8Static,
    LearnedBits,
    SearchedBits,
    UniformBits,
)
from stages.params.section import Excluding
from stages.quantization.calibration import calibration_images, hessians
from stages.quantization.controller import learn_bits
from stages.quantization.evaluation import Evaluator
from stages.quantization.int8 import int8_dynamic, int8_static
from stages.quantization.layers import Layer, integer_candidates, layers_with_weights, refuse_shared_weights
from stages.quantization.recovery import recover
from stages.quantization.rounding import Rounded, inverse_factor, round_gptq, round_nearest
from stages.quantization.searches import (
    BitBudget,
    Problem,
    Sensitivities,
    search_at_random,
    search_by_ilp,
    search_greedily,
)
from stages.training.class_weights import balanced_weights
from stages.training.distributed import broadcast
from stages.training.session import Session


@dataclass
class Quantized:
    """The result of a quantization method."""

    network: nn.Module
    layers: dict[str, LayerStorage] = field(default_factory=dict)
    pointwise_as_linear: bool = False
    pixel_stem: dict[str, int] = field(default_factory=dict)
    """As in `NetworkSpec`: unless it is empty, the network takes stored pixels directly."""
    float_layers: list[str] = field(default_factory=list)
    """Layers with float weights: they have no integer form, gain nothing from it, or never run."""
    search: dict[str, Any] = field(default_factory=dict)
    """A search for bits: its settings, the losses that it tried, and its result."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Curve of the recovery training."""


def quantize(session: Session) -> Quantized:
    """Quantize the session's network as its settings say.

    Raises:
        UserError: If the network cannot be quantized in this way, or a setting does not fit it.
    """
    network = session.network
    if isinstance(session.settings, Excluding):
        _check_exclude(network, session.settings, session.param)
    match session.settings:
        case Fp32():
            return Quantized(network)
        case Int8Dynamic(per_channel=per_channel, exclude=exclude):
            refuse_shared_weights(network)
            packed, layers = int8_dynamic(network, per_channel, exclude)
            return Quantized(packed, layers, pointwise_as_linear=True, float_layers=layers_with_weights(packed))
        case Int8Static() as quantizer:
            images, _ = calibration_images(session.train_part, quantizer, session.param)
            classifier, layers, kept, stem = int8_static(session.classifier, quantizer, images)
            return Quantized(classifier.network, layers, pointwise_as_linear=True, float_layers=kept, pixel_stem=stem)
        case Bits() as quantizer:
            return quantize_to_bits(session, quantizer)
    raise TypeError(f"{session.param} is not a quantizer")


def _check_exclude(network: nn.Module, quantizer: Excluding, param: str) -> None:
    """Refuse an `exclude` that names nothing, or leaves nothing."""
    try:
        excluded = excluded_modules(network, quantizer.exclude)
    except UserError as error:
        raise UserError(f"{param}.{error}") from None
    if isinstance(quantizer, Int8Dynamic):
        candidates = [name for name, m in network.named_modules() if type(m) is nn.Linear or is_pointwise(m)]
    elif isinstance(quantizer, Int8Static):
        candidates = [n for n, m in network.named_modules() if type(m) in KINDS and getattr(m, "groups", 1) == 1]
    else:
        candidates = [name for name, m in network.named_modules() if type(m) in KINDS]
    if candidates and excluded.issuperset(candidates):
        raise UserError(
            f"{param}.exclude = {quantizer.exclude}: leaves no layer to quantize: shorten it, or take an fp32 quantizer"
        )


def quantize_to_bits(session: Session, quantizer: Bits) -> Quantized:
    """Choose each layer's bits, round its weight, and train with rounded weights if the quantizer has epochs."""
    network = session.network
    layers, kept = integer_candidates(network, session.input_size, quantizer.exclude)
    if kept:
        print(f"{session.key}: in float, since they are excluded, have no integer form or never run: {', '.join(kept)}")
    search: dict[str, Any] = {}
    if isinstance(quantizer, UniformBits):
        by_bits = round_all(session, quantizer, layers, [quantizer.bits])
        rounded = {name: choices[quantizer.bits] for name, choices in by_bits.items()}
    else:
        assert isinstance(quantizer, AllocatedBits)
        by_bits = round_all(session, quantizer, layers, quantizer.choices)
        bits, search = broadcast(lambda: allocate(session, quantizer, layers, by_bits))
        rounded = {name: by_bits[name][bits[name]] for name in bits}
    curve: list[dict[str, float]] = []
    if quantizer.epochs:
        network, rounded, curve = recover(session, rounded)
    network = copy.deepcopy(network).cpu().eval()
    for name, found in rounded.items():
        replace_module(network, name, found.layer(network.get_submodule(name)))
    storage = {
        name: LayerStorage(found.bits, FLOAT_BITS, "symmetric_per_channel", "float") for name, found in rounded.items()
    }
    return Quantized(network, storage, float_layers=kept, search=search, curve=curve)


def round_all(
    session: Session, quantizer: Bits, layers: list[Layer], choices: list[int]
) -> dict[str, dict[int, Rounded]]:
    """Every layer's weight at each number of bits: by name, then by bits."""
    modules = {layer.name: session.network.get_submodule(layer.name) for layer in layers}
    if quantizer.rounding == "nearest":
        return {n: {bits: round_nearest(m.weight, bits) for bits in choices} for n, m in modules.items()}
    images, _ = calibration_images(session.train_part, quantizer, session.param)
    moments = hessians(session.classifier, modules, images)
    rounded = {}
    for name, module in modules.items():
        factor = inverse_factor(moments.pop(name))
        rounded[name] = {bits: round_gptq(module.weight, bits, factor) for bits in choices}
    return rounded


def allocate(
    session: Session, quantizer: AllocatedBits, layers: list[Layer], by_bits: Mapping[str, Mapping[int, Rounded]]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Search for the bits of each layer within the budget.

    Returns:
        The bits by layer name, and the record of the search for `model.json`.
    """
    images, labels = calibration_images(session.train_part, quantizer, session.param)
    balanced = session.metric == "balanced_accuracy"
    class_weights = balanced_weights(labels, len(session.parent.classes)) if balanced else None
    names = [layer.name for layer in layers]
    evaluator = Evaluator(session.classifier, names, by_bits, images, labels, class_weights)
    weights = {name: evaluator.float_weight(name) for name in by_bits}
    errors = [
        [float((found.values() - weights[name]).square().sum()) for found in choices.values()]
        for name, choices in by_bits.items()
    ]
    with count_progress(f"quantize {session.key}", quantizer.evaluations, "evaluation") as step:

        def evaluate(bits: Mapping[str, int | None]) -> float:
            loss = evaluator(bits)
            step(f"best loss {min(problem.tried):.4f}" if problem.tried else "")
            return loss

        problem = Problem(
            layers=layers,
            budget=BitBudget.of(layers, quantizer),
            errors=np.array(errors),
            statistics=np.array([_statistics(weight) for weight in weights.values()]),
            evaluate=evaluate,
            unquantized=evaluator.float_loss,
            evaluations=quantizer.evaluations,
            seed=session.seed,
            param=f"{session.param}.evaluations",
        )
        sensitivities = _search(problem, quantizer)
    used, total = problem.budget.used(problem.best), int(problem.budget.weights.sum())
    record = {
        "search": getattr(quantizer, "search", "policy_gradient"),
        "float": problem.unquantized,
        "best": min(problem.tried),
        "tried": problem.tried,
        "evaluations": evaluator.evaluations,
        "weights": total,
        "budget_bits": problem.budget.bits,
        "used_bits": used,
        "sensitivities": {} if sensitivities is None else _measured_rises(problem, sensitivities),
    }
    print(
        f"{session.key}: {record['search']} search: loss {record['best']:.4f} on {len(images)} training images (float"
        f" {record['float']:.4f}), {record['evaluations']} evaluations, {used / total:.2f} bits on average"
    )
    bits = problem.budget.choices[problem.best]
    return {layer.name: int(b) for layer, b in zip(layers, bits, strict=True)}, record


def _search(problem: Problem, quantizer: AllocatedBits) -> Sensitivities | None:
    if isinstance(quantizer, LearnedBits):
        return learn_bits(problem, quantizer)
    assert isinstance(quantizer, SearchedBits)
    if quantizer.search == "random":
        search_at_random(problem)
        return None
    return search_greedily(problem) if quantizer.search == "greedy" else search_by_ilp(problem)


def _measured_rises(problem: Problem, sensitivities: Sensitivities) -> dict[str, dict[str, float]]:
    """Measured rises of the loss by layer and bits."""
    columns, choices = np.flatnonzero(sensitivities.measured), problem.budget.choices
    return {
        layer.name: {str(choices[column]): float(row[column]) for column in columns}
        for layer, row in zip(problem.layers, sensitivities.rises, strict=True)
    }


def _statistics(weight: torch.Tensor) -> tuple[float, float]:
    """Logarithm of the standard deviation, and kurtosis."""
    std = weight.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    return float(std.log()), float(((weight - weight.mean()) / std).pow(4).mean())
