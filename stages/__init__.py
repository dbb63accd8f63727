"""Edgewise: seven DVC stages, and beside them one folder for each domain they work in."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # A stage is being started: an interruption while it imports ends it without a traceback; `run_stage` takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)
