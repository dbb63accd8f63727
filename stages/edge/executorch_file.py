"""ExecuTorch's own file of an artifact, by its XNNPACK backend: float, or dynamic int8 for int8_dynamic variants."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from stages.artifacts.artifact import load_classifier
from stages.artifacts.description import DESCRIPTION
from stages.common.errors import UserError
from stages.export.onnx_file import _quiet as quiet

FILE = "model.pte"


def write_executorch(folder: Path, prepared: Path, batch: int) -> None:
    """Convert the artifact in `folder` into `prepared`, for images `[batch, H, W, 3]`.

    Weights of few bits become the floats that they mean, as they do in ONNX Runtime. PyTorch's dynamic int8 becomes
    XNNPACK's, which rounds the same floats anew. Calibrated activations have no counterpart here.

    Raises:
        UserError: if it has none, or ExecuTorch cannot convert the network.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from stages.networks.integer_weights import dequantized

    classifier, description = load_classifier(folder)
    method = description.parameters["method"]
    if method == "int8_static":
        raise UserError(f"executorch does not run {folder.name}: activations calibrated here are not its own")
    pixels = torch.zeros(batch, description.image_size, description.image_size, 3, dtype=torch.uint8)
    network = dequantized(classifier).eval()
    try:
        with _quiet(), torch.no_grad():
            if method == "int8_dynamic":
                network = _dynamic_int8(network, pixels)
            program = torch.export.export(network, (pixels,))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:  # the exporter's, the partitioner's and the backend's have no common class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"executorch does not convert {folder.name}: {reason}") from None
    (prepared / FILE).write_bytes(lowered.buffer)
    shutil.copyfile(folder / DESCRIPTION, prepared / DESCRIPTION)


def open_executorch(prepared: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 pixels `[batch, H, W, 3]` to float32 logits `[batch, classes]`."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    with _quiet():
        _unsafe_reset_threadpool(threads)
        program = Runtime.get().load_program(prepared / FILE)
        method = program.load_method("forward")
    return lambda pixels: method.execute([torch.from_numpy(pixels)])[0].numpy()


def _dynamic_int8(network, pixels):
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torch.export import export
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    observed = prepare_pt2e(export(network, (pixels,)).module(), quantizer)
    observed(pixels)
    return convert_pt2e(observed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither Python's remarks nor those that the C++ side writes to the process's error stream."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with quiet():
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
