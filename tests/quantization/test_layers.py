"""Which layers may have integers, and which networks are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from toys import session_of

from stages.common.errors import UserError
from stages.params.quantizers import Int8Dynamic, Int8Static, UniformBits
from stages.quantization.layers import integer_candidates
from stages.quantization.methods import quantize

QUANTIZERS = {
    "dynamic": Int8Dynamic(method="int8_dynamic"),
    "static": Int8Static(method="int8_static", calibration_images=4),
    "bits": UniformBits(method="uniform_bits", bits=4),
}


def test_candidates_stand_in_the_order_of_execution_and_the_others_are_named():
    class Unordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.auxiliary = nn.Linear(6, 2), nn.Linear(6, 2)
            self.first, self.turned = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.turned(self.first(x)).mean((2, 3)))

    layers, kept = integer_candidates(Unordered(), 8)
    assert [layer.name for layer in layers] == ["first", "head"]
    assert sorted(kept) == ["auxiliary", "turned"]


def one_module_twice() -> nn.Module:
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), shared, nn.ReLU(), shared)


def one_module_under_two_parents() -> nn.Module:
    shared = nn.Conv2d(3, 3, 1)
    return nn.Sequential(nn.Sequential(shared), nn.ReLU(), nn.Sequential(shared), nn.Flatten(), nn.Linear(192, 2))


def one_weight_of_two_modules() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    network[3].weight = network[2].weight
    return network


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(
    ("build", "first", "second"),
    [
        (one_module_twice, "2.weight", "4.weight"),
        (one_module_under_two_parents, "0.0.weight", "2.0.weight"),
        (one_weight_of_two_modules, "2.weight", "3.weight"),
    ],
)
def test_shared_weights_are_refused_with_both_names(build: Callable[[], nn.Module], first, second, quantizer):
    with pytest.raises(UserError, match=f"^{first} and {second} are one and the same parameter: .* fp32 quantizer$"):
        quantize(session_of(build(), QUANTIZERS[quantizer]))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_shared_modules_that_get_no_integers_are_no_reason_to_refuse(quantizer):
    norm, activation = nn.LayerNorm(8), nn.ReLU()
    body = nn.Sequential(nn.Linear(192, 8), norm, activation, nn.Linear(8, 8), norm, activation, nn.Linear(8, 2))
    network = nn.Sequential(nn.Flatten(), body)
    quantized = quantize(session_of(network, QUANTIZERS[quantizer]))
    assert quantized.layers.keys() == {"1.0", "1.3", "1.6"}
    assert quantized.network[1][1] is quantized.network[1][4]
