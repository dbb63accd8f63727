"""The machine that a timing was made on, and whether others were using it."""

import importlib.metadata
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from stages.export.session import usable_cores

BUSY_CORES = 0.2  # mean number of cores that others (the hypervisor's other guests too) may use in a quiet run
INSTRUCTION_SETS = (
    *(
        "sse4_2",
        "avx",
        "f16c",
        "fma",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
    ),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
SYSTEM = Path("/sys")


def describe_machine() -> dict[str, object]:
    """What does not change during a run; an entry that this system does not tell is None."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("features") or "").split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "numpy")},
    }


def machine_state() -> dict[str, float | None]:
    """What changes: taken before and after a run."""
    return {
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "frequency_mhz": _frequency_mhz(),
        "temperature_c": _temperature_c(),
    }


@dataclass(frozen=True)
class CpuWatch:
    """Counts the cores that others use from the moment of its making."""

    used: float
    own: float
    started: float

    @classmethod
    def start(cls) -> "CpuWatch":
        return cls(_used_seconds(), _own_seconds(), time.monotonic())

    def others_cores(self) -> float:
        """Mean number of cores that all other processes, and other guests of the same host, have used since."""
        elapsed = max(time.monotonic() - self.started, 1e-3)
        return max(0.0, (_used_seconds() - self.used - (_own_seconds() - self.own)) / elapsed)


def others_cores_now(seconds: float = 1.0) -> float:
    """Cores that others use while this process waits."""
    watch = CpuWatch.start()
    time.sleep(seconds)
    return watch.others_cores()


def is_busy(*others_cores: float) -> bool:
    return max(others_cores) > BUSY_CORES


def _used_seconds() -> float:
    """Processor time of the whole machine that was not idle; time stolen by the hypervisor counts as used."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted within user and nice as well
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - guests


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, keys in lower case; empty where there is none."""
    info: dict[str, str] = {}
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            info.setdefault(key.strip().lower(), value.strip())
    return info


def _frequency_mhz() -> float | None:
    frequency = psutil.cpu_freq() if hasattr(psutil, "cpu_freq") else None
    return float(frequency.current) if frequency else None


def _temperature_c() -> float | None:
    """The hottest sensor."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return max((entry.current for entries in sensors.values() for entry in entries), default=None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
