"""Data-parallel training in several processes, which torchrun starts as `base.launcher` says.

Each process works on its part of every batch, and all hold the same weights. Each repeats all other work with the same
result, but only the main process (rank 0) writes files and prints.
"""

import contextlib
import io
import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stages.common.errors import INTERRUPTED, UserError
from stages.params.base import Base

T = TypeVar("T")
TIMEOUT = timedelta(days=1)
"""Longest wait for another process. It is long because the main process alone searches for bit widths; torchrun itself
notices a process that has ended."""
GRACE_SECONDS = 10
"""Time that torchrun has to end a process that lost its connection to the others."""


def launch(base: Base) -> None:
    """Start this stage in the processes of `base.launcher` and exit when they end; return in a process that works.

    Raises:
        UserError: with the message of the first process that failed, or the signal that ended it.
    """
    command, *options = shlex.split(base.launcher)
    if command == "python" or dist.is_torchelastic_launched():
        return
    # These imports are slow, and few stages start processes.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)  # this process only runs torchrun; the UserError below reports a failure in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(base.threads or 1))  # torchrun's own default, without its warning
    main = sys.modules["__main__"].__spec__
    assert main is not None, "stages run as modules: python -m stages.<name>"
    stage = main.name
    stderr = io.StringIO()
    refused = f"base.launcher = {base.launcher!r}: torchrun refuses it:"
    try:
        with contextlib.redirect_stderr(stderr):
            arguments = parse_args([*options, "-m", stage, *sys.argv[1:]])
        if arguments.training_script != stage:
            raise ValueError(f"{arguments.training_script} is not an option; torchrun gets the stage's name by itself")
        run(arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == INTERRUPTED:
            sys.exit(INTERRUPTED)
        if failure.exitcode > 0 and failure.error_file_data.get("message") == "<NONE>":  # torch's word for no file
            sys.exit(failure.exitcode)  # the process has printed a traceback
        where = f"process {rank} of {base.launcher!r}: " if failure.exitcode < 0 else ""
        raise UserError(f"{where}{failure.message}") from None
    except SystemExit:  # from argparse, after it printed the usage
        reason = stderr.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{refused} {reason}") from None
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "check its numbers of processes and nodes"
        raise UserError(f"{refused} {reason}") from None
    except SignalException as ended:
        sys.exit(INTERRUPTED if ended.sigval == signal.SIGINT else 128 + ended.sigval)
    sys.exit(0)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group if torchrun started this process; only the main process prints.

    Args:
        device: the device of this process.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if device.type == "cpu":
            barrier()  # gloo logs an error of its own if one process fails while another still connects
        with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(sys.stdout if is_main_process() else null):
            yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(GRACE_SECONDS)  # torchrun reports the process that failed first, and ends this one
        raise UserError(f"the connection to the other processes broke: {str(error).splitlines()[0]}") from None
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Replace the tensor by its sum over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast(compute: Callable[[], T]) -> T:
    """Call `compute` in the main process and return its value in all processes."""
    if not dist.is_initialized():
        return compute()
    values: list[Any] = [compute() if is_main_process() else None]
    dist.broadcast_object_list(values)
    return values[0]


def data_parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the network so that `backward` averages the gradients over all processes; call the wrapper to train."""
    if not dist.is_initialized():
        return network
    # Depthwise weights in channels-last memory: two sets of strides describe the same layout.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
