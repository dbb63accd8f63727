import copy

import pytest
import torch
from torch import nn

from stages.networks.integer_weights import Grid, floating, integer_layers, tensors_of, with_integers, without_integers

LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (3, 6)),
    "convolution": (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
    "reflecting convolution": (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
}


def integers_of(layer: nn.Module, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    high = 1 << (bits - 1)
    integers = torch.randint(-high, high, layer.weight.shape, generator=generator, dtype=torch.int8)
    return integers, torch.rand(len(layer.weight), generator=generator) + 0.1


@pytest.mark.parametrize("name", LAYERS)
def test_an_integer_layer_computes_with_its_dequantized_weight(name):
    layer, shape = LAYERS[name]
    before = copy.deepcopy(layer.state_dict())
    integers, scale = integers_of(layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = copy.deepcopy(layer)
    expected.weight.data = integers.float() * scale.view(-1, *[1] * (integers.dim() - 1))
    integer = with_integers(layer, integers, scale, 4)
    assert torch.equal(integer(x), expected(x))
    assert torch.equal(floating(integer)(x), expected(x))
    assert type(floating(integer)) is type(layer) in (nn.Linear, nn.Conv2d)
    assert all(torch.equal(tensor, before[part]) for part, tensor in layer.state_dict().items())


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-2.0, -1.0), (0.0, 0.0)])
def test_a_grid_holds_zero_and_covers_its_range(low, high):
    grid = Grid.over(low, high)
    assert 0 <= grid.zero_point <= 255
    assert (0 - grid.zero_point) * grid.scale <= min(low, 0) + grid.scale
    assert (255 - grid.zero_point) * grid.scale >= max(high, 0) - grid.scale


def test_activations_are_rounded_to_their_grids_as_torch_does_it():
    layer, shape = LAYERS["convolution"]
    grids = {"input": Grid.over(-1, 2), "output": Grid.over(-3, 3)}
    integer = with_integers(layer, *integers_of(layer), 4, grids)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def rounded(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(tensor, grid.scale, grid.zero_point, 0, 255)

    expected = rounded(floating(integer)(rounded(x, grids["input"])), grids["output"])
    assert torch.allclose(integer(x), expected, atol=1e-6)


def test_a_layer_that_is_used_twice_stays_one_layer_in_the_float_copy():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    integer = with_integers(shared, *integers_of(shared), 4)
    network[0] = network[2] = integer
    twin = without_integers(network)
    assert not integer_layers(twin)
    assert twin[0] is twin[2]
    assert list(integer_layers(network)) == ["0"]
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), network(x))


def test_state_survives_a_round_trip():
    layer, shape = LAYERS["convolution"]
    grids = {"input": Grid.over(-1, 2)}
    integer = with_integers(layer, *integers_of(layer), 4, grids)
    again = with_integers(layer, *integers_of(layer), 4, {"input": Grid.over(-9, 9)})
    again.load_state_dict(tensors_of(integer))
    assert Grid.of(again, "input") == Grid.of(integer, "input")
    x = torch.randn(shape)
    assert torch.equal(again(x), integer(x))
