"""The runtimes that can run an artifact, behind one small interface. Each is imported only when it is used.

`python -m stages.edge.runtimes <runtime> <folder> <threads> <batch>` prints the start-up cost of an artifact as JSON.
With ONNX Runtime, this process imports neither torch nor any training code.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import read_json
from stages.edge.protocol import Classify, median_start, random_pixels, start_up


@dataclass(frozen=True)
class Runtime:
    name: str
    package: str  # the distribution whose version belongs to the figures
    modules: tuple[str, ...]  # modules that it imports; their import is timed apart from loading a model
    open: Callable[[Path, int, int], Classify]
    """Opens the artifact in a folder, with a number of threads and of images in each call."""
    install: str = "uv sync"  # the command that installs it
    required: bool = False  # a model that does not run ends the benchmark; otherwise it is listed in `left_out`
    dense_only: bool = False  # it times only the dense float networks


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
        program = f"OpenVINO {openvino.__version__}"
        raise UserError(f"{program} does not run {folder / 'model.onnx'}: {_line(error, -1)}") from None
    request, output = compiled.create_infer_request(), compiled.output(0)
    return lambda pixels: request.infer([pixels], share_inputs=True)[output]


def _open_torch(folder: Path, threads: int, batch: int, compiled: bool = False) -> Classify:
    import torch

    from stages.artifacts.artifact import load_classifier

    torch.set_num_threads(threads)
    classifier, description = load_classifier(folder)
    network = torch.compile(classifier, dynamic=False) if compiled else classifier

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(pixels)).numpy()

    if compiled:
        try:
            run(random_pixels(batch, description.image_shape, 0))
        except Exception as error:  # errors of inductor, the compiler and the network have no common class
            raise UserError(
                f"torch {torch.__version__} does not compile {folder} ({_line(error, 0)}): install a C++ compiler, or"
                " remove torch-compile from edge_benchmark.runtimes"
            ) from None
    return run


def _line(error: Exception, which: int) -> str:
    """One line of the error's message, without empty lines, or its class."""
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[which]


TORCH_MODULES = ("torch", "stages.artifacts.artifact")
ONNXRUNTIME = Runtime("onnxruntime", "onnxruntime", ("onnxruntime",), _open_onnxruntime, required=True)
OPENVINO = Runtime("openvino", "openvino", ("openvino",), _open_openvino, "uv sync --extra openvino")
TORCH_EAGER = Runtime("torch-eager", "torch", TORCH_MODULES, _open_torch, required=True, dense_only=True)
TORCH_COMPILE = Runtime("torch-compile", "torch", TORCH_MODULES, partial(_open_torch, compiled=True), dense_only=True)
RUNTIMES = {runtime.name: runtime for runtime in (ONNXRUNTIME, OPENVINO, TORCH_EAGER, TORCH_COMPILE)}


def measure_fresh(runtime: Runtime, folder: Path, threads: int, batch: int, repeats: int) -> dict[str, float]:
    """The median of each start-up figure over `repeats` new processes; a `UserError` if one fails."""
    command = [sys.executable, "-m", "stages.edge.runtimes", runtime.name, str(folder), str(threads), str(batch)]
    try:
        return median_start(f"{folder} under {runtime.name}", command, repeats)
    except ValueError as error:
        raise UserError(str(error)) from None


def main() -> None:
    runtime, folder, threads, batch = RUNTIMES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    described = read_json(folder / "model.json")
    image_shape = described["image_size"], described["image_size"], described["network"]["channels"]
    times = [time.perf_counter_ns()]
    for module in runtime.modules:
        importlib.import_module(module)
    times.append(time.perf_counter_ns())
    run = runtime.open(folder, threads, batch)
    times.append(time.perf_counter_ns())
    print(json.dumps(start_up(run, random_pixels(batch, image_shape, 0), *(np.diff(times) / 1e6).tolist())))


if __name__ == "__main__":
    run_stage(main)
