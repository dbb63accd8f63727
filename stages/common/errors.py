"""Errors that are the user's to mend: one clear line and exit code 2, never a traceback."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

DISK_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give this user access to it"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "move away the file that stands where a folder belongs"),
    errno.EIO: "check the disk",
}
"""What helps, by `OSError.errno`; other errors of the system are the program's, and get their traceback."""
INTERRUPTED = 130  # exit code: as a shell reports a process that SIGINT ended
UNHEARD = 141  # as it reports one that SIGPIPE ended
LAUNCHED = "TORCHELASTIC_ERROR_FILE"
"""In processes that torchrun started: the file in which it looks for the reason of a failure."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, in words that need no knowledge of the code."""


def disk_error(error: OSError, path: Path | None = None) -> UserError | None:
    """The system's refusal to read or write in words; None where it is of a kind that a user cannot mend.

    Args:
        path: what was being written; the error's own path otherwise (a full disk's has none).
    """
    if error.errno not in DISK_REMEDIES:
        return None
    where = f"cannot write {path}" if path is not None else str(error.filename or Path.cwd())
    where = re.sub(r"\.+([^/]+?)(\.\d+\.partial)+", r"\1", where)  # the final name, which the user knows
    return UserError(f"{where}: {error.strerror}: {DISK_REMEDIES[error.errno]}, then run again")


def run_stage(main: Callable[[], object]) -> None:
    """Run a stage's `main`; what a user can mend ends the process with exit code 2 and one message on stderr.

    An interruption ends it with exit code 130, and says what of the work is kept. Where nobody reads what it prints any
    more (`| head`), it ends with exit code 141 and without a word.
    """
    try:
        main()
        sys.stdout.flush()  # or a closed pipe would show only when the interpreter ends, with a traceback
    except UserError as error:
        _fail(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there
        sys.exit(UNHEARD)
    except OSError as error:
        if (readable := disk_error(error)) is None:
            raise
        _fail(readable)
    except KeyboardInterrupt as interruption:
        kept = f"{interruption}; the same command goes on from there" if str(interruption) else ""
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted: {kept or 'nothing half-done is kept: run the same command again'}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: UserError) -> NoReturn:
    """Exit code 2, and the message on stderr: one of several processes leaves it to the one that started them."""
    if file := os.environ.get(LAUNCHED):
        Path(file).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    else:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
