"""Checkpoints of unfinished trainings: outside the outputs of DVC, keyed by everything that determines the result."""

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
from stages.training.host import precision_stored_in

CODE = (
    *("common", "datasets", "networks", "params", "pruning", "quantization", "training"),
    *("finetune.py", "prune.py", "quantize.py"),
)
"""Sources whose change makes a checkpoint stale."""
LIBRARIES = ("torch", "torchvision", "timm", "only-train-once", "torch-pruning")
CHECKPOINT = "checkpoint.pt"
FINISHED = "finished"
LARGEST_FRACTION, CHEAP_SECONDS = 0.05, 0.3
"""Largest fraction of the time for writing checkpoints. A checkpoint that takes no more than `CHEAP_SECONDS` is written
after every epoch."""


@contextlib.contextmanager
def checkpoint_folder(parent: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder of one training, which a run after a kill finds again.

    The main process locks it and writes into it; all processes must see the same disk. After success the folder stays:
    if DVC is killed before it caches the outputs, it runs the stage again, which then only loads the finished training.
    The next training with the same parent removes it.

    Args:
        parent: one folder for each stage and key, under `.scratch`.
        identity: everything that determines the result: data, network, recipe, seed.

    Raises:
        UserError: if another process trains the same, or the folder cannot be written.
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
            os.write(lock.fileno(), str(os.getpid()).encode())  # unbuffered, so that close() cannot fail again
        for other in parent.iterdir():
            if other != folder and (other / FINISHED).exists():
                shutil.rmtree(other, ignore_errors=True)
        distributed.barrier()
        with precision_stored_in(folder):
            yield folder
        (folder / FINISHED).touch()


class Spacing:
    """Decides after which epochs to write a checkpoint: large networks with fast epochs would wait for the disk."""

    def __init__(self) -> None:
        self._next = time.perf_counter()

    def due(self) -> bool:
        return time.perf_counter() >= self._next

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the time that a checkpoint takes, and postpone the next one accordingly."""
        started = time.perf_counter()
        yield
        self._next = time.perf_counter()
        if (seconds := self._next - started) > CHEAP_SECONDS:
            self._next += seconds / LARGEST_FRACTION


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the last checkpoint atomically."""
    try:
        with atomic_file(folder / CHECKPOINT) as temporary:
            torch.save(state, temporary)
    except (UserError, OSError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, RuntimeError):  # torch raises it for a full disk
            reason = f"cannot write {folder / CHECKPOINT}: torch could not finish it, as on a full disk ({error}):"
            reason += " make room, then run again"
        kept = "; the checkpoint before it is kept" if (folder / CHECKPOINT).exists() else ""
        raise UserError(f"{reason}{kept}") from None


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None if there is none or it cannot be read."""
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"epochs", "curve", "chosen", "trainer"} - state.keys():
            raise ValueError(f"it holds no {', '.join(sorted(missing))}")
        return state
    except Exception as error:  # torch raises many kinds for a broken file
        print(f"{path} is broken ({str(error).splitlines()[0]}): training starts again", flush=True)
        return None


def _code_hash() -> str:
    top = Path(stages.__file__).parent
    files = sorted(
        file for name in CODE for file in (top.glob(name) if name.endswith(".py") else (top / name).rglob("*.py"))
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
