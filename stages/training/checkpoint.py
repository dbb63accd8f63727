"""Checkpoints of unfinished training: outside DVC's outs, keyed by all that determines the result, locked."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import stages
from stages.common.errors import UserError
from stages.common.files import atomic_file

CODE = ("common", "datasets", "networks", "pruning", "training")  # folders whose change makes a checkpoint stale


@contextlib.contextmanager
def checkpoint_folder(parent: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """A folder for this very training, found again after a kill; it is removed when the block ends well.

    Args:
        parent: one for each stage and key, under `.scratch`.
        identity: everything that determines the result: data, network, recipe, seed.

    Raises:
        UserError: if another process is training the same thing.
    """
    key = hashlib.sha256(json.dumps([identity, torch.__version__, _code_hash()], sort_keys=True).encode()).hexdigest()
    folder = parent / key[:16]
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
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the last checkpoint by `state`, whole or not at all."""
    try:
        with atomic_file(folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: the checkpoint could not be written ({error}): make room or write access, then run again;"
            " the last finished epoch is kept"
        ) from None


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, or None where there is none."""
    path = folder / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def _code_hash() -> str:
    top = Path(stages.__file__).parent
    sources = sorted(file for folder in CODE for file in (top / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()
