import numpy as np
import pytest
import torch
from torch import nn
from toy_network import tiny_network, tiny_spec

from stages.networks.integer_weights import Grid, dequantized, integer_layers
from stages.networks.predict import predict_logits
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.quantizers import Int8Static
from stages.quantization.int8 import int8_dynamic, int8_static

IMAGES = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """A ConvNeXt that sees 32 px."""
    return Classifier(Preprocess([0.5] * 3, [0.25] * 3, 32), tiny_network(tiny_spec())).eval()


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
def test_static_int8_stays_near_the_float_network(classifier, calibration):
    quantizer = Int8Static(method="int8_static", calibration=calibration)
    quantized, _, _, _ = int8_static(classifier, quantizer, IMAGES)
    expected, logits = predict_logits(classifier, IMAGES, 32), predict_logits(quantized, IMAGES, 32)
    assert np.abs(logits - expected).mean() < 0.1 * expected.std()
    assert not np.array_equal(logits, expected)


def test_linear_layers_have_input_grids_convolutions_both_and_depthwise_ones_stay_float(classifier):
    quantized, layers, kept, _ = int8_static(classifier, Int8Static(method="int8_static"), IMAGES)
    found = integer_layers(quantized.network)
    assert found.keys() == layers.keys()
    assert len(found) == 13  # the stem, 3 downsampling convolutions, 8 of MLPs and the head
    assert {(s.weight_bits, s.activation_bits, s.activations) for s in layers.values()} == {(8, 8, "static")}
    assert sorted(kept) == [f"stages.{i}.blocks.0.conv_dw" for i in range(4)]
    for layer in found.values():
        assert layer.input_scale is not None
        assert (layer.output_scale is None) == isinstance(layer, nn.Linear)


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_have_the_bits_that_were_asked_for_and_activations_eight(classifier, bits):
    quantized, layers, _, _ = int8_static(classifier, Int8Static(method="int8_static", weight_bits=bits), IMAGES)
    assert {(s.weight_bits, s.activation_bits) for s in layers.values()} == {(bits, 8)}
    largest = [int(layer.weight.abs().max()) for layer in integer_layers(quantized.network).values()]
    assert set(largest) <= {2 ** (bits - 1) - 1, 2 ** (bits - 1)}


class WithUnused(nn.Module):
    """An auxiliary layer that only training would run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.auxiliary, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x).relu().mean((2, 3)))


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "entropy"])
def test_a_layer_that_never_runs_stays_in_float_and_is_named(calibration):
    classifier = Classifier(Preprocess([0.5] * 3, [0.25] * 3, 32), WithUnused()).eval()
    quantizer = Int8Static(method="int8_static", calibration=calibration)
    quantized, layers, kept, stem = int8_static(classifier, quantizer, IMAGES)
    network = quantized.network
    assert kept == ["auxiliary"]
    assert layers.keys() == integer_layers(network).keys() == {"first", "head"}
    assert type(network.auxiliary) is nn.Linear
    assert stem == {"first": 1}


@pytest.mark.parametrize(("image_size", "stem"), [(32, {"stem.0": 1}), (16, {"stem.0": 2}), (8, {})])
def test_the_first_convolution_takes_stored_pixels_unrounded_where_it_has_as_many_weights(classifier, image_size, stem):
    images = IMAGES[:, :image_size, :image_size]
    quantized, _, _, found = int8_static(classifier, Int8Static(method="int8_static"), images)
    assert found == stem
    layer = integer_layers(quantized.network)["stem.0"]
    assert (Grid.of(layer, "input") == Grid(1.0, 0)) == bool(stem)
    counts = [sum(p.numel() for p in floated.parameters()) for floated in (dequantized(quantized), classifier)]
    assert counts[0] == counts[1]
    expected, logits = predict_logits(classifier, images, 32), predict_logits(quantized, images, 32)
    assert np.abs(logits - expected).mean() < 0.1 * expected.std()


def test_the_float_classifier_is_left_as_it_is(classifier):
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    int8_static(classifier, Int8Static(method="int8_static"), IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize("exclude", [["head.fc", "stem"], ["head.*", "stem.0"]])
def test_excluded_layers_stay_in_float(classifier, exclude):
    plain = int8_static(classifier, Int8Static(method="int8_static"), IMAGES)[1]
    quantizer = Int8Static(method="int8_static", exclude=exclude)
    quantized, layers, kept, stem = int8_static(classifier, quantizer, IMAGES)
    assert plain.keys() - layers.keys() == {"stem.0", "head.fc"}
    assert {"stem.0", "head.fc"} <= {*kept}
    assert stem == {}
    for name in ("stem.0", "head.fc"):
        float_layer = classifier.network.get_submodule(name)
        assert torch.equal(quantized.network.get_submodule(name).weight, float_layer.weight)


def test_excluded_layers_stay_in_float_with_dynamic_int8_also_where_they_become_linear(classifier):
    network = classifier.network
    plain, layers = int8_dynamic(network, True)[1], int8_dynamic(network, True, ["stages.1", "head"])[1]
    assert plain.keys() - layers.keys() == {name for name in plain if name.startswith(("stages.1.", "head."))}
    assert layers
