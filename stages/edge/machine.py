"""The machine that a timing was made on, and whether others were using it.

Goes into device bundles as it is, so it needs the standard library only.
"""

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
SYSTEM, PROCESSES = Path("/sys"), Path("/proc")


def describe_machine(packages: Sequence[str] = ("onnxruntime", "torch", "numpy")) -> dict[str, object]:
    """What does not change during a run, with the versions of `packages`.

    An entry that this system does not tell is None.
    """
    import importlib.metadata  # here: a megabyte that a fresh process, whose memory is measured, can do without

    info = _cpuinfo()
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    flags = set((info.get("flags") or info.get("features") or "").split())
    return {
        "cpu": info.get("model name") or _board() or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "usable_cores": len(affinity) if affinity else os.cpu_count() or 1,
        "affinity": affinity,
        "governor": _read(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
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
    """Processor time of the whole machine that was not idle; time stolen by the hypervisor counts as used.

    0 where the system does not tell. The columns of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal,
    and guests', which user and nice hold already (proc(5)).
    """
    columns = (_read(PROCESSES / "stat") or "cpu").splitlines()[0].split()[1:9]
    ticks = [int(column) for column in columns]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, keys in lower case; empty where there is none."""
    info: dict[str, str] = {}
    for line in (_read(PROCESSES / "cpuinfo") or "").splitlines():
        key, separator, value = line.partition(":")
        if separator:
            info.setdefault(key.strip().lower(), value.strip())
    return info


def _board() -> str | None:
    """The name of a single-board computer: /proc/cpuinfo names no processor on ARM."""
    name = _read(PROCESSES / "device-tree/model")
    return name.strip("\0") if name else None


def _frequency_mhz() -> float | None:
    """Mean over all cores, now."""
    lines = (_read(PROCESSES / "cpuinfo") or "").splitlines()
    frequencies = [float(line.split(":")[1]) for line in lines if line.lower().startswith("cpu mhz")]
    if not frequencies:
        files = (SYSTEM / "devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        frequencies = [kilohertz / 1000 for kilohertz in _numbers(files)]
    return sum(frequencies) / len(frequencies) if frequencies else None


def _temperature_c() -> float | None:
    """The hottest sensor."""
    sensors = _numbers((SYSTEM / "class/hwmon").glob("hwmon*/temp*_input"))
    sensors = sensors or _numbers((SYSTEM / "class/thermal").glob("thermal_zone*/temp"))
    return max(sensors) / 1000 if sensors else None


def _numbers(files: Iterable[Path]) -> list[float]:
    """What the files hold; one that cannot be read now (a sensor asleep) is left out."""
    texts = [text for file in files if (text := _read(file))]
    return [float(text) for text in texts if text.lstrip("-").isdigit()]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
