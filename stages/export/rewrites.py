"""Rewrite an exported graph so that ONNX Runtime runs it faster on integers; the result stays the same."""

from collections import Counter
from collections.abc import Container

import numpy as np
import onnx
from onnx import helper, numpy_helper

ELEMENTWISE = ("Gelu", "Relu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Softplus", "Mish")
"""Elementwise operators with one input."""


def as_gemms(model: onnx.ModelProto, names: Container[str]) -> None:
    """Fuse each MatMul of these names and the Add of its bias into one Gemm on rows, in place.

    ONNX Runtime's integer Gemm adds the bias itself; after an integer MatMul the bias is a separate operator. With a
    fixed batch axis, ONNX Runtime would fuse both into a float Gemm before it looks for integers. A layer is not
    changed if the length of an axis other than the first is unknown.
    """
    shapes, uses = _shapes(model), _uses(model)
    adds = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
    biases = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    nodes, gone = [], []
    for node in model.graph.node:
        product = node.output[0]
        add, places = adds.get(product), shapes.get(product, [])[1:-1]
        bias = [name for name in add.input if name in biases] if add else []
        fits = node.op_type == "MatMul" and node.name in names and uses[product] == 1 and 0 not in places
        if not fits or add is None or not bias:
            nodes.append(node)
            continue
        gone.append(add)
        x, rows, result = node.input[0], f"{node.name}.rows", f"{node.name}.result"
        features, outputs = shapes[node.input[1]]
        if not places:
            nodes.append(helper.make_node("Gemm", [x, node.input[1], *bias], add.output, node.name))
            continue
        nodes += [
            _reshape(model, x, rows, [-1, features]),
            helper.make_node("Gemm", [rows, node.input[1], *bias], [result], node.name),
            _reshape(model, result, add.output[0], [-1, *places, outputs]),
        ]
    set_nodes(model, [node for node in nodes if not any(node is add for add in gone)])
    _stay_on_rows(model)


def pass_pixels_on(model: onnx.ModelProto) -> None:
    """Pass stored pixels to an integer layer without the conversion to float and back, in place.

    This applies if the pixels are at most padded before they are quantized with scale 1 and zero point 0.
    """
    made, uses = {node.output[0]: node for node in model.graph.node}, _uses(model)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for quantize in [node for node in model.graph.node if node.op_type == "QuantizeLinear"]:
        scale, zero_point = (numpy_helper.to_array(values[name]) for name in quantize.input[1:])
        if zero_point.dtype != np.uint8 or scale != 1 or zero_point != 0:
            continue
        source = made.get(quantize.input[0])
        pad = source if source is not None and source.op_type == "Pad" and len(source.input) == 2 else None
        cast = made.get(pad.input[0]) if pad else source
        if cast is None or cast.op_type != "Cast" or any(uses[n.output[0]] != 1 for n in (pad, cast) if n):
            continue
        if not _is_pixels(model, made, cast.input[0]):
            continue
        integers = pad.output[0] if pad else cast.input[0]
        if pad:
            pad.input[0] = cast.input[0]
        for node in model.graph.node:
            node.input[:] = [integers if name == quantize.output[0] else name for name in node.input]
        set_nodes(model, [node for node in model.graph.node if node is not quantize and node is not cast])
        return


def set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    """Set the graph's nodes and remove the initializers that no node reads."""
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _stay_on_rows(model: onnx.ModelProto) -> None:
    """Remove the two Reshapes around an elementwise operator between two layers on rows, in place."""
    made, uses = {node.output[0]: node for node in model.graph.node}, _uses(model)
    reshapes = {node.input[0]: node for node in model.graph.node if node.op_type == "Reshape"}
    gone, renamed = [], {}
    for node in model.graph.node:
        if node.op_type not in ELEMENTWISE:
            continue
        before, after = made.get(node.input[0]), reshapes.get(node.output[0])
        if before is None or before.op_type != "Reshape" or after is None:
            continue
        if uses[before.output[0]] != 1 or uses[after.input[0]] != 1 or made[before.input[0]].op_type != "Gemm":
            continue
        gone += [before, after]
        node.input[0] = before.input[0]
        renamed[after.output[0]] = node.output[0]
    nodes = [node for node in model.graph.node if not any(node is reshape for reshape in gone)]
    for node in nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    set_nodes(model, nodes)


def _reshape(model: onnx.ModelProto, source: str, target: str, shape: list[int]) -> onnx.NodeProto:
    name = f"{target}.shape"
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return helper.make_node("Reshape", [source, name], [target], f"{target}.reshape")


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """The shape of each tensor that has one, with 0 for an axis of unknown length."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    return shapes | {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


def _uses(model: onnx.ModelProto) -> Counter[str]:
    """The number of readers of each tensor, including the graph's outputs."""
    uses = Counter(name for node in model.graph.node for name in node.input)
    return uses + Counter(output.name for output in model.graph.output)


def _is_pixels(model: onnx.ModelProto, made: dict[str, onnx.NodeProto], name: str) -> bool:
    """True if a tensor is the graph's uint8 input or a transposition of it."""
    node = made.get(name)
    if node is not None and node.op_type == "Transpose":
        name = node.input[0]
    pixels = model.graph.input[0]
    return name == pixels.name and pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
