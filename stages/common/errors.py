"""Errors that are the user's to mend: one clear line and exit code 2, never a traceback."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """What is wrong, where, and what to do about it, in words that need no knowledge of the code."""


def run_stage(main: Callable[[], object]) -> None:
    """Run a stage's `main`; a `UserError` ends the process with exit code 2 and its message on stderr."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
