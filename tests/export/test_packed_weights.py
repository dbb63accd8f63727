import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from stages.common.errors import UserError
from stages.export.onnx_file import export_onnx
from stages.export.session import int8_overflows, open_session, session_logits
from stages.networks.integer_weights import KINDS, Grid, integer_layers, with_integers
from stages.networks.modules import replace_module
from stages.networks.predict import predict_logits
from stages.params.export import Export
from stages.params.quantizers import Int8Static
from stages.quantization.int8 import int8_static
from stages.quantization.rounding import round_nearest

NO_OVERFLOW = pytest.mark.skipif(int8_overflows(), reason="products of 8 bits overflow here")


def with_bits(network: nn.Module, bits: int, static: bool = False) -> nn.Module:
    """Round every layer; `static` adds grids that cover nearly all values and leaves grouped convolutions in float."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if type(layer) not in KINDS or (static and getattr(layer, "groups", 1) > 1):
            continue
        sides = ("input",) if isinstance(layer, nn.Linear) else ("input", "output")
        grids = dict.fromkeys(sides, Grid.over(-6, 6)) if static else {}
        rounded = round_nearest(layer.weight, bits)
        replace_module(network, name, with_integers(layer, rounded.integers, rounded.scale, bits, grids))
    return network


def run_by_onnxruntime(path: Path, tmp_path: Path) -> Counter:
    """Operators of the graph that ONNX Runtime runs after its optimization."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize(("bits", "conv_mlp"), [(2, True), (3, False), (4, False), (5, True), (8, False)])
def test_weights_of_few_bits_are_stored_as_integers_and_computed_as_float(
    tiny_network, classify, images, tmp_path, bits, conv_mlp
):
    classifier, path = classify(with_bits(tiny_network(conv_mlp), bits)), tmp_path / "model.onnx"
    result = export_onnx(classifier, 24, path)
    layers = integer_layers(classifier)
    assert len(layers) == 17
    assert result["integer_weights"] == {"int4" if bits <= 4 else "int8": 17}
    assert result["quantized_operators"] == 0
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, layer in layers.items():
        values = numpy_helper.to_array(stored[f"{name}.integers"]).astype(np.int8)
        matrix = values.T if values.shape != layer.weight.shape or isinstance(layer, nn.Linear) else values
        assert np.array_equal(matrix, layer.weight.numpy())
        stored_bits = 8 * len(stored[f"{name}.integers"].raw_data)
        assert stored_bits == values.size * (4 if bits <= 4 else 8)
    expected = predict_logits(classifier, images, 20)
    np.testing.assert_allclose(session_logits(open_session(path, 1), images, 20), expected, rtol=1e-4, atol=1e-4)
    ran = run_by_onnxruntime(path, tmp_path)
    assert ran["DequantizeLinear"] == 0
    assert ran["Cast"] == 1  # of the pixels


@pytest.mark.parametrize(
    ("bits", "conv_mlp", "batch"),
    [(7, True, "dynamic"), (7, False, 1), pytest.param(8, False, "dynamic", marks=NO_OVERFLOW)],
)
def test_static_layers_run_on_integers_and_agree_with_pytorch(
    tiny_network, classify, images, tmp_path, bits, conv_mlp, batch
):
    classifier, path = classify(with_bits(tiny_network(conv_mlp), bits, static=True)), tmp_path / "model.onnx"
    result = export_onnx(classifier, 24, path, Export(batch=batch))
    assert result["quantized_operators"] == 13
    assert result["integer_weights"] == {"int8": 13}
    expected, logits = predict_logits(classifier, images, 20), session_logits(open_session(path, 1), images, 20)
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()  # a value between two steps may fall to either
    ran = run_by_onnxruntime(path, tmp_path)
    assert ran["QLinearConv"] + ran["MatMulIntegerToFloat"] + ran["QGemm"] == 13
    assert ran["Conv"] == 4 + 1  # the depthwise ones, and the normalisation
    assert ran["MatMul"] == ran["Gemm"] == 0
    if not conv_mlp:
        assert ran["QGemm"] == 9  # with their biases: what is added is the residual stream
        assert ran["Add"] == 4
        assert ran["Reshape"] == 2 * 4 + 1  # into and out of each MLP, whose GELU stays on rows; before the head


