"""Checkpoints of unfinished training: outside DVC's outs, keyed by all that determines the result, locked."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import stages
from stages.common.errors import UserError
from stages.common.files import atomic_file, clear_disk_errors
from stages.training import distributed
from stages.training.host import precision_kept_in

CODE = (
    *("common", "datasets", "networks", "pruning", "quantization", "training"),
    *("finetune.py", "prune.py", "quantize.py"),
)
"""What makes a checkpoint stale when it changes."""
LIBRARIES = ("torch", "torchvision", "timm", "only-train-once", "torch-pruning")
CHECKPOINT = "checkpoint.pt"
FINISHED = "finished"
LARGEST_SHARE, CHEAP_SECONDS = 0.05, 0.3
"""Of the time, for checkpoints; those that are written as fast as this are written after every epoch."""


@contextlib.contextmanager
def checkpoint_folder(parent: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """A folder for this very training, found again after a kill.

    Of several processes the first one locks the folder and writes into it; it must be the same disk for all.

    When the block ends well the folder stays, with the finished training in it: DVC may be killed before it has taken
    the outputs over, and then runs the stage again. The next training of the same parent removes it.

    Args:
        parent: one for each stage and key, under `.scratch`.
        identity: everything that determines the result: data, network, recipe, seed.

    Raises:
        UserError: if another process is training the same thing, or the folder cannot be written.
    """
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    key = hashlib.sha256(json.dumps([identity, versions, _code_hash()], sort_keys=True).encode()).hexdigest()
    folder = parent / key[:16]
    if not distributed.is_main_process():
        distributed.barrier()
        yield folder
        return
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder}: process {lock.read().strip() or '?'} is still training this; wait for it or end it,"
                " then run again"
            ) from None
        with clear_disk_errors(folder):
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), str(os.getpid()).encode())  # unbuffered: closing must not fail a second time
        for other in parent.iterdir():
            if other != folder and (other / FINISHED).exists():
                shutil.rmtree(other, ignore_errors=True)
        distributed.barrier()
        with precision_kept_in(folder):
            yield folder
        (folder / FINISHED).touch()


class Spacing:
    """Says after which epochs of a training a checkpoint is due, so that writing them never slows it much.

    Large networks with fast epochs would else wait for the disk after each.
    """

    def __init__(self) -> None:
        self._next = time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() >= self._next

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around the writing of one."""
        started = time.perf_counter()
        yield
        self._next = time.perf_counter()
        if (seconds := self._next - started) > CHEAP_SECONDS:
            self._next += seconds / LARGEST_SHARE


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the last checkpoint by `state`, whole or not at all."""
    try:
        with atomic_file(folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
    except (UserError, OSError, RuntimeError) as error:
        reason = error
        if isinstance(error, RuntimeError):  # torch's word for a full disk
            reason = f"cannot write {folder / CHECKPOINT}: torch could not finish it, as on a full disk ({error}):"
            reason += " make room, then run again"
        kept = "; the checkpoint before it is kept" if (folder / CHECKPOINT).exists() else ""
        raise UserError(f"{reason}{kept}") from None


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint; None where there is none, or none that can be read."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"epochs", "curve", "chosen", "run"} - state.keys():
            raise ValueError(f"it holds no {', '.join(sorted(missing))}")
        return state
    except Exception as error:  # torch has many words for a broken file
        print(f"{path} is broken ({str(error).splitlines()[0]}): starting again", flush=True)
        return None


def _code_hash() -> str:
    top = Path(stages.__file__).parent
    sources = [top / name if name.endswith(".py") else (top / name).rglob("*.py") for name in CODE]
    sources = sorted(file for source in sources for file in ([source] if isinstance(source, Path) else source))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
