"""What can run an artifact: one small interface for all runtimes. Nothing here imports one before it is used."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common.errors import UserError

Run = Callable[[np.ndarray], np.ndarray]
"""uint8 pixels `[B, H, W, 3]` to float32 logits `[B, classes]`."""


@dataclass(frozen=True)
class Runtime:
    name: str
    package: str
    """The distribution whose version goes with the numbers."""
    modules: tuple[str, ...]
    """What it imports: timed apart from loading a model."""
    open: Callable[[Path, int, int], Run]
    """From a prepared folder, a number of threads and one of images to a function that classifies so many."""
    install: str = "uv sync"
    """What a person does where it is missing."""


def not_installed(runtime: Runtime) -> str | None:
    """A line that says so and what helps; None where it is there."""
    try:
        importlib.metadata.version(runtime.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{runtime.name} is not installed: {runtime.install}"
    return None


def _open_onnxruntime(folder: Path, threads: int, batch: int) -> Run:
    from stages.export.session import open_session

    session = open_session(folder / "model.onnx", threads)
    name, wanted = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return lambda pixels: session.run(wanted, {name: pixels})[0]


def _open_openvino(folder: Path, threads: int, batch: int) -> Run:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # else it computes float layers in bfloat16 where the processor can
    }
    core = openvino.Core()
    try:
        model = core.read_model(folder / "model.onnx")
        first, *image = model.input(0).get_partial_shape()
        if first.is_dynamic:
            model.reshape([batch, *image])
        compiled = core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise UserError(f"OpenVINO {openvino.__version__} does not run {folder / 'model.onnx'}: {reason}") from None
    request, output = compiled.create_infer_request(), compiled.output(0)
    return lambda pixels: request.infer([pixels], share_inputs=True)[output]


def _open_torch_eager(folder: Path, threads: int, batch: int) -> Run:
    classifier, _ = _load_torch(folder, threads)
    return _torch_run(classifier)


def _open_torch_compile(folder: Path, threads: int, batch: int) -> Run:
    import torch

    classifier, image_size = _load_torch(folder, threads)
    run = _torch_run(torch.compile(classifier, dynamic=False))
    try:
        run(np.zeros((batch, image_size, image_size, 3), np.uint8))
    except Exception as error:  # inductor's, its compiler's and the network's own have no common class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"torch {torch.__version__} does not compile {folder} ({reason}): install a C++ compiler, or take"
            " torch-compile out of edge_benchmark.runtimes"
        ) from None
    return run


def _load_torch(folder: Path, threads: int) -> tuple[Callable, int]:
    """The artifact's classifier, and the side of the images that it takes."""
    import torch

    from stages.artifacts.artifact import load_classifier

    torch.set_num_threads(threads)
    classifier, description = load_classifier(folder)
    return classifier, description.image_size


def _torch_run(classifier: Callable) -> Run:
    import torch

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return classifier(torch.from_numpy(pixels)).numpy()

    return run


ONNXRUNTIME = Runtime("onnxruntime", "onnxruntime", ("onnxruntime",), _open_onnxruntime)
OPENVINO = Runtime("openvino", "openvino", ("openvino",), _open_openvino, "uv sync --extra openvino")
TORCH_EAGER = Runtime("torch-eager", "torch", ("torch", "stages.artifacts.artifact"), _open_torch_eager)
TORCH_COMPILE = Runtime("torch-compile", "torch", ("torch", "stages.artifacts.artifact"), _open_torch_compile)
RUNTIMES = {runtime.name: runtime for runtime in (ONNXRUNTIME, OPENVINO, TORCH_EAGER, TORCH_COMPILE)}
