"""How many cores this process may use, and how many of them it takes."""

import os


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine's where affinity says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(wanted: int) -> int:
    """`wanted` threads, or for 0 this process's share of the usable cores.

    Processes that torchrun started share them evenly; one that stands alone takes OMP_NUM_THREADS of them where that is
    set, so that several stages can be run side by side, and else all.
    """
    if wanted:
        return wanted
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > 1:
        return max(1, usable_cores() // processes)
    of_openmp = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return max(1, int(of_openmp)) if of_openmp.isdigit() else usable_cores()
