"""The machine that trains: device, threads, precision, and an allocator that keeps its memory."""

import contextlib
import contextvars
import ctypes
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from stages.common.cores import threads_for
from stages.common.errors import UserError
from stages.common.files import atomic_file
from stages.params.base import Base
from stages.training import distributed

WORTH_IT = 0.8
"""Of float32's time for a product, what bfloat16's may take at most: autocast's conversions want their share."""
FASTER = "bfloat16_is_faster"
_keeper: contextvars.ContextVar[Path | None] = contextvars.ContextVar("keeper", default=None)


def prepare_host(base: Base) -> torch.device:
    """Set threads and allocator as `base` says, and name the device to train on: this process's own.

    Raises:
        UserError: if `base.device` asks for CUDA where there is none.
    """
    torch.set_num_threads(threads_for(base.threads))
    _keep_memory()
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
    torch.backends.cudnn.benchmark = True  # the batches of a training are of one shape, or two
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to train under bfloat16 autocast; all processes of a training call this and get the same answer.

    `auto` says yes where the hardware multiplies bfloat16 itself, and on a CPU only if it does so faster: AVX-512's
    instructions take half of float32's time on some processors and twice as long on others.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return distributed.broadcast(_faster_in_bfloat16)


@contextlib.contextmanager
def precision_kept_in(folder: Path) -> Iterator[None]:
    """Let all trainings in this block go by what the first of them measured, in whichever process that was."""
    token = _keeper.set(folder)
    try:
        yield
    finally:
        _keeper.reset(token)


def _faster_in_bfloat16() -> bool:
    folder = _keeper.get()
    if folder is None:
        return _measured_faster()
    file = folder / FASTER
    if not file.exists():
        with atomic_file(file) as temporary:
            temporary.write_text(f"{_measured_faster()}\n")
    return file.read_text().strip() == str(True)


@functools.cache
def _measured_faster() -> bool:
    """By the fastest of some products of a linear layer each, taken in turns: what else is running slows both."""
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent names: not known to this torch
    if not any(getattr(torch.cpu, name, bool)() for name in native):
        return False
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {kind: (torch.ones(2048, 192, dtype=kind), torch.ones(768, 192, dtype=kind)) for kind in seconds}
    with torch.no_grad():
        for _ in range(8):
            for kind, (x, weight) in operands.items():
                started = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds[kind].append(time.perf_counter() - started)
    return min(seconds[torch.bfloat16]) <= WORTH_IT * min(seconds[torch.float32])


@contextlib.contextmanager
def clear_memory_errors(what: str) -> Iterator[None]:
    """Turn the ways in which torch and Python run out of memory into one clear error.

    Raises:
        UserError: naming `what` did not fit.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{what} does not fit into memory: lower it; the last checkpoint is kept") from None
        raise


@contextlib.contextmanager
def clear_compile_errors(title: str) -> Iterator[None]:
    """Turn what `torch.compile` cannot do with this network, or without a C++ compiler, into one clear error.

    Raises:
        UserError: with torch's own reason.
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{title}: finetune.compile = true does not work here ({reason}): set it to false") from None


def _keep_memory() -> None:
    """Let glibc keep freed memory: each step allocates the same large tensors, and returning them costs page faults."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # names of mallopt's parameters in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set, training is only slower
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 256 * 2**20)
