"""A bundle's model: opened, checked against `bundle.json`, and asked."""

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
from typing import NoReturn

import numpy as np

BUNDLE, MODEL = "bundle.json", "model.onnx"


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` tells and the scripts need."""

    folder: Path
    variant: str
    classes: list[str]
    image_size: int
    """Side in pixels of the images that the model takes."""
    onnx_sha256: str
    confidence_threshold: float
    onnxruntime: str
    """The version that it was made with."""


@dataclass(frozen=True)
class Answer:
    label: str
    """The likeliest class."""
    confidence: float
    """Its softmax probability: not calibrated, good for the threshold only."""
    threshold: float
    inference_ms: float

    @property
    def sure(self) -> bool:
        return self.confidence >= self.threshold

    def __str__(self) -> str:
        if self.sure:
            return f"{self.label} {self.confidence:.2f}"
        return f"unsure (best guess {self.label}, {as_read(self.confidence, self.threshold)})"


@dataclass(frozen=True)
class Model:
    bundle: Bundle
    run: Callable[[np.ndarray], np.ndarray]
    """uint8 pixels `[1, H, W, 3]` to float32 logits `[1, classes]`."""
    import_ms: float
    """Importing ONNX Runtime."""
    load_ms: float
    """From the file to a session that can run."""

    def answer(self, pixels: np.ndarray) -> Answer:
        """The class of one image, uint8 `[image_size, image_size, 3]`, RGB."""
        started = time.perf_counter_ns()
        logits = self.run(pixels[None])
        inference_ms = (time.perf_counter_ns() - started) / 1e6
        best = int(logits[0].argmax())
        confidence = float(confidences(logits)[0])
        return Answer(self.bundle.classes[best], confidence, self.bundle.confidence_threshold, inference_ms)


def stop(reason: object) -> NoReturn:
    """End the program with exit code 1 and one line that says why."""
    sys.exit(f"error: {reason}")


def run_script(main: Callable[[], object]) -> None:
    """Run a script's `main`; where nobody reads what it prints any more (`| head`), it ends without a word."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        sys.exit(141)  # as a shell reports a process that SIGPIPE ended


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def confidences(logits: np.ndarray) -> np.ndarray:
    """Softmax probability of the likeliest class: logits `[N, classes]` to float64 `[N]`."""
    logits = logits.astype(np.float64)
    return 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)


def as_read(confidence: float, threshold: float) -> str:
    """`0.41 < 0.62`, with as many digits as it takes to tell the two apart."""
    for digits in range(2, 17):
        texts = [f"{value:.{digits}f}" for value in (confidence, threshold)]
        if texts[0] != texts[1]:
            break
    return " < ".join(texts)


def read_bundle(folder: Path) -> Bundle:
    """Ends the program where `bundle.json` is missing or damaged, or `model.onnx` is another file than it describes."""
    try:
        raw = json.loads((folder / BUNDLE).read_text(encoding="utf-8"))
        bundle = Bundle(
            folder=folder,
            variant=raw["variant"],
            classes=raw["classes"],
            image_size=raw["image_size"],
            onnx_sha256=raw["onnx_sha256"],
            confidence_threshold=raw["confidence_threshold"],
            onnxruntime=raw["versions"]["onnxruntime"],
        )
        _check_types(bundle)
        found = sha256_of(folder / MODEL)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}: copy the whole bundle again")
    except (ValueError, KeyError, TypeError) as error:
        stop(f"{folder / BUNDLE} is damaged ({type(error).__name__}: {error}): copy the whole bundle again")
    if found != bundle.onnx_sha256:
        stop(
            f"{folder / MODEL} has sha256 {found[:12]}…, {BUNDLE} says {bundle.onnx_sha256[:12]}…: it is not the model"
            " that the threshold and the card speak of: copy the whole bundle again"
        )
    return bundle


def _check_types(bundle: Bundle) -> None:
    """Raises a `ValueError` that names the first value of another kind than it must be."""
    named = isinstance(bundle.classes, list) and all(isinstance(name, str) for name in bundle.classes)
    sound = {
        "variant": isinstance(bundle.variant, str),
        "classes": named and bool(bundle.classes),
        "image_size": type(bundle.image_size) is int and bundle.image_size > 0,
        "confidence_threshold": type(bundle.confidence_threshold) in (int, float),
        "versions.onnxruntime": isinstance(bundle.onnxruntime, str),
    }
    if wrong := [name for name, is_so in sound.items() if not is_so]:
        raise ValueError(f"{wrong[0]} is of another kind than it must be")


def open_model(folder: Path, threads: int) -> Model:
    """The bundle's model in ONNX Runtime; ends the program where that cannot be."""
    bundle = read_bundle(folder)
    loaded = load_onnx(folder / MODEL, threads)
    for what, of_model, told in [
        ("images of side", loaded.image_size, bundle.image_size),
        ("classes", loaded.classes, len(bundle.classes)),
    ]:
        if of_model != told:
            stop(f"{folder / MODEL} has {of_model} as its {what}, {BUNDLE} {told}: copy the whole bundle again")
    import onnxruntime

    if _numbers(onnxruntime.__version__) < _numbers(bundle.onnxruntime):
        print(
            f"warning: ONNX Runtime {onnxruntime.__version__} is older than {bundle.onnxruntime}, which this bundle was"
            " made with: pip install -r requirements.txt",
            file=sys.stderr,
        )
    return Model(bundle, loaded.run, loaded.import_ms, loaded.load_ms)


@dataclass(frozen=True)
class Loaded:
    run: Callable[[np.ndarray], np.ndarray]
    """uint8 pixels `[B, H, W, 3]` to float32 logits `[B, classes]`."""
    image_size: int
    classes: int
    import_ms: float
    """Importing ONNX Runtime."""
    load_ms: float
    """From the file to a session that can run."""


def load_onnx(path: Path, threads: int) -> Loaded:
    """A `model.onnx` in ONNX Runtime.

    Ends the program where that cannot be. Waiting threads sleep instead of spinning: a spinning session would take the
    cores from whatever runs next to it.
    """
    times = [time.perf_counter_ns()]
    try:
        import onnxruntime
    except ImportError as error:
        stop(f"ONNX Runtime cannot be imported ({error}): pip install -r requirements.txt")
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
    except Exception as error:  # ONNX Runtime has one class for each status code, and no common one but Exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        stop(f"{path} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {reason}")
    times.append(time.perf_counter_ns())
    pixels, logits = session.get_inputs()[0], session.get_outputs()[0]

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([logits.name], {pixels.name: images})[0]

    return Loaded(run, pixels.shape[1], logits.shape[1], *(np.diff(times) / 1e6).tolist())


def threads_argument(text: str) -> int:
    """A number of threads that do not have to take turns on a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or not 1 <= int(text) <= cores:
        raise argparse.ArgumentTypeError(f"{text}: 1 to {cores}, the cores that this process may use")
    return int(text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
