import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.networks.preprocess import Classifier, Preprocess
from stages.quantization import evaluation
from stages.quantization.evaluation import Evaluator
from stages.quantization.rounding import round_nearest
from stages.training.class_weights import balanced_weights


class InPlace(nn.Module):
    """Blocks with residuals and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(inplace=True)) for _ in range(3))
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.stem(x), inplace=True)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


NAMES = ["stem", "blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]


@pytest.fixture
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Preprocess([0.5] * 3, [0.25] * 3, 8), InPlace()).eval()


def evaluator_of(classifier: Classifier, count: int = 100, class_weights: torch.Tensor | None = None) -> Evaluator:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), generator.integers(0, 4, count)
    weights = {name: classifier.network.get_submodule(name).weight for name in NAMES}
    rounded = {name: {bits: round_nearest(weight, bits) for bits in (2, 4)} for name, weight in weights.items()}
    return Evaluator(classifier, NAMES, rounded, images, labels, class_weights)


@pytest.mark.parametrize("changed", [[], ["head"], ["blocks.1.0"], ["blocks.2.0", "head"], NAMES])
def test_the_loss_is_that_of_the_whole_network_run_anew(classifier, changed):
    evaluator = evaluator_of(classifier)
    evaluator(dict.fromkeys(NAMES, 2))  # something else before
    loss = evaluator({name: 2 if name in changed else None for name in NAMES})

    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8), generator.integers(0, 4, 100)
    for name in changed:
        weight = classifier.network.get_submodule(name).weight
        weight.data = round_nearest(weight, 2).values()
    with torch.no_grad():
        logits = classifier(torch.from_numpy(images))
    assert loss == pytest.approx(F.cross_entropy(logits, torch.from_numpy(labels)).item(), abs=1e-6)
    assert evaluator.evaluations == 2


def test_with_balanced_weights_the_loss_is_the_mean_over_the_classes(classifier):
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (100, 8, 8, 3), dtype=np.uint8), generator.integers(0, 4, 100)
    with torch.no_grad():
        logits = classifier(torch.from_numpy(images))
    losses = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy()
    expected = np.mean([losses[labels == k].mean() for k in range(4)])
    weights = balanced_weights(labels, 4)
    assert evaluator_of(classifier, class_weights=weights)(dict.fromkeys(NAMES)) == pytest.approx(expected, abs=1e-6)
    assert evaluator_of(classifier)(dict.fromkeys(NAMES)) == pytest.approx(losses.mean(), abs=1e-6)
    assert abs(losses.mean() - expected) > 1e-4


def test_modules_before_the_first_changed_layer_are_not_computed_again(classifier, monkeypatch):
    evaluator = evaluator_of(classifier)
    names, ran, convolve = {module: name for name, module in evaluator._modules.items()}, [], nn.Conv2d._conv_forward

    def counted(layer: nn.Conv2d, *arguments):
        ran.append(names[layer])
        return convolve(layer, *arguments)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    evaluator(dict.fromkeys(NAMES) | {"blocks.2.0": 4})
    assert set(ran) == {"blocks.2.0"}
    ran.clear()
    evaluator(dict.fromkeys(NAMES, 4))
    assert set(ran) == set(NAMES) - {"head"}


def test_a_network_too_large_for_the_cache_is_computed_whole(classifier, monkeypatch):
    expected = evaluator_of(classifier)({"head": 2})
    monkeypatch.setattr(evaluation, "LARGEST_CACHE", 1000)
    assert evaluator_of(classifier)({"head": 2}) == expected


def test_the_classifier_is_left_as_it_is(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    evaluator_of(classifier)(dict.fromkeys(NAMES, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
