"""`model.onnx` from a classifier: one self-contained file, pre-processing inside, integers where the network has them.

The same network always gives the same bytes: names, dates, versions and source lines of the machine are left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from stages.common.errors import UserError
from stages.export.packed_weights import with_dynamic_layers, with_integer_layers
from stages.export.quiet import quiet
from stages.networks.dynamic_int8 import dynamic_layers
from stages.networks.integer_weights import integer_layers
from stages.networks.packed import dequantized
from stages.networks.pixel_stem import on_pixels, pixel_stem
from stages.networks.pointwise import replace_module
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.export import Export

DEFAULT = Export()
INPUT, OUTPUT = "pixels", "logits"
LARGEST_FILE = 2**31 - 1  # bytes: protobuf's limit for one message


def export_onnx(classifier: Classifier, image_size: int, path: Path, export: Export = DEFAULT) -> dict[str, Any]:
    """Write `classifier` to one file: `pixels` uint8 `[batch, H, W, 3]` in, `logits` float32 `[batch, classes]` out.

    PyTorch's dynamic layers become MatMulInteger on the very same int8 weights and scales, their inputs quantized on
    the fly by DynamicQuantizeLinear (one scale for the whole batch). Layers with integer weights keep their integers,
    as int8 or int4; where activations have grids too, QuantizeLinear and DequantizeLinear stand around them. The
    classifier is left as it is.

    Args:
        image_size: side in pixels of the images that the file takes.
        export: the opset, and whether the batch axis is free.

    Returns:
        `opset` and `batch`; `quantized_operators`, the operators that compute on integers; `integer_weights`, how many
        weights are stored as which of ONNX's integer types.

    Raises:
        UserError: if the network does not fit into one ONNX file, or a packed layer does not come out as one operator.
    """
    size = sum(p.numel() * p.element_size() for p in classifier.parameters())
    if size > LARGEST_FILE:
        raise UserError(
            f"{path}: {size / 2**30:.1f} GiB of weights do not fit into one ONNX file: choose a smaller model"
        )
    with quiet():
        model = _float_model(classifier, image_size, export)
        model, stored = with_dynamic_layers(model, dynamic_layers(classifier))
        stored |= with_integer_layers(model, integer_layers(classifier))
    _strip(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {"opset": export.opset, "batch": export.batch} | stored


class _GlobalMean(nn.Module):
    """`AdaptiveAvgPool2d(1)`: on channels-last memory the exporter spells that one out with as_strided."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


class _Pointwise(nn.Module):
    """`Preprocess` whose normalisation is a 1x1 convolution of each channel.

    As Mul and Add, ONNX Runtime computes it on channels-last pixels in front of an integer stem, and broadcasting over
    three values is slow there: a tenth of a small network's time.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.resize = preprocess.resize
        self.needed = bool((preprocess.scale != 1).any() or (preprocess.shift != 0).any())
        self.register_buffer("weight", preprocess.scale.view(3, 1, 1, 1))
        self.register_buffer("bias", preprocess.shift.flatten())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).float()
        return self.resize(nn.functional.conv2d(x, self.weight, self.bias, groups=3) if self.needed else x)


def _float_model(classifier: Classifier, image_size: int, export: Export) -> onnx.ModelProto:
    """The float graph, from a copy; packed layers stand in it as the float layers that their integers mean."""
    twin = dequantized(classifier).cpu().eval()
    stem = pixel_stem(twin, image_size)
    if stem and f"network.{stem[0]}" not in integer_layers(classifier):
        twin = on_pixels(twin, image_size, *stem) or twin
    twin.preprocess = _Pointwise(twin.preprocess)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            replace_module(twin, name, _GlobalMean())
    keep_layers = any(isinstance(layer, nn.Conv2d) for layer in integer_layers(classifier).values())
    try:
        with _unfolded_batch_norm() if keep_layers else nullcontext():
            program = _exported(twin, image_size, export)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{type(classifier.network).__name__} cannot be exported to ONNX: {reason}") from None
    model = program.model_proto
    _strip(model)
    return model


def _exported(twin: nn.Module, image_size: int, export: Export) -> torch.onnx.ONNXProgram:
    dynamic = export.batch == "dynamic"
    pixels = torch.zeros(2 if dynamic else 1, image_size, image_size, 3, dtype=torch.uint8)  # 1 would fix the axis
    return torch.onnx.export(
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


def _strip(model: onnx.ModelProto) -> None:
    """Take out what tells of the machine and of the exporter's inner life: stack traces, paths, versions."""
    model.producer_name, model.producer_version, model.doc_string, model.graph.doc_string = "edgewise", "", "", ""
    graph = model.graph
    graph.name = "classifier"
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


@contextmanager
def _unfolded_batch_norm() -> Iterator[None]:
    """Batch norm in evaluation as a multiplication and an addition, which the exporter does not fold into the layer
    before it: a folded weight is no longer integers times a scale. ONNX Runtime folds them when it opens the file."""

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
