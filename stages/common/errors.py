"""Errors that the user can fix: one clear line and exit code 2 instead of a traceback."""

import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

DISK_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give this user access to it"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "move away the file that is in the place of a folder"),
    errno.EIO: "check the disk",
}
"""Remedies by `OSError.errno`. Any other error of the system is a fault of the program and keeps its traceback."""
INTERRUPTED = 130  # the exit code that a shell reports after SIGINT
BROKEN_PIPE = 141  # after SIGPIPE
TORCHRUN_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable with which torchrun names the file for the reason of a failure."""


class UserError(Exception):
    """A message that names the problem, its place and the remedy, without reference to the code."""


def disk_error(error: OSError, path: Path | None = None) -> UserError | None:
    """An error of the system as one line with a remedy; None for an error that the user cannot fix.

    Args:
        path: the file being written. The default is the error's own path, which is missing for a full disk.
    """
    if error.errno not in DISK_REMEDIES:
        return None
    where = f"cannot write {path}" if path is not None else str(error.filename or Path.cwd())
    where = re.sub(r"\.+([^/]+?)(\.\d+\.partial)+", r"\1", where)  # the final name, without the temporary parts
    return UserError(f"{where}: {error.strerror}: {DISK_REMEDIES[error.errno]}, then run again")


class Interruption:
    """Remembers a SIGINT: where it meets a library's callback, the library may raise an error of its own instead."""

    noted = False

    @classmethod
    def handle(cls, signal_number: int, frame: FrameType | None) -> NoReturn:
        cls.noted = True
        raise KeyboardInterrupt


def run_stage(main: Callable[[], object]) -> None:
    """Run a stage's `main`. A `UserError` ends the process with its message on stderr and exit code 2.

    An interruption ends it with exit code 130 and a line about the work that is kept. A closed pipe (`| head`) ends it
    with exit code 141 and no message.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores the signal
        signal.signal(signal.SIGINT, Interruption.handle)
    try:
        main()
        sys.stdout.flush()  # otherwise a closed pipe causes a traceback when the interpreter ends
    except KeyboardInterrupt as interruption:
        _end_interrupted(str(interruption))
    except Exception as error:
        if Interruption.noted:
            _end_interrupted("")
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes the rest of the buffer
            sys.exit(BROKEN_PIPE)
        readable = disk_error(error) if isinstance(error, OSError) else error
        if not isinstance(readable, UserError):
            raise
        _fail(readable)
    finally:
        Interruption.noted = False


def _end_interrupted(kept: str) -> NoReturn:
    """End with exit code 130 and a line about the work that is kept; under torchrun, only the first process prints."""
    if os.environ.get("RANK", "0") == "0":
        restart = "no partial work is kept: run the same command again"
        outcome = f"{kept}; the same command continues from there" if kept else restart
        print(f"interrupted: {outcome}", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _fail(error: UserError) -> NoReturn:
    """End with exit code 2 and the message on stderr; under torchrun, the parent process prints the message."""
    if file := os.environ.get(TORCHRUN_ERROR_FILE):
        Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    else:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
