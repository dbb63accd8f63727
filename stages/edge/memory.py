"""Memory of this process. Goes into device bundles as it is: standard library only, and little of it."""

import os
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it began.

    Linux counts it in /proc from the exec on; `ru_maxrss` there also covers the process that it was forked from.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (FileNotFoundError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rss_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except (FileNotFoundError, IndexError):
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
