import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import RECIPE, session_of

from stages.datasets.store import Part
from stages.networks.preprocess import Preprocess
from stages.params.quantizers import UniformBits
from stages.quantization.recovery import RoundingConv2d, RoundingLinear, recover
from stages.quantization.rounding import Rounded, round_nearest
from stages.training.trainer import Trainer, TrainingData


def rounding_of(layer: nn.Module, bits: int) -> nn.Module:
    layer = copy.deepcopy(layer)
    rounded = round_nearest(layer.weight, bits)
    layer.__class__ = {nn.Linear: RoundingLinear, nn.Conv2d: RoundingConv2d}[type(layer)]
    layer._start(rounded)
    return layer


@pytest.mark.parametrize("layer", [nn.Linear(12, 6), nn.Conv2d(4, 6, 3, groups=2)])
def test_it_computes_with_what_its_integers_will_be(layer):
    rounding = rounding_of(layer, 3)
    rounded = rounding.rounded()
    assert torch.equal(rounded.integers, round_nearest(layer.weight, 3).integers)
    assert torch.allclose(rounding.rounded_weight(), rounded.values())


def test_gradients_go_straight_through_within_the_range_and_not_at_all_beyond():
    layer = rounding_of(nn.Linear(50, 4), 2)
    layer.rounded_weight().sum().backward()
    steps = layer.weight.detach() / layer.weight_scale.detach()[:, None]
    assert torch.equal(layer.weight.grad != 0, (steps > -2) & (steps < 1))
    assert torch.equal(layer.weight.grad[layer.weight.grad != 0].unique(), torch.ones(1))


def test_the_scale_has_the_gradient_of_learned_step_sizes():
    """Equation 3 of arXiv 1902.08153, times the factor of its section 2.2."""
    layer = rounding_of(nn.Linear(50, 4), 3)
    layer.rounded_weight().sum().backward()
    steps = (layer.weight / layer.weight_scale[:, None]).detach()
    inside = torch.where(steps <= -4, -4.0, torch.where(steps >= 3, 3.0, steps.round() - steps))
    assert torch.allclose(layer.weight_scale.grad, inside.sum(1) / (50 * 3) ** 0.5, atol=1e-5)


def test_zeros_stay_zero_whatever_the_optimizer_does():
    layer = nn.Linear(20, 4)
    layer.weight.data[:, ::2] = 0
    rounding = rounding_of(layer, 4)
    rounding.weight.data += 1
    assert not rounding.rounded_weight()[:, ::2].any()
    assert not rounding.rounded().integers[:, ::2].any()
    assert rounding.rounded().integers[:, 1::2].any()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 32, 3, stride=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def part_of(count: int, seed: int) -> Part:
    """Four classes, each with another brighter quarter of the image."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, count)
    images = generator.integers(0, 120, (count, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        image[8 * (label // 2) :][:8, 8 * (label % 2) :][:, :8] += 20
    return Part(images.astype(np.uint8), labels)


MEAN, STD = [0.3] * 3, [0.2] * 3
PREPROCESS = Preprocess(MEAN, STD, 16)


@pytest.fixture(scope="module")
def dense() -> tuple[nn.Module, tuple[Part, Part], float]:
    """A trained network, its images and its top-1."""
    torch.manual_seed(0)
    network, parts = Small(), (part_of(512, 0), part_of(128, 1))
    trained = Trainer(network, TrainingData(*parts, PREPROCESS), RECIPE, torch.device("cpu")).fit()
    return network, parts, trained.validation_top1


def rounded_to(bits: int, network: nn.Module) -> dict[str, Rounded]:
    return {
        name: round_nearest(module.weight, bits)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def recovered_by(quantizer: UniformBits, network: nn.Module, rounded: dict, parts: tuple, optimizer: str = "adamw"):
    recipe = RECIPE.model_copy(update={"optimizer": optimizer})
    session = session_of(network, quantizer, parts, input_size=16, finetune=recipe)
    session.parent = replace(session.parent, mean=MEAN, std=STD)
    return recover(session, rounded)


def logits_of(network: nn.Module, weights: dict[str, Rounded], part: Part) -> torch.Tensor:
    network = copy.deepcopy(network).eval()
    for name, one in weights.items():
        network.get_submodule(name).weight.data = one.values()
    with torch.no_grad():
        return network(PREPROCESS(torch.from_numpy(part.images)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_recovery_mends_what_two_bits_broke_and_the_network_is_left_as_it_is(dense, optimizer):
    network, parts, top1 = dense
    rounded = rounded_to(2, network)
    quantizer = UniformBits(method="uniform_bits", bits=2, epochs=4, learning_rate_factor=0.3)
    before = copy.deepcopy(network.state_dict())
    plain, found, curve = recovered_by(quantizer, network, rounded, parts, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    def score(network: nn.Module, weights: dict) -> tuple[float, float]:
        logits, labels = logits_of(network, weights, parts[1]), torch.from_numpy(parts[1].labels)
        return F.cross_entropy(logits, labels).item(), float((logits.argmax(1) == labels).float().mean())

    loss, recovered = score(plain, found)
    assert recovered == pytest.approx(max(row["validation_top1"] for row in curve))
    assert recovered > top1 - 0.1
    assert loss < 0.9 * score(network, rounded)[0]
    assert {one.bits for one in found.values()} == {2}


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_with_distillation_alone_it_follows_the_float_network_whatever_the_labels(dense, distillation):
    network, (train_part, validation_part), _ = dense
    wrong = [Part(part.images, (part.labels + 1) % 4) for part in (train_part, validation_part)]
    quantizer = UniformBits(
        method="uniform_bits", bits=4, epochs=6, learning_rate_factor=0.6, distillation=distillation
    )
    plain, found, _ = recovered_by(quantizer, network, rounded_to(4, network), tuple(wrong))
    student, teacher = (logits_of(n, w, validation_part).argmax(1) for n, w in ((plain, found), (network, {})))
    agreement = float((student == teacher).float().mean())
    assert agreement > 0.9 if distillation else agreement < 0.7