def test_the_bias_of_a_channel_of_next_to_no_weights_is_kept(classify, images, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)).eval()
    with torch.no_grad():
        network[0].weight[:2], network[0].bias[:2] = 1e-12, torch.tensor([0.5, 4.0])
        network[3].weight[0], network[3].bias[0] = 1e-13, 0.7
    quantized, *_ = int8_static(classify(network), Int8Static(method="int8_static", weight_bits=7), images)
    export_onnx(quantized, 24, tmp_path / "model.onnx", Export())
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 20)
    expected = predict_logits(classify(network), images, 20)
    assert np.abs(logits - expected).max() < 0.05 * expected.std()


def test_static_layers_with_axes_of_unknown_length_stay_products(classify, images, tmp_path):
    class Places(nn.Module):
        """Has the batch axis behind a fixed one, so that no Reshape could restore it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(32, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.permute(1, 0, 2, 3))  # [3, batch, 32, 32]
            return self.head(y.permute(1, 0, 2, 3).mean((1, 2)))

    torch.manual_seed(0)
    classifier, path = classify(with_bits(Places().eval(), 7, static=True)), tmp_path / "model.onnx"
    export_onnx(classifier, 24, path)
    expected, logits = predict_logits(classifier, images, 20), session_logits(open_session(path, 1), images, 20)
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()
    ran = run_by_onnxruntime(path, tmp_path)
    assert (ran["MatMulIntegerToFloat"], ran["QGemm"]) == (1, 1)


@pytest.mark.parametrize(("image_size", "padded"), [(32, 0), (16, 1)])
def test_a_stem_on_stored_pixels_takes_them_as_integers(tiny_network, classify, images, tmp_path, image_size, padded):
    images, path = np.resize(images, (60, image_size, image_size, 3)), tmp_path / "model.onnx"
    quantizer = Int8Static(method="int8_static", weight_bits=7)
    classifier, _, _, stem = int8_static(classify(tiny_network(False)), quantizer, images)
    assert stem
    export_onnx(classifier, image_size, path)
    ran = run_by_onnxruntime(path, tmp_path)
    assert (ran["Cast"], ran["Resize"], ran["Pad"], ran["QLinearConv"]) == (0, 0, padded, 4)
    expected, logits = predict_logits(classifier, images, 20), session_logits(open_session(path, 1), images, 20)
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()


@pytest.mark.parametrize("static", [False, True])
def test_layers_before_a_batch_norm_keep_their_integers(classify, images, tmp_path, static):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 8, 3, padding=1, bias=False)]
    norms = [nn.BatchNorm2d(16), nn.BatchNorm2d(8)]
    for norm in norms:
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.normal_()
    pairs = [layer for pair in zip(convolutions, norms, strict=True) for layer in (*pair, nn.ReLU())]
    network = nn.Sequential(*pairs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    classifier = classify(with_bits(network, 7 if static else 8, static))
    result = export_onnx(classifier, 24, tmp_path / "model.onnx")
    assert sum(result["integer_weights"].values()) == len(integer_layers(classifier))
    expected = predict_logits(classifier, images, 20)
    logits = session_logits(open_session(tmp_path / "model.onnx", 1), images, 20)
    assert np.abs(logits - expected).mean() < (0.1 if static else 1e-4) * expected.std()


def test_a_layer_that_is_used_twice_is_refused(classify, tmp_path):
    layer = nn.Linear(8, 8)
    network = nn.Sequential(nn.Flatten(1), nn.Linear(3 * 32 * 32, 8), layer, nn.ReLU(), layer).eval()
    rounded = round_nearest(layer.weight, 4)
    network[2] = network[4] = with_integers(layer, rounded.integers, rounded.scale, 4)
    with pytest.raises(UserError, match=r"network\.2: .*twice"):
        export_onnx(classify(network), 24, tmp_path / "model.onnx")
