"""Store the integers of packed layers in an exported float graph, in place of the dequantized weights.

The values of a weight identify its layer in the graph: the exporter renames tensors but does not change values.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from stages.common.errors import UserError
from stages.export.rewrites import as_gemms, pass_pixels_on, set_nodes
from stages.networks.dynamic_int8 import unpack_layer
from stages.networks.integer_weights import Grid

Around = tuple[list[onnx.NodeProto], list[onnx.NodeProto]]  # nodes to insert before and after an operator
Stored = dict[str, object]  # `quantized_operators` and `integer_weights` as `export_onnx` returns them
OPERATORS = ("MatMul", "Gemm", "Conv")
USE_FLOAT = "use the quantizer fp32 for this network"
INT4_BITS = 4  # integers of at most this many bits are stored as ONNX's int4, others as int8


@dataclass(frozen=True)
class Found:
    """A layer's isolated operator, with its name; no other node reads its weight, the initializer `<name>.matrix`."""

    name: str
    transposed: bool  # true if the weight is `[in, out]` (MatMul), False if it is `[out, in, ...]` (Conv)

    @property
    def weight(self) -> str:
        return f"{self.name}.matrix"

    def of(self, values: torch.Tensor) -> np.ndarray:
        """A weight in the layer's layout, converted to the graph's layout."""
        return np.ascontiguousarray(values.cpu().numpy().T if self.transposed else values.cpu().numpy())


def with_dynamic_layers(model: onnx.ModelProto, layers: dict[str, nn.Module]) -> tuple[onnx.ModelProto, Stored]:
    """Let ONNX Runtime's quantizer turn exactly these layers into MatMulInteger, then set the layers' integers.

    The quantizer rounds the weights again. Its integers are the same unless a channel's scale is the observer's
    smallest, so the file always gets integers and scales from the network.
    """
    if not layers:
        return model, {"quantized_operators": 0, "integer_weights": {}}
    tensors = {name: unpack_layer(layer) for name, layer in layers.items()}
    found = _isolate(model, {name: t["weight"].float() * t["weight_scale"][:, None] for name, t in tensors.items()})
    per_channel = any(len(t["weight_scale"]) > 1 for t in tensors.values())
    model = _quantize(model, [one.name for one in found], per_channel)

    operators = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if operators != len(layers):
        raise UserError(f"the export has {operators} int8 operators for {len(layers)} packed layers: {USE_FLOAT}")
    written = {tensor.name: tensor for tensor in model.graph.initializer}
    for one in found:
        _overwrite(written[f"{one.weight}_quantized"], one.of(tensors[one.name]["weight"]))
        _overwrite(written[f"{one.weight}_scale"], tensors[one.name]["weight_scale"].numpy())
        _overwrite(written[f"{one.weight}_zero_point"], np.zeros(1, np.int8))
    return model, {"quantized_operators": operators, "integer_weights": {"int8": operators}}


def with_integer_layers(model: onnx.ModelProto, layers: dict[str, nn.Module]) -> Stored:
    """Store these layers' integers in the graph, in place; the result is empty without layers.

    Without grids the operator computes in float on `Cast(integers) * scale`. ONNX Runtime folds that when it opens the
    file, so the file is small and as fast as float; a DequantizeLinear would run in every call. With grids,
    QuantizeLinear and DequantizeLinear stand around the operator, which ONNX Runtime then runs on integers.
    """
    if not layers:
        return {}
    stored: Counter[str] = Counter()
    around: dict[str, Around] = {}
    gemms = {name for name, layer in layers.items() if layer.input_scale is not None}
    found = _isolate(model, {name: layer.float_weight() for name, layer in layers.items()}, gemms)
    as_gemms(model, gemms)
    for one in found:
        layer = layers[one.name]
        static = layer.input_scale is not None
        kind = onnx.TensorProto.INT4 if layer.bits <= INT4_BITS and not static else onnx.TensorProto.INT8
        stored[onnx.TensorProto.DataType.Name(kind).lower()] += 1
        around[one.name] = _static(model, one, layer) if static else _weight_only(model, one, layer, kind)
    nodes = []
    for node in model.graph.node:
        before, after = around.get(node.name, ([], []))
        nodes += [*before, node, *after]
    set_nodes(model, nodes)
    pass_pixels_on(model)
    return {"quantized_operators": len(gemms), "integer_weights": dict(sorted(stored.items()))}


def _weight_only(model: onnx.ModelProto, one: Found, layer: nn.Module, kind: int) -> Around:
    scale = layer.weight_scale.cpu().numpy()
    scale = scale if one.transposed else scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    integers, cast = f"{one.name}.integers", f"{one.name}.cast"
    values = one.of(layer.weight).astype(helper.tensor_dtype_to_np_dtype(kind))
    _replace(model, one.weight, numpy_helper.from_array(values, integers), _floats(f"{one.name}.scale", scale))
    before = [
        helper.make_node("Cast", [integers], [cast], f"{one.name}.cast", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [cast, f"{one.name}.scale"], [one.weight], f"{one.name}.dequantize"),
    ]
    return before, []


