"""The number of cores that this process may use, and the number of threads that it starts."""

import os


def usable_cores() -> int:
    """The number of cores that this process may use, which its affinity may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(wanted: int) -> int:
    """`wanted` threads; if that is 0, as many as there are cores for this process.

    Processes of one torchrun divide the usable cores evenly. A single process takes OMP_NUM_THREADS, so that several
    stages can run at the same time, or all cores if that is not set.
    """
    if wanted:
        return wanted
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        return max(1, usable_cores() // processes)
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(limit)) if limit.isdigit() else usable_cores()
