import numpy as np
import pytest
import torch
from torch import nn

from stages.networks.dynamic_int8 import dynamic_layers, pack_layer, quantize_linears, unpack_layer, without_dynamic


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 5, bias=False), nn.Linear(5, 4))).eval()


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_are_symmetric_and_scaled_by_their_largest_magnitude(network, per_channel):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layers = dynamic_layers(quantize_linears(network, per_channel))
    assert list(layers) == ["0", "2.0", "2.1"]
    for name, layer in layers.items():
        weight = network.get_submodule(name).weight.detach()
        largest = weight.abs().amax(1) if per_channel else weight.abs().amax()[None]
        tensors = unpack_layer(layer)
        torch.testing.assert_close(tensors["weight_scale"], largest / 127)
        expected = torch.round(weight / tensors["weight_scale"][:, None])
        assert (tensors["weight"] - expected).abs().max() <= 1  # ties may round either way
        assert (tensors["weight"] != expected).float().mean() < 0.02
        assert tensors["weight"].abs().max() == 127
    assert not dynamic_layers(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_unpacked_tensors_pack_to_the_same_layer(network, per_channel):
    layers = dynamic_layers(quantize_linears(network, per_channel))
    for name, layer in layers.items():
        tensors = unpack_layer(layer)
        again = pack_layer(tensors)
        for part, tensor in unpack_layer(again).items():
            assert torch.equal(tensor, tensors[part]), f"{name}.{part}"
        x = torch.randn(7, tensors["weight"].shape[1])
        assert torch.equal(again(x), layer(x))
    assert "bias" not in unpack_layer(layers["2.0"])


@torch.no_grad()
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_float_copy_holds_the_dequantized_weights(network, per_channel):
    packed = quantize_linears(network, per_channel)
    twin = without_dynamic(packed)
    assert not dynamic_layers(twin)
    assert len(dynamic_layers(packed)) == 3
    assert not twin.training
    for name in ("0", "2.0", "2.1"):
        step = unpack_layer(packed.get_submodule(name))["weight_scale"].max().item()
        assert (twin.get_submodule(name).weight - network.get_submodule(name).weight).abs().max() <= 0.51 * step
    x = torch.randn(7, 6)
    np.testing.assert_allclose(twin(x), packed(x), atol=0.05)


def test_zero_weights_stay_zero(network):
    with torch.no_grad():
        network[0].weight[:, ::2] = 0
        network[0].weight[3] = 0
    tensors = unpack_layer(quantize_linears(network, True)[0])
    assert not tensors["weight"][:, ::2].any()
    assert not tensors["weight"][3].any()