def _static(model: onnx.ModelProto, one: Found, layer: nn.Module) -> Around:
    node = next(node for node in model.graph.node if node.name == one.name)
    scale = layer.weight_scale.cpu().numpy()
    _replace(model, one.weight)
    weight = numpy_helper.from_array(one.of(layer.weight))
    outputs = 1 if one.transposed else 0
    before = [_dequantized(model, one.name, "weight", weight, scale, one.weight, outputs)]
    source, node.input[0] = node.input[0], f"{one.name}.input"
    before += _on_grid(model, one.name, "input", source, node.input[0], Grid.of(layer, "input"))
    after = []
    if layer.output_scale is not None:
        product, node.output[0] = node.output[0], f"{one.name}.product"
        after = _on_grid(model, one.name, "output", node.output[0], product, Grid.of(layer, "output"))
    if len(node.input) > 2:  # on the accumulator's grid: ONNX Runtime fuses no other
        bias_scale = scale * layer.input_scale.item()
        bias = np.round(layer.bias.detach().cpu().double().numpy() / bias_scale)
        node.input[2] = f"{one.name}.bias_float"
        integers = numpy_helper.from_array(bias.astype(np.int32))
        before.append(_dequantized(model, one.name, "bias", integers, bias_scale, node.input[2], axis=0))
    return before, after


def _dequantized(
    model: onnx.ModelProto, node: str, part: str, integers: onnx.TensorProto, scale: np.ndarray, target: str, axis: int
) -> onnx.NodeProto:
    """DequantizeLinear from new initializers to `target`; ONNX Runtime makes a QGemm only with zero points."""
    names = [f"{node}.{part}_{kind}" for kind in ("integers", "scale", "zero_point")]
    integers.name = names[0]
    zero_point = np.zeros(len(scale), numpy_helper.to_array(integers).dtype)
    model.graph.initializer.extend([integers, _floats(names[1], scale), numpy_helper.from_array(zero_point, names[2])])
    return helper.make_node("DequantizeLinear", names, [target], f"{node}.{part}_dequantize", axis=axis)


def _on_grid(
    model: onnx.ModelProto, node: str, side: str, source: str, target: str, grid: Grid
) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear from the tensor `source` to `target`."""
    scale, zero_point, integers = (f"{node}.{side}_{part}" for part in ("scale", "zero_point", "integers"))
    model.graph.initializer.append(_floats(scale, np.array(grid.scale)))
    model.graph.initializer.append(numpy_helper.from_array(np.array(grid.zero_point, np.uint8), zero_point))
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [integers], f"{node}.{side}_quantize"),
        helper.make_node("DequantizeLinear", [integers, scale, zero_point], [target], f"{node}.{side}_dequantize"),
    ]


def _isolate(model: onnx.ModelProto, weights: dict[str, torch.Tensor], gemms: Container[str] = ()) -> list[Found]:
    """Turn each layer's operator into MatMul (and Add) or Conv with a weight of its own, in place.

    The layers `gemms` may stay a Gemm. Raises a `UserError` if a layer is not in the graph, or is used more than once.
    """
    layers_of: dict[bytes, list[str]] = {}
    for name, weight in weights.items():
        layers_of.setdefault(_key(weight.detach().cpu().numpy()), []).append(name)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found: list[Found] = []
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type not in OPERATORS or node.input[1] not in initializers:
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = numpy_helper.to_array(initializers[node.input[1]])
        as_layer = weight if node.op_type == "Conv" or attributes.get("transB") else weight.T
        names = layers_of.get(_key(as_layer))
        if not names:
            continue
        if attributes.get("transA") or attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1:
            problem = "the export is a scaled or transposed Gemm, which has no integer form"
            raise UserError(f"{names[0]}: {problem}: {USE_FLOAT}")
        name = names.pop(0) if len(names) > 1 else names[0]
        if any(one.name == name for one in found):
            raise UserError(f"{name}: the graph uses this layer twice, which has no integer form: {USE_FLOAT}")
        one = Found(name, node.op_type != "Conv")
        found.append(one)
        model.graph.initializer.append(_floats(one.weight, as_layer.T if one.transposed else weight))
        if node.op_type == "Conv":
            node.name, node.input[1] = one.name, one.weight
            continue
        if node.op_type == "Gemm" and name in gemms:
            nodes[-1] = helper.make_node("Gemm", [node.input[0], one.weight, *node.input[2:]], node.output, one.name)
            continue
        bias, output = list(node.input[2:]), node.output[0]
        product = f"{output}_product" if bias else output
        nodes[-1] = helper.make_node("MatMul", [node.input[0], one.weight], [product], one.name)
        if bias:
            nodes.append(helper.make_node("Add", [product, bias[0]], [output], f"{one.name}.bias"))
    if lost := sorted(set(weights) - {one.name for one in found}):
        raise UserError(f"{lost[0]}: the graph does not hold this layer, so its integers cannot be stored: {USE_FLOAT}")
    set_nodes(model, nodes)
    return found


def _quantize(model: onnx.ModelProto, nodes: list[str], per_channel: bool) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        options = {"nodes_to_quantize": nodes, "extra_options": {"WeightSymmetric": True}}
        quantize_dynamic(model, path, ["MatMul"], per_channel, weight_type=QuantType.QInt8, **options)
        return onnx.load(path)


def _key(weight: np.ndarray) -> bytes:
    return repr(weight.shape).encode() + hashlib.sha256(np.ascontiguousarray(weight).data).digest()


def _floats(name: str, values: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float32, order="C"), name)


def _replace(model: onnx.ModelProto, name: str, *tensors: onnx.TensorProto) -> None:
    """Replace the initializer `name` by others."""
    position = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == name)
    del model.graph.initializer[position]
    model.graph.initializer.extend(tensors)


def _overwrite(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    """Set the tensor's values and keep its type and shape; one value fills it."""
    own = numpy_helper.to_array(tensor)
    values = np.ascontiguousarray(np.broadcast_to(values if own.ndim else values.reshape(()), own.shape), own.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
