"""Open the model of a bundle, check it against `bundle.json`, and classify."""

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

BUNDLE, MODEL = "bundle.json", "model.onnx"


@dataclass(frozen=True)
class Bundle:
    """The entries of `bundle.json` that the scripts need."""

    variant: str
    classes: list[str]
    image_size: int  # side in pixels of the model's input images
    geometry: str  # how a picture of other proportions becomes that square: see edgewise_decode.py
    channels: int  # 3 is RGB, 1 is gray
    levels: list[float] | None  # gray values of more than 8 bits that become 0 and 255
    onnx_sha256: str
    confidence_threshold: float
    onnxruntime: str  # the version with which the bundle was made


TYPES: dict[str, Any] = {
    **{"variant": str, "classes": list, "image_size": int, "geometry": str, "channels": int},
    "levels": (list, type(None)),
    **{"onnx_sha256": str, "confidence_threshold": (int, float), "onnxruntime": str},
}


@dataclass(frozen=True)
class Answer:
    label: str  # the class with the highest softmax probability
    confidence: float  # its softmax probability, which is not calibrated: use it only with the threshold
    threshold: float
    inference_ms: float

    @property
    def sure(self) -> bool:
        return self.confidence >= self.threshold

    def __str__(self) -> str:
        if self.sure:
            return f"{self.label} {self.confidence:.2f}"
        return f"unsure (best guess {self.label}, {comparison(self.confidence, self.threshold)})"


@dataclass(frozen=True)
class Loaded:
    """A `model.onnx` in ONNX Runtime."""

    run: Callable[[np.ndarray], np.ndarray]  # uint8 pixels `[B, H, W, C]` to float32 logits `[B, classes]`
    image_shape: tuple[int, int, int]  # height, width, channels
    classes: int
    import_ms: float  # time to import ONNX Runtime
    load_ms: float  # time from the file to a session that can run


@dataclass(frozen=True)
class Model(Loaded):
    """The model of a bundle."""

    bundle: Bundle

    def answer(self, pixels: np.ndarray) -> Answer:
        """Classify one image, uint8 in `image_shape`."""
        started = time.perf_counter_ns()
        logits = self.run(pixels[None])
        inference_ms = (time.perf_counter_ns() - started) / 1e6
        best = int(logits[0].argmax())
        confidence = float(confidences(logits)[0])
        return Answer(self.bundle.classes[best], confidence, self.bundle.confidence_threshold, inference_ms)


def stop(reason: object) -> NoReturn:
    """End the program with exit code 1 and a line with the reason."""
    sys.exit(f"error: {reason}")


def run_script(main: Callable[[], object]) -> None:
    """Run the `main` of a script. It ends silently if the reader of its output has closed the pipe (`| head`)."""
    try:
        main()
        sys.stdout.flush()
    except ImportError as missing:  # of a module that the script imports late
        own = str(missing.name).startswith("edgewise_")
        stop(f"{missing}: {'copy the whole bundle again' if own else 'pip install -r requirements.txt'}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of the buffer
        sys.exit(141)  # exit code of a process that SIGPIPE ended


def reason_of(error: Exception, path: Path) -> str:
    """The reason in one line, without the path, which the line begins with."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return " ".join(text.split()).replace(f" {str(path)!r}", "")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def confidences(logits: np.ndarray) -> np.ndarray:
    """Highest softmax probability of each image: logits `[N, classes]` to float64 `[N]`."""
    logits = logits.astype(np.float64)
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)


def comparison(confidence: float, threshold: float) -> str:
    """`0.41 < 0.62`, with enough digits that the two numbers differ."""
    for digits in range(2, 17):
        texts = [f"{value:.{digits}f}" for value in (confidence, threshold)]
        if texts[0] != texts[1]:
            break
    return " < ".join(texts)


def read_bundle(folder: Path) -> Bundle:
    """End the program if `bundle.json` is missing or damaged, or does not describe this `model.onnx`."""
    try:
        raw = json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
        values = {**raw, "onnxruntime": raw["versions"]["onnxruntime"]}
        bundle = Bundle(**{name: values[name] for name in TYPES})
        wrong = [name for name, kind in TYPES.items() if not isinstance(values[name], kind)]
        if wrong or not all(isinstance(label, str) for label in bundle.classes):
            raise ValueError(f"{(*wrong, 'classes')[0]} has a wrong type")
        found = sha256_of(folder / MODEL)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}: copy the whole bundle again")
    except (ValueError, KeyError, TypeError) as error:
        stop(f"{folder / BUNDLE} is damaged ({type(error).__name__}: {error}): copy the whole bundle again")
    if found != bundle.onnx_sha256:
        hashes = f"{folder / MODEL} has sha256 {found[:12]}…, but {BUNDLE} has {bundle.onnx_sha256[:12]}…"
        stop(f"{hashes}: the threshold and the model card belong to another model: copy the whole bundle again")
    return bundle


def open_model(folder: Path, threads: int) -> Model:
    """Open the model of the bundle in ONNX Runtime; ends the program if that fails."""
    bundle = read_bundle(folder)
    loaded = load_onnx(folder / MODEL, threads)
    sizes = {
        "image size": (loaded.image_shape[0], bundle.image_size),
        "number of channels": (loaded.image_shape[2], bundle.channels),
        "number of classes": (loaded.classes, len(bundle.classes)),
    }
    for name, (found, wanted) in sizes.items():
        if found != wanted:
            stop(f"{folder / MODEL}: its {name} is {found}, but {BUNDLE} has {wanted}: copy the whole bundle again")
    import onnxruntime

    if _numbers(onnxruntime.__version__) < _numbers(bundle.onnxruntime):
        older = f"ONNX Runtime {onnxruntime.__version__} is older than {bundle.onnxruntime}"
        remedy = "pip install -r requirements.txt"
        print(f"warning: {older}, with which this bundle was made: {remedy}", file=sys.stderr)
    return Model(**vars(loaded), bundle=bundle)


def load_onnx(path: Path, threads: int) -> Loaded:
    """Open a `model.onnx` in ONNX Runtime; ends the program if that fails.

    Its waiting threads sleep, because spinning threads would take the cores from other programs.
    """
    times = [time.perf_counter_ns()]
    import onnxruntime

    times.append(time.perf_counter_ns())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        stop(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {reason}")
    times.append(time.perf_counter_ns())
    pixels, logits = session.get_inputs()[0], session.get_outputs()[0]

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([logits.name], {pixels.name: images})[0]

    return Loaded(run, tuple(pixels.shape[1:]), logits.shape[1], *(np.diff(times) / 1e6).tolist())


def threads_argument(text: str) -> int:
    """A number of threads: at most one for each usable core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"{text}: give 1 to {cores}, the number of usable cores")
    return int(text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
