"""The machine that a timing was made on, and whether others were using it.

Goes into device bundles as it is, so it needs the standard library only.
"""

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

THROTTLED = 0.9  # share of the frequency before a run under which a processor counts as throttled after it
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


class EnergyMeter:
    """Joules that the processor's packages have used since the meter was made, by RAPL's counters.

    Linux gives them in /sys/class/powercap, often to root alone, and rarely inside a virtual machine. A counter starts
    anew after some minutes at full load: ask more often than that.
    """

    def __init__(self) -> None:
        zones = sorted((SYSTEM / "class/powercap").glob("intel-rapl:*"))  # AMD's bear the same name
        packages = [zone for zone in zones if (_read(zone / "name") or "").startswith("package")]  # not their parts
        self._zones = [zone for zone in packages if self._microjoules(zone) is not None]
        self._last = [self._microjoules(zone) for zone in self._zones]
        self._joules = 0.0

    def __call__(self) -> float | None:
        """None where no counter can be read."""
        if not self._zones:
            return None
        for index, zone in enumerate(self._zones):
            now = self._microjoules(zone)
            used = now - self._last[index]
            if used < 0:
                used += float(_read(zone / "max_energy_range_uj") or 0)
            self._last[index] = now
            self._joules += used / 1e6
        return self._joules

    @staticmethod
    def _microjoules(zone: Path) -> float | None:
        text = _read(zone / "energy_uj")
        return float(text) if text else None


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


def quiet_second(patience: int = 10) -> float:
    """Wait for a second in which others leave the machine alone, at most so many: the compiler's or the installer's
    last work is over then. Returns the cores that they used in the last one waited for."""
    for _ in range(patience):
        used = others_cores_now()
        if not is_busy(used):
            break
    return used


def is_busy(*others_cores: float) -> bool:
    return max(others_cores) > BUSY_CORES


@dataclass(frozen=True)
class RunWatch:
    """The machine's state around a run, and what has to be said about it."""

    before: dict[str, float | None]
    others_before: float
    throttled_before: int
    cpu: CpuWatch

    @classmethod
    def start(cls) -> "RunWatch":
        return cls(machine_state(), quiet_second(), _throttle_count(), CpuWatch.start())

    def finish(self) -> tuple[dict[str, bool], dict[str, float | None]]:
        """The marks `busy` and `throttled` of the run; and the machine's state before and after it, flat."""
        others_during, after = self.cpu.others_cores(), machine_state()
        events = _throttle_count() - self.throttled_before
        slower = [state["frequency_mhz"] for state in (self.before, after)]
        throttled = events > 0 or (None not in slower and slower[1] < THROTTLED * slower[0])
        state = {f"{key}_before": value for key, value in self.before.items()}
        state |= {f"{key}_after": value for key, value in after.items()}
        state |= {
            "others_cores_before": round(self.others_before, 3),
            "others_cores_during": round(others_during, 3),
            "busy_above_cores": BUSY_CORES,
            "throttle_events": events,
        }
        return {"busy": is_busy(self.others_before, others_during), "throttled": throttled}, state


def keep_to_cores(cores: Sequence[int]) -> None:
    """Let this process, and those that it starts, use these cores only.

    Raises:
        ValueError: in words for the user, where it may not use one of them or the system cannot do that.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("this system cannot keep a process to chosen cores: leave affinity out")
    usable = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - usable):
        raise ValueError(
            f"affinity names core {missing[0]}; this process may use {', '.join(map(str, sorted(usable)))}"
        )
    os.sched_setaffinity(0, cores)


def _throttle_count() -> int:
    """How often the cores were slowed down for their heat since the start; 0 where the system does not tell."""
    files = (SYSTEM / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return int(sum(_numbers(files)))


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
