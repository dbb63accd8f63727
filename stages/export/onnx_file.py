"""`model.onnx` from a classifier: one self-contained file, pre-processing inside, int8 where the network is int8.

The same network always gives the same bytes: names, dates, versions and source lines of the machine are left out.
"""

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from stages.common.errors import UserError
from stages.networks.dynamic_int8 import dequantized, packed_layers, unpack_layer
from stages.networks.pointwise import replace_module
from stages.networks.preprocess import Classifier

OPSET = 20  # the first with Gelu as an operator
INPUT, OUTPUT = "pixels", "logits"
LARGEST_FILE = 2**31 - 1  # bytes: protobuf's limit for one message


def export_onnx(classifier: Classifier, image_size: int, path: Path) -> dict[str, Any]:
    """Write `classifier` to one file: `pixels` uint8 `[batch, H, W, 3]` in, `logits` float32 `[batch, classes]` out.

    Layers packed by `networks.dynamic_int8` become MatMulInteger on the very same int8 weights and scales, their inputs
    quantized on the fly by DynamicQuantizeLinear (one scale for the whole batch). The classifier is left as it is.

    Args:
        image_size: side in pixels of the images that the file takes; the batch axis is free.

    Returns:
        `opset` and `quantized_operators`, the number of MatMulInteger operators.

    Raises:
        UserError: if the network does not fit into one ONNX file, or a packed layer does not come out as one int8
            operator.
    """
    size = sum(p.numel() * p.element_size() for p in classifier.parameters())
    if size > LARGEST_FILE:
        raise UserError(
            f"{path}: {size / 2**30:.1f} GiB of weights do not fit into one ONNX file: choose a smaller model"
        )
    with _quiet():
        model = _float_model(classifier, image_size)
        layers = {name: unpack_layer(layer) for name, layer in packed_layers(classifier).items()}
        if layers:
            model = _with_int8_layers(model, layers)
    _strip(model)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return {"opset": OPSET, "quantized_operators": len(layers)}


class _GlobalMean(nn.Module):
    """`AdaptiveAvgPool2d(1)`: on channels-last memory the exporter spells that one out with as_strided."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


def _float_model(classifier: Classifier, image_size: int) -> onnx.ModelProto:
    """The float graph, from a copy; packed layers stand in it as the float layers that their integers mean."""
    twin = dequantized(classifier).cpu().eval()
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            replace_module(twin, name, _GlobalMean())
    try:
        program = _exported(twin, image_size)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{type(classifier.network).__name__} cannot be exported to ONNX: {reason}") from None
    model = program.model_proto
    _strip(model)
    return model


def _exported(twin: nn.Module, image_size: int) -> torch.onnx.ONNXProgram:
    return torch.onnx.export(
        twin,
        (torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8),),  # 2: the exporter fixes an axis of length 1
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


def _with_int8_layers(model: onnx.ModelProto, layers: dict[str, dict[str, torch.Tensor]]) -> onnx.ModelProto:
    """Let ONNX Runtime's quantizer turn exactly the packed layers into MatMulInteger, then set their own integers.

    The quantizer would round the weights anew; its integers are the same except where a channel's scale is at the
    observer's smallest, so the file's integers and scales are taken from the network in every case.
    """
    matrix_names = _isolate_matrices(model, layers)
    if lost := sorted(set(layers) - set(matrix_names.values())):
        raise UserError(
            f"{lost[0]}: this layer does not stand in the exported graph, so int8 cannot be exported: use fp32"
        )
    per_channel = any(len(tensors["weight_scale"]) > 1 for tensors in layers.values())
    model = _quantize(model, list(matrix_names), per_channel)

    operators = sum(node.op_type == "MatMulInteger" for node in model.graph.node)
    if operators != len(layers):
        raise UserError(
            f"{operators} int8 operators came out for {len(layers)} packed layers: use fp32 for this network"
        )
    written = {tensor.name: tensor for tensor in model.graph.initializer}
    for node, name in matrix_names.items():
        _overwrite(written[f"{node}.matrix_quantized"], layers[name]["weight"].numpy().T)
        _overwrite(written[f"{node}.matrix_scale"], layers[name]["weight_scale"].numpy())
        _overwrite(written[f"{node}.matrix_zero_point"], np.zeros(1, np.int8))
    return model


def _isolate_matrices(model: onnx.ModelProto, layers: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Bring each packed layer's operator to the form MatMul (and Add) with a weight of its own, in place.

    Operators are recognised by their weight's values, which no renaming or folding in the exporter changes.

    Returns:
        The layer of each MatMul, by node name; its weight is the initializer `<node>.matrix`, `[in, out]`.
    """
    layers_of: dict[bytes, list[str]] = {}
    for name, tensors in layers.items():
        matrix = (tensors["weight"].float() * tensors["weight_scale"][:, None]).numpy().T
        layers_of.setdefault(_key(matrix), []).append(name)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    found, nodes = {}, []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in initializers:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        matrix = numpy_helper.to_array(initializers[node.input[1]])
        matrix = matrix.T if attributes.get("transB") else matrix
        names = layers_of.get(_key(matrix))
        if not names:
            continue
        if attributes.get("transA") or attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1:
            raise UserError(f"{names[0]}: exported as a scaled or transposed Gemm, which has no int8 form: use fp32")
        name = names.pop(0) if len(names) > 1 else names[0]
        label = name if name not in found.values() else f"{name}.again"  # counted, and refused, as one too many
        found[label] = name
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"{label}.matrix"))
        bias, output = list(node.input[2:]), node.output[0]
        product = f"{output}_product" if bias else output
        nodes[-1] = onnx.helper.make_node("MatMul", [node.input[0], f"{label}.matrix"], [product], label)
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, bias[0]], [output], f"{label}.bias"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return found


def _quantize(model: onnx.ModelProto, nodes: list[str], per_channel: bool) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            model,
            path,
            ["MatMul"],
            per_channel,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            extra_options={"WeightSymmetric": True},
        )
        return onnx.load(path)


def _key(matrix: np.ndarray) -> bytes:
    return repr(matrix.shape).encode() + hashlib.sha256(np.ascontiguousarray(matrix)).digest()


def _overwrite(tensor: onnx.TensorProto, values: np.ndarray) -> None:
    """New values of the tensor's own type and shape; one value fills it."""
    own = numpy_helper.to_array(tensor)
    values = np.ascontiguousarray(np.broadcast_to(values if own.ndim else values.reshape(()), own.shape), own.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


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
def _quiet() -> Iterator[None]:
    """Neither the exporter's nor the quantizer's remarks: what matters is checked."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
