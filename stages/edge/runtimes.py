"""The runtimes that can run an artifact, behind one small interface. Each is imported only when it is used."""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common.errors import UserError
from stages.edge.protocol import Classify


@dataclass(frozen=True)
class Runtime:
    name: str
    package: str
    """The distribution whose version belongs to the figures."""
    modules: tuple[str, ...]
    """Modules that it imports; their import is timed apart from loading a model."""
    open: Callable[[Path, int, int], Classify]
    """Opens the artifact in a folder, with a number of threads and of images in each call."""
    install: str = "uv sync"
    """The command that installs it."""


def not_installed(runtime: Runtime) -> str | None:
    """A line that names the runtime and how to install it; None if it is installed."""
    try:
        importlib.metadata.version(runtime.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{runtime.name} is not installed: {runtime.install}"
    return None


def _open_onnxruntime(folder: Path, threads: int, batch: int) -> Classify:
    from stages.export.session import open_session

    session = open_session(folder / "model.onnx", threads)
    name, wanted = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return lambda pixels: session.run(wanted, {name: pixels})[0]


def _open_openvino(folder: Path, threads: int, batch: int) -> Classify:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # or it computes float layers in bfloat16 on processors that have it
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


def _open_torch_eager(folder: Path, threads: int, batch: int) -> Classify:
    classifier, _ = _load_torch(folder, threads)
    return _torch_run(classifier)


def _open_torch_compile(folder: Path, threads: int, batch: int) -> Classify:
    import torch

    classifier, image_size = _load_torch(folder, threads)
    run = _torch_run(torch.compile(classifier, dynamic=False))
    try:
        run(np.zeros((batch, image_size, image_size, 3), np.uint8))
    except Exception as error:  # errors of inductor, the compiler and the network have no common class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"torch {torch.__version__} does not compile {folder} ({reason}): install a C++ compiler, or remove"
            " torch-compile from edge_benchmark.runtimes"
        ) from None
    return run


def _load_torch(folder: Path, threads: int) -> tuple[Callable, int]:
    """The classifier of the artifact, and its image size."""
    import torch

    from stages.artifacts.artifact import load_classifier

    torch.set_num_threads(threads)
    classifier, description = load_classifier(folder)
    return classifier, description.image_size


def _torch_run(classifier: Callable) -> Classify:
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
