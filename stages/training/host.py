"""The machine that trains: device, threads, precision, an allocator that keeps its memory, and errors of memory."""

import contextlib
import contextvars
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from stages.common.cores import threads_for
from stages.common.errors import UserError
from stages.common.files import atomic_file
from stages.params.base import Base
from stages.training import distributed

WORTHWHILE = 0.8
"""Largest time of a bfloat16 product, as a fraction of float32's, at which bfloat16 trains faster: autocast also spends
time on conversions."""
MEASURED = "bfloat16_is_faster"
"""File in the checkpoint folder that holds the result of the measurement."""
_folder: contextvars.ContextVar[Path | None] = contextvars.ContextVar("folder", default=None)


def prepare_host(base: Base) -> torch.device:
    """Set threads and allocator as `base` says, and return the device on which this process trains.

    Raises:
        UserError: if `base` needs more CUDA devices than there are.
    """
    torch.set_num_threads(threads_for(base.threads))
    _keep_freed_memory()
    if base.device == "cuda" and not torch.cuda.is_available():
        raise UserError("base.device = 'cuda': this machine has no usable CUDA device; set it to auto or cpu")
    if base.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"base.launcher starts more processes than there are CUDA devices ({torch.cuda.device_count()}): lower its"
            " --nproc-per-node"
        )
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # a training has batches of one or two shapes
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """True if training uses bfloat16 autocast, with the same answer in all processes, which must all call this.

    `auto` requires hardware that multiplies bfloat16, and on a CPU also that it is faster: the instructions of AVX-512
    take half of float32's time on some processors and twice as long on others.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return distributed.broadcast(_is_faster)


@contextlib.contextmanager
def precision_stored_in(folder: Path) -> Iterator[None]:
    """Make all trainings in this block, also after a kill, use what the first of them measured."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


def _is_faster() -> bool:
    folder = _folder.get()
    if folder is None:
        return _measure_faster()
    if not (file := folder / MEASURED).exists():
        with atomic_file(file) as temporary:
            temporary.write_text(f"{_measure_faster()}\n")
    return file.read_text().strip() == str(True)


@functools.cache
def _measure_faster() -> bool:
    """Compare the fastest products of a linear layer in both types, measured in turns since other load slows both."""
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch may lack them: then count as unsupported
    if not any(getattr(torch.cpu, name, bool)() for name in native):
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {kind: (torch.ones(2048, 192, dtype=kind), torch.ones(768, 192, dtype=kind)) for kind in seconds}
    with torch.no_grad():
        for _ in range(8):
            for kind, (x, weight) in operands.items():
                started = time.perf_counter()
                F.linear(x, weight)
                seconds[kind].append(time.perf_counter() - started)
    return min(seconds[torch.bfloat16]) <= WORTHWHILE * min(seconds[torch.float32])


@contextlib.contextmanager
def clear_training_errors(title: str, batch_size: int) -> Iterator[None]:
    """Turn the errors of a full memory and of `torch.compile` (also a missing compiler) into a `UserError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            full = f"{title}: batch_size {batch_size} does not fit into memory: lower it; the last checkpoint is kept"
            raise UserError(full) from None
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{title}: finetune.compile = true does not work here ({reason}): set it to false") from None


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: each step allocates the same large tensors, and new pages cost page faults."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # mallopt's parameters in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library: training is only slower
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 256 * 2**20)
