"""Where the bytes of `model.onnx` go: trained numbers, what scales integers back to them, and the graph."""

from dataclasses import dataclass
from pathlib import Path

import onnx

SCALING = (".scale", "_scale", "_zero_point")
"""How the names of scales and zero points end, those that ONNX Runtime's quantizer makes included."""


@dataclass(frozen=True)
class Sections:
    """Bytes; they add up to the file."""

    weight_bytes: int
    """Trained numbers as they are stored, biases and norms included."""
    scale_bytes: int
    """Scales and zero points."""
    graph_bytes: int
    """All else: operators, names, shapes, the encoding itself."""


def sections(path: Path) -> Sections:
    """Of an ONNX file without external data."""
    weights = scales = 0
    for tensor in onnx.load(path).graph.initializer:
        if tensor.name.endswith(SCALING):
            scales += len(tensor.raw_data)
        elif tensor.data_type != onnx.TensorProto.INT64:  # shapes
            weights += len(tensor.raw_data)
    return Sections(weights, scales, path.stat().st_size - weights - scales)
