"""Write a classifier as `model.onnx`: one self-contained file with its preprocessing and its integers.

The same network always gives the same bytes: the file holds no names, dates, versions or source lines of the machine.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from stages.common.errors import UserError
from stages.export.packed_weights import with_dynamic_layers, with_integer_layers
from stages.networks.dynamic_int8 import dynamic_layers
from stages.networks.integer_weights import dequantized, integer_layers
from stages.networks.modules import replace_module
from stages.networks.pixel_stem import on_pixels, pixel_stem
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.export import Export

DEFAULT = Export()
INPUT, OUTPUT = "pixels", "logits"
LARGEST_FILE = 2**31 - 1  # bytes: protobuf's limit for one message


def export_onnx(
    classifier: Classifier, image_size: int, path: Path, export: Export = DEFAULT, metadata: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Write `classifier` to one file: `pixels` uint8 `[batch, H, W, C]` in, `logits` float32 `[batch, classes]` out.

    PyTorch's dynamic layers become MatMulInteger with the same int8 weights and scales; DynamicQuantizeLinear quantizes
    their inputs with one scale for the whole batch. Layers with integer weights keep their integers, as int8 or int4;
    where activations have grids too, QuantizeLinear and DequantizeLinear stand around them. The classifier is not
    changed.

    Args:
        image_size: side of the images that the file takes, in pixels.
        metadata: entries of the file's metadata.

    Returns:
        `opset` and `batch`; `quantized_operators`, the number of operators that compute on integers;
        `integer_weights`, the number of weights stored in each of ONNX's integer types.

    Raises:
        UserError: if the network does not fit into one ONNX file, or a packed layer is not exported as one operator.
    """
    if (size := sum(p.numel() * p.element_size() for p in classifier.parameters())) > LARGEST_FILE:
        problem = f"{size / 2**30:.1f} GiB of weights do not fit into one ONNX file"
        raise UserError(f"{path}: {problem}: choose a smaller model")
    with _quiet():
        model = _float_model(classifier, image_size, export)
        model, stored = with_dynamic_layers(model, dynamic_layers(classifier))
        stored |= with_integer_layers(model, integer_layers(classifier))
    _strip(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {"opset": export.opset, "batch": export.batch} | stored


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of exporter and quantizer; the code checks what matters of them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class _GlobalMean(nn.Module):
    """`AdaptiveAvgPool2d(1)`, which the exporter writes with as_strided for channels-last memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


class _Pointwise(nn.Module):
    """`Preprocess` whose normalization is a 1x1 convolution of each channel.

    Written as Mul and Add, ONNX Runtime would compute it on channels-last pixels in front of an integer stem, where
    broadcasting over channels takes a tenth of a small network's time.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.resize = preprocess.resize
        self.needed = bool((preprocess.scale != 1).any() or (preprocess.shift != 0).any())
        self.register_buffer("weight", preprocess.scale.view(-1, 1, 1, 1))
        self.register_buffer("bias", preprocess.shift.flatten())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).float()
        return self.resize(nn.functional.conv2d(x, self.weight, self.bias, groups=len(self.bias)) if self.needed else x)


def _float_model(classifier: Classifier, image_size: int, export: Export) -> onnx.ModelProto:
    """The graph of a float copy, in which packed layers are float layers with the dequantized weights."""
    twin = dequantized(classifier).cpu().eval()
    integers = integer_layers(classifier)
    stem = pixel_stem(twin, image_size)
    if stem and f"network.{stem[0]}" not in integers:
        twin = on_pixels(twin, image_size, *stem) or twin
    twin.preprocess = _Pointwise(twin.preprocess)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            replace_module(twin, name, _GlobalMean())
    dynamic = export.batch == "dynamic"
    shape = image_size, image_size, len(twin.preprocess.bias)
    pixels = torch.zeros(2 if dynamic else 1, *shape, dtype=torch.uint8)  # 1 would fix the axis
    keep_layers = any(isinstance(layer, nn.Conv2d) for layer in integers.values())
    try:
        with _unfolded_batch_norm() if keep_layers else nullcontext():
            program = torch.onnx.export(
                twin,
                (pixels,),
                dynamo=True,
                opset_version=export.opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic else None,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{type(classifier.network).__name__} cannot be exported to ONNX: {reason}") from None
    model = program.model_proto
    _strip(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove everything that depends on the machine or the exporter: stack traces, paths, versions."""
    model.producer_name, model.producer_version, model.doc_string, model.graph.doc_string = "edgewise", "", "", ""
    graph = model.graph
    graph.name = "classifier"
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


@contextmanager
def _unfolded_batch_norm() -> Iterator[None]:
    """Write batch norm in evaluation mode as a multiplication and an addition.

    The exporter would fold it into the layer before it, whose weight then is no longer integers times a scale. ONNX
    Runtime folds multiplication and addition when it opens the file.
    """

    def batch_norm(x, mean, variance, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        scale = torch.rsqrt(variance + eps) * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * scale.view(shape) + shift.view(shape)

    original = nn.functional.batch_norm
    nn.functional.batch_norm = batch_norm
    try:
        yield
    finally:
        nn.functional.batch_norm = original
