import numpy as np
import pytest
import torch

from stages.artifacts.packing import limits
from stages.quantization import rounding
from stages.quantization.rounding import BLOCK, Rounded, inverse_factor, round_nearest

ALL_BITS = range(2, 9)


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(weight: torch.Tensor, scale: float, bits: int) -> float:
    low, high = limits(bits)
    return float(((weight / scale).round().clamp(low, high) * scale - weight).square().sum())


def round_gptq(weight: torch.Tensor, bits: int, hessian: torch.Tensor) -> Rounded:
    return rounding.round_gptq(weight, bits, inverse_factor(hessian))


@pytest.mark.parametrize("bits", ALL_BITS)
def test_integers_fit_their_bits(bits):
    rounded = round_nearest(weight_of(8, 50), bits)
    low, high = limits(bits)
    assert rounded.integers.dtype == torch.int8
    assert low <= rounded.integers.min()
    assert rounded.integers.max() <= high
    assert (rounded.scale > 0).all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_scale_is_as_good_as_a_fine_search_finds(bits):
    weight = weight_of(6, 400)
    rounded = round_nearest(weight, bits)
    for row, scale in zip(weight, rounded.scale, strict=True):
        largest = float(row.abs().max()) / limits(bits)[1]
        fine = min(error_of(row, s, bits) for s in np.linspace(0.15, 1.05, 2000) * largest)
        assert error_of(row, float(scale), bits) <= 1.05 * fine


def test_more_bits_lose_less():
    weight = weight_of(4, 3, 5, 5)
    errors = [float((round_nearest(weight, bits).values() - weight).square().sum()) for bits in ALL_BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@pytest.mark.parametrize("bits", [2, 8])
def test_zeros_stay_zero_and_an_empty_channel_is_all_zeros(bits):
    weight = weight_of(4, 30) * (weight_of(4, 30, seed=1) > 0)
    weight[2] = 0
    rounded = round_nearest(weight, bits)
    assert not rounded.integers[weight == 0].any()
    assert torch.equal(rounded.values()[2], torch.zeros(30))
    assert torch.isfinite(rounded.scale).all()


def test_gptq_with_unrelated_inputs_is_plain_rounding():
    weight = weight_of(5, 12)
    assert torch.equal(round_gptq(weight, 3, torch.eye(12)[None]).integers, round_nearest(weight, 3).integers)


def column_by_column(weight: torch.Tensor, bits: int, hessian: torch.Tensor) -> torch.Tensor:
    """GPTQ of one group as the paper's equations 2 and 3 say it: without blocks or a Cholesky factor.

    After each column its row and column leave the inverse Hessian by a step of Gaussian elimination.
    """
    low, high = limits(bits)
    scale, rows, hessian = round_nearest(weight, bits).scale.double(), weight.double().clone(), hessian.double()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian)))
    integers = torch.zeros_like(rows)
    for column in range(len(hessian)):
        integers[:, column] = (rows[:, column] / scale).round().clamp(low, high) * (weight[:, column] != 0)
        error = (rows[:, column] - integers[:, column] * scale) / inverse[column, column]
        rows[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
    return integers.to(torch.int8)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("groups", "inputs"), [(1, 2 * BLOCK + 17), (1, BLOCK), (3, 9)])
def test_gptq_in_blocks_gives_the_integers_of_column_by_column(groups, inputs, bits):
    generator = torch.Generator().manual_seed(groups + bits)
    mixed = torch.randn(groups, inputs, inputs, generator=generator)
    x = mixed @ torch.randn(groups, inputs, 3 * inputs, generator=generator)
    hessian = x @ x.transpose(1, 2)
    weight = weight_of(groups * 6, inputs) * (weight_of(groups * 6, inputs, seed=1) > -1)
    found = round_gptq(weight, bits, hessian).integers
    expected = torch.cat([column_by_column(w, bits, h) for w, h in zip(weight.split(6), hessian, strict=True)])
    assert torch.equal(found, expected)
    assert not torch.equal(found, round_nearest(weight, bits).integers)
    assert (weight == 0).any()


@pytest.mark.parametrize("groups", [1, 4])
def test_gptq_changes_outputs_less_than_plain_rounding(groups):
    shares = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(groups, 20, 20, generator=generator) @ torch.randn(groups, 20, 400, generator=generator)
        weight = weight_of(groups * 6, 20, seed=seed)
        found, plain = (
            float(((rounded.values() - weight).reshape(groups, 6, 20) @ x).square().mean())
            for rounded in (round_gptq(weight, 4, x @ x.transpose(1, 2)), round_nearest(weight, 4))
        )
        shares.append(found / plain)
    assert max(shares) < 1
    assert np.mean(shares) < 0.75


def test_gptq_keeps_zeros_and_the_shape():
    weight = weight_of(4, 2, 3, 3)
    weight[0, :, 1] = 0
    x = torch.randn(1, 18, 100)
    rounded = round_gptq(weight, 2, x @ x.transpose(1, 2))
    assert rounded.integers.shape == weight.shape
    assert not rounded.integers[0, :, 1].any()


def test_dead_inputs_do_no_harm():
    x = torch.randn(1, 8, 50)
    x[:, 3] = 0
    rounded = round_gptq(weight_of(3, 8), 4, x @ x.transpose(1, 2))
    assert torch.isfinite(rounded.values()).all()
