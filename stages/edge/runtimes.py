"""What can run an artifact: one small interface for all runtimes. Nothing here imports one before it is used."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
"""uint8 pixels `[1, H, W, 3]` to float32 logits `[1, classes]`."""


@dataclass(frozen=True)
class Runtime:
    name: str
    modules: tuple[str, ...]
    """What it imports: timed apart from loading a model."""
    open: Callable[[Path, int], Run]
    """From an artifact's folder and a number of threads to a function that classifies one image."""


def _open_onnxruntime(folder: Path, threads: int) -> Run:
    from stages.export.session import open_session

    session = open_session(folder / "model.onnx", threads)
    name, wanted = session.get_inputs()[0].name, [session.get_outputs()[0].name]
    return lambda pixels: session.run(wanted, {name: pixels})[0]


def _open_torch_eager(folder: Path, threads: int) -> Run:
    import torch

    from stages.artifacts.artifact import load_classifier

    torch.set_num_threads(threads)
    classifier, _ = load_classifier(folder)

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return classifier(torch.from_numpy(pixels)).numpy()

    return run


ONNXRUNTIME = Runtime("onnxruntime", ("onnxruntime",), _open_onnxruntime)
TORCH_EAGER = Runtime("torch-eager", ("torch", "stages.artifacts.artifact"), _open_torch_eager)
RUNTIMES = {runtime.name: runtime for runtime in (ONNXRUNTIME, TORCH_EAGER)}
