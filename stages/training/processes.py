"""One training in several processes, as torchrun starts them: each has its share of every batch, all the same weights.

`base.launcher` says how a stage that trains is run. What is not training every process does for itself, to the same
result; files are the first one's.
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
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stages.common.errors import INTERRUPTED, UserError
from stages.params.base import Base

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=1)
"""Of one process for the others: a search for bits, which the first one does alone, takes what it takes. That one of
them has ended torchrun sees for itself."""
GRACE_SECONDS = 10
"""For which a process that lost the others waits to be ended."""


def launch(base: Base) -> None:
    """Run this stage again, in the processes of `base.launcher`, and end with them; comes back where it does the work.

    Raises:
        UserError: what the first process to fail told, or the signal that ended it.
    """
    command, *options = shlex.split(base.launcher)
    if command == "python" or dist.is_torchelastic_launched():
        return
    # Here, since they take a while to import and few stages start processes.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a failure is told below, in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(base.threads or 1))  # torchrun's own default, without its warning
    stage = sys.modules["__main__"].__spec__.name
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            arguments = parse_args([*options, "-m", stage, *sys.argv[1:]])
        if arguments.training_script != stage:
            raise ValueError(f"{arguments.training_script} is no option of it; the stage is added by itself")
        run(arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode == INTERRUPTED:
            sys.exit(INTERRUPTED)
        if failure.exitcode > 0 and not failure.error_file_data.get("message"):
            sys.exit(failure.exitcode)  # it has printed a traceback
        where = f"process {rank} of {base.launcher!r}: " if failure.exitcode < 0 else ""
        raise UserError(f"{where}{failure.message}") from None
    except SystemExit:  # argparse's, which has printed the usage
        reason = told.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"base.launcher = {base.launcher!r}: torchrun refuses it: {reason}") from None
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "look at its numbers of processes and nodes"
        raise UserError(f"base.launcher = {base.launcher!r}: torchrun refuses it: {reason}") from None
    except SignalException as ended:
        sys.exit(INTERRUPTED if ended.sigval == signal.SIGINT else 128 + ended.sigval)
    sys.exit(0)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of the processes that train together, where this one is; only the first one prints.

    Args:
        device: this process's own.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        with contextlib.ExitStack() as stack:
            if not is_first():
                silence = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
            yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        time.sleep(GRACE_SECONDS)  # torchrun sees the one that failed first, tells its reason, and ends this one
        raise UserError(f"the connection to the other processes broke: {str(error).splitlines()[0]}") from None
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """Of all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process: the others wait for it."""
    if not dist.is_initialized():
        return work()
    found = [work() if is_first() else None]
    dist.broadcast_object_list(found)
    return found[0]


def with_mean_gradients(network: nn.Module, device: torch.device) -> nn.Module:
    """A module to call in the network's place: after backward, gradients are the mean over all processes."""
    if not dist.is_initialized():
        return network
    # Of depthwise weights laid out for images, whose memory can be told in strides of two kinds
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)
