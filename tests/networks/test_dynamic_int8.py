import numpy as np
import pytest
import torch
from torch import nn

from stages.networks.dynamic_int8 import dynamic_layers, pack_layer, quantize_linears, unpack_layer, without_dynamic


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 4))).eval()


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_are_symmetric_and_scaled_by_their_largest_magnitude(per_channel):
    original = network()
    layers = dynamic_layers(quantize_linears(original, per_channel))
    assert list(layers) == ["0", "2.0", "2.1"]
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight.detach()
        largest = weight.abs().amax(1) if per_channel else weight.abs().amax()[None]
        tensors = unpack_layer(layer)
        torch.testing.assert_close(tensors["weight_scale"], largest / 127)
        expected = torch.round(weight / tensors["weight_scale"][:, None])
        assert (tensors["weight"] - expected).abs().max() <= 1  # ties may round either way
        assert ((tensors["weight"] != expected).float().mean()) < 0.02
        assert tensors["weight"].abs().max() == 127


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_unpacked_tensors_pack_to_the_same_layer(per_channel):
    packed = quantize_linears(network(), per_channel)
    x = torch.randn(7, 6)
    for name, layer in dynamic_layers(packed).items():
        tensors = unpack_layer(layer)
        again = pack_layer(tensors)
        for part, tensor in unpack_layer(again).items():
            assert torch.equal(tensor, tensors[part]), f"{name}.{part}"
        x_in = torch.randn(7, tensors["weight"].shape[1])
        assert torch.equal(again(x_in), layer(x_in))
    assert "bias" not in unpack_layer(dynamic_layers(packed)["2.0"])
    assert packed(x).shape == (7, 4)


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_dequantized_twin_holds_the_values_of_the_integers(per_channel):
    original = network()
    packed = quantize_linears(original, per_channel)
    twin = without_dynamic(packed)
    assert not dynamic_layers(twin)
    assert len(dynamic_layers(packed)) == 3
    assert not twin.training
    for name in ("0", "2.0", "2.1"):
        step = unpack_layer(packed.get_submodule(name))["weight_scale"].max().item()
        difference = twin.get_submodule(name).weight - original.get_submodule(name).weight
        assert difference.abs().max() <= 0.51 * step
    x = torch.randn(7, 6)
    np.testing.assert_allclose(twin(x), packed(x), atol=0.05)


def test_the_float_network_is_left_as_it_is():
    original = network()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    quantize_linears(original, True)
    assert not dynamic_layers(original)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_zero_weights_stay_zero():
    original = network()
    with torch.no_grad():
        original[0].weight[:, ::2] = 0
        original[0].weight[3] = 0
    tensors = unpack_layer(quantize_linears(original, True)[0])
    assert not tensors["weight"][:, ::2].any()
    assert not tensors["weight"][3].any()
