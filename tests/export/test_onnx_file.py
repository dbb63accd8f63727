from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from stages.common.errors import UserError
from stages.export import onnx_file
from stages.export.onnx_file import export_onnx
from stages.export.session import int8_overflows, open_session, session_logits
from stages.networks.dynamic_int8 import dynamic_layers, quantize_linears, unpack_layer
from stages.networks.modules import replace_module
from stages.networks.norms import FixedDivisorLayerNorm
from stages.networks.predict import predict_logits
from stages.networks.reparameterize import pointwise_to_linear
from stages.params.export import Export


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def packed(network, per_channel=True):
    pointwise_to_linear(network)
    return quantize_linears(network, per_channel)


class Stem(nn.Module):
    """Norms so wide that the exporter might not fold the pads of their weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 700, 8, 8), nn.Linear(700, 10)
        self.norms = nn.Sequential(FixedDivisorLayerNorm(700, 768, 1e-6, True), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.last = FixedDivisorLayerNorm(700, 768, 1e-6, False)

    def forward(self, x):
        return self.head(self.last(self.norms(self.conv(x))))


def test_the_file_gives_the_logits_of_pytorch_for_every_batch_size(float_export, images):
    classifier, path, _ = float_export
    session = open_session(path, 1)
    expected = predict_logits(classifier, images, 60)
    assert expected.std() > 0.1
    for batch_size in (1, 7, 60):
        np.testing.assert_allclose(session_logits(session, images, batch_size), expected, rtol=1e-4, atol=1e-4)


def test_convolutional_mlps_stay_convolutions(tiny_network, classify, images, tmp_path):
    classifier = classify(tiny_network(True))
    export_onnx(classifier, 24, tmp_path / "model.onnx")
    assert operators(tmp_path / "model.onnx")["Conv"] == 16 + 1  # the normalization
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 16)
    np.testing.assert_allclose(logits, predict_logits(classifier, images, 16), rtol=1e-4, atol=1e-4)


def test_layer_norm_and_gelu_stay_fused_and_pooling_and_normalization_are_one_operator_each(float_export):
    found = operators(float_export[1])
    assert [node.op_type for node in onnx.load(float_export[1]).graph.node][:3] == ["Transpose", "Cast", "Conv"]
    assert (found["LayerNormalization"], found["Gelu"], found["ReduceMean"]) == (9, 4, 1)
    assert not found.keys() & {"Erf", "Sqrt", "Pow", "Gather", "Range", "Expand"}


def test_a_fixed_divisor_layer_norm_is_a_fused_operator_between_pad_and_slice(classify, images, tmp_path):
    torch.manual_seed(0)
    network = Stem().eval()
    for module in network.modules():
        if isinstance(module, FixedDivisorLayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    classifier = classify(network)
    export_onnx(classifier, 24, tmp_path / "model.onnx")
    found = operators(tmp_path / "model.onnx")
    assert (found["Pad"], found["LayerNormalization"], found["Slice"], found["ReduceMean"]) == (2, 2, 2, 1)
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 8)
    np.testing.assert_allclose(logits, predict_logits(classifier, images, 8), rtol=1e-4, atol=1e-4)


def test_the_interface_is_uint8_pixels_with_a_free_batch_axis_and_float_logits(float_export):
    _, path, result = float_export
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels, logits = session.get_inputs()[0], session.get_outputs()[0]
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", 24, 24, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    assert result == {"opset": 21, "batch": "dynamic", "quantized_operators": 0, "integer_weights": {}}
    assert onnx.load(path).opset_import[0].version == 21


def test_opset_and_batch_axis_are_those_of_the_params(tiny_network, classify, images, tmp_path):
    classifier, path = classify(tiny_network(False)), tmp_path / "model.onnx"
    result = export_onnx(classifier, 24, path, Export(opset=23, batch=1))
    assert (result["opset"], result["batch"]) == (23, 1)
    assert onnx.load(path).opset_import[0].version == 23
    session = open_session(path, 1)
    assert session.get_inputs()[0].shape == [1, 24, 24, 3]
    logits = session_logits(session, images, 16)  # one image at a time, whatever was asked for
    np.testing.assert_allclose(logits, predict_logits(classifier, images, 60), rtol=1e-4, atol=1e-4)


def test_a_stem_that_can_take_stored_pixels_scales_and_normalises_them_itself(tiny_network, classify, images, tmp_path):
    classifier, small = classify(tiny_network(False)), images[:, :16, :16]
    export_onnx(classifier, 16, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.op_type for node in nodes][:4] == ["Transpose", "Cast", "Pad", "Conv"]
    assert operators(tmp_path / "model.onnx")["Resize"] == 0
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), small, 16)
    np.testing.assert_allclose(logits, predict_logits(classifier, small, 60), rtol=1e-4, atol=1e-4)


def test_the_same_network_gives_the_same_bytes_which_hold_nothing_of_the_machine(
    float_export, tiny_network, classify, tmp_path
):
    export_onnx(classify(tiny_network(False)), 24, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert content == float_export[1].read_bytes()
    for name in ("first.onnx", "second.onnx"):
        export_onnx(classify(packed(perceptron(2))), 24, tmp_path / name)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    for word in (b"/site-packages", b".py", b"stack_trace", torch.__version__.encode(), b"stages.networks"):
        assert word not in content
    assert all(path.suffix == ".onnx" for path in tmp_path.iterdir())  # no external data


@pytest.mark.parametrize(("conv_mlp", "per_channel"), [(True, False), (False, True)])
def test_the_file_holds_exactly_the_packed_integers_and_scales_and_gives_pytorchs_logits(
    tiny_network, classify, images, tmp_path, conv_mlp, per_channel
):
    classifier = classify(packed(tiny_network(conv_mlp), per_channel))
    result = export_onnx(classifier, 24, tmp_path / "model.onnx")
    layers = dynamic_layers(classifier)
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    multiplications = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(multiplications) == len(layers) == result["quantized_operators"] == 9
    assert not any(node.op_type in ("MatMul", "Gemm") for node in graph.node)

    for name, layer in layers.items():
        tensors = unpack_layer(layer)
        node = next(node for node in multiplications if node.input[1] == f"{name}.matrix_quantized")
        assert np.array_equal(stored[node.input[1]], tensors["weight"].numpy().T)
        assert stored[node.input[1]].dtype == np.int8
        assert np.array_equal(np.unique(stored[f"{name}.matrix_scale"]), np.unique(tensors["weight_scale"].numpy()))
        assert not stored[node.input[3]].any()
    if not int8_overflows():  # products of 8 bits would overflow
        logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 1)
        expected = predict_logits(classifier, images, 1)
        assert np.abs(logits - expected).max() < 0.1 * expected.std()


def perceptron(layers=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(1), nn.Linear(3 * 32 * 32, 8), *[nn.Linear(8, 8) for _ in range(layers - 1)]).eval()


def test_integers_are_kept_where_a_channel_is_smaller_than_the_smallest_scale(classify, tmp_path):
    network = perceptron()
    with torch.no_grad():
        network[1].weight[3] *= 1e-4  # its integers stay far from 127; the quantizer alone would stretch them
        network[1].weight[4] = 0
    classifier = classify(packed(network))
    weight = unpack_layer(dynamic_layers(classifier)["network.1"])["weight"].numpy()
    assert 0 < np.abs(weight[3]).max() < 127
    export_onnx(classifier, 24, tmp_path / "model.onnx")
    stored = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert np.array_equal(numpy_helper.to_array(stored["network.1.matrix_quantized"]), weight.T)


def test_layers_with_equal_weights_are_each_quantized(classify, tmp_path):
    network = perceptron(3)
    network[3].load_state_dict(network[2].state_dict())
    result = export_onnx(classify(packed(network)), 24, tmp_path / "model.onnx")
    assert result["quantized_operators"] == operators(tmp_path / "model.onnx")["MatMulInteger"] == 3


def test_a_packed_layer_that_is_used_twice_is_refused(classify, tmp_path):
    network = packed(perceptron(3))
    replace_module(network, "3", network[2])
    with pytest.raises(UserError, match=r"network\.2: .*twice"):
        export_onnx(classify(network), 24, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_network_beyond_the_limit_of_one_file_is_refused(classify, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 10_000)
    with pytest.raises(UserError, match="do not fit into one ONNX file"):
        export_onnx(classify(perceptron()), 24, tmp_path / "model.onnx")


def test_exporting_is_silent_and_leaves_the_classifier_as_it_was(classify, tmp_path, capfd):
    classifier = classify(packed(perceptron(2))).train()
    before = {name: type(module) for name, module in classifier.named_modules()}
    capfd.readouterr()
    export_onnx(classifier, 24, tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert {name: type(module) for name, module in classifier.named_modules()} == before
    assert classifier.training
