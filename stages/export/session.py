"""Open and run `model.onnx` as a device does; this module never imports torch."""

import re
from pathlib import Path

import numpy as np
import onnxruntime

from stages.common.cores import usable_cores
from stages.common.errors import UserError


def int8_overflows() -> bool:
    """True on x86 without VNNI, where ONNX Runtime adds pairs of products in 16 bits, which 8-bit values overflow."""
    try:
        flags = set(re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):  # another system, or ARM, which adds products in 32 bits
        return False
    return not flags & {"avx_vnni", "avx512_vnni"}


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session on `model.onnx`, with a number of threads for each operator; 0 takes all usable cores.

    Operators run one after the other. Waiting threads sleep: a session that spins would take the cores from other
    processes. Raises a `UserError` if the file is missing or ONNX Runtime cannot read it.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: run `dvc repro` or `dvc pull`")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class for each status code, without a common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be opened by ONNX Runtime {onnxruntime.__version__}: {reason}") from None


def session_logits(session: onnxruntime.InferenceSession, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Logits of uint8 images `[N, H, W, C]`; memory-mapped images are read one batch at a time.

    A dynamically quantized network finds its scales over the whole batch, so its logits depend slightly on
    `batch_size`; a device sees one image at a time. A file with a fixed batch axis gets one image at a time.
    The result is float32 `[N, classes]`; a `UserError` says that the file takes images of another type or size.
    """
    pixels = session.get_inputs()[0]
    if images.dtype != np.uint8 or images.ndim != 4 or list(images.shape[1:]) != pixels.shape[1:]:
        raise UserError(f"model.onnx takes uint8 images {pixels.shape}, these are {images.dtype} {list(images.shape)}")
    logits, step = session.get_outputs()[0], 1 if pixels.shape[0] == 1 else batch_size
    found = np.empty((len(images), logits.shape[1]), np.float32)
    for start in range(0, len(images), step):
        batch = np.ascontiguousarray(images[start : start + step])
        found[start : start + step] = session.run([logits.name], {pixels.name: batch})[0]
    return found
