"""The machine that a timing runs on: its description, its state, and whether other programs use it meanwhile.

Device bundles contain this file unchanged, so it needs the standard library and psutil only.
"""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

THROTTLED = 0.9  # a processor is throttled if its frequency falls below this fraction during a run
BUSY_CORES = 0.2  # mean number of cores that other processes and other guests of the host may use in a quiet run
INSTRUCTION_SETS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
    *("amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
SYSTEM, PROCESSES = Path("/sys"), Path("/proc")
State = dict[str, float | None]


def describe_machine(packages: Sequence[str] = ("onnxruntime", "torch", "numpy")) -> dict[str, object]:
    """The constant properties of this machine, and the versions of `packages`; None where the system has no value."""
    import importlib.metadata  # here, because it takes a megabyte

    pairs = [line.partition(":") for line in (_read(PROCESSES / "cpuinfo") or "").splitlines()]
    info = {key.strip().lower(): value.strip() for key, colon, value in reversed(pairs) if colon}  # the first processor
    affinity = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    board = _read(PROCESSES / "device-tree/model") or ""  # on ARM, /proc/cpuinfo has no processor name
    flags = (info.get("flags") or info.get("features") or "").split()
    return {
        "cpu": info.get("model name") or board.strip("\0") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": psutil.cpu_count(),
        "usable_cores": len(affinity) if affinity else psutil.cpu_count() or 1,
        "affinity": affinity,
        "governor": _read(SYSTEM / "devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def machine_state() -> State:
    """Load, frequency (mean over the cores) and temperature (the hottest sensor) at this moment."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # some systems list cores without a readable frequency
        frequency = None
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    return {
        "load_average_1min": psutil.getloadavg()[0],
        "frequency_mhz": frequency.current if frequency else None,
        "temperature_c": max((sensor.current for group in sensors.values() for sensor in group), default=None),
    }


def process_state() -> State:
    """`machine_state` and the resident memory of this process."""
    return machine_state() | {"rss_bytes": psutil.Process().memory_info().rss}


class EnergyMeter:
    """Energy in joules that the processor packages use from the construction of the meter on (RAPL counters).

    Often only root may read the counters, and virtual machines rarely have them. A counter wraps around after some
    minutes at full load, so call the meter more often than that.
    """

    def __init__(self) -> None:
        zones = sorted((SYSTEM / "class/powercap").glob("intel-rapl:*"))  # AMD processors use the same name
        packages = [zone for zone in zones if (_read(zone / "name") or "").startswith("package")]  # without subzones
        self._last = {zone: used for zone in packages if (used := _number(zone / "energy_uj")) is not None}
        self._joules = 0.0

    def __call__(self) -> float | None:
        """None where a counter is not readable."""
        for zone, last in self._last.items():
            if (now := _number(zone / "energy_uj")) is None:
                return None
            wrapped = _number(zone / "max_energy_range_uj") or 0.0 if now < last else 0.0
            self._last[zone] = now
            self._joules += (now - last + wrapped) / 1e6
        return self._joules if self._last else None


class CpuWatch:
    """Measures how many cores other processes use, starting at its construction."""

    def __init__(self) -> None:
        self._others, self._started = _used_seconds() - _own_seconds(), time.monotonic()

    def others_cores(self) -> float:
        """Mean number of cores that all other processes, and other guests of the host, have used since the start."""
        elapsed = max(time.monotonic() - self._started, 1e-3)
        return max(0.0, (_used_seconds() - _own_seconds() - self._others) / elapsed)


def others_cores_now() -> float:
    """Number of cores that other processes use while this one sleeps for a second."""
    watch = CpuWatch()
    time.sleep(1)
    return watch.others_cores()


def quiet_second(patience: int) -> float:
    """Wait up to `patience` seconds for a quiet one, and return the number of cores that others used in the last one.

    A compiler or an installer may still be at work.
    """
    for _ in range(patience):
        if (used := others_cores_now()) <= BUSY_CORES:
            break
    return used


class RunWatch:
    """Compares the state of the machine before and after a run, and first waits up to `patience` seconds for quiet."""

    def __init__(self, patience: int = 10) -> None:
        self._before, self._others_before = machine_state(), quiet_second(patience)
        self._throttled_before, self._cpu = _throttle_count(), CpuWatch()

    def finish(self) -> tuple[dict[str, bool], State]:
        """The marks `busy` and `throttled` of the run, and the flat state of the machine before and after it."""
        others_during, after = self._cpu.others_cores(), machine_state()
        events = _throttle_count() - self._throttled_before
        mhz_before, mhz_after = self._before["frequency_mhz"], after["frequency_mhz"]
        slower = mhz_before is not None and mhz_after is not None and mhz_after < THROTTLED * mhz_before
        state = {
            **{f"{key}_before": value for key, value in self._before.items()},
            **{f"{key}_after": value for key, value in after.items()},
            "others_cores_before": round(self._others_before, 3),
            "others_cores_during": round(others_during, 3),
            "busy_above_cores": BUSY_CORES,
            "throttle_events": events,
        }
        busy = max(self._others_before, others_during) > BUSY_CORES
        return {"busy": busy, "throttled": events > 0 or slower}, state


def keep_to_cores(cores: Sequence[int]) -> None:
    """Restrict this process and its children to `cores`; a `ValueError` for the user if that is not possible."""
    if not hasattr(psutil.Process, "cpu_affinity"):
        raise ValueError("edge_benchmark.affinity: this system cannot restrict a process to cores: set it to null")
    process = psutil.Process()
    usable = process.cpu_affinity()
    if missing := sorted(set(cores) - set(usable)):
        cores_here = ", ".join(map(str, usable))
        raise ValueError(f"edge_benchmark.affinity names core {missing[0]}, but this process may use {cores_here}")
    process.cpu_affinity(list(cores))


def _throttle_count() -> int:
    """How often heat has slowed the cores down since boot; 0 where the system has no counters."""
    files = (SYSTEM / "devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    return sum(int(_number(file) or 0) for file in files)


def _used_seconds() -> float:
    """Processor time of the whole machine that was not idle, including time that the hypervisor gave to other guests.

    0 where the system does not count it. `user` and `nice` already include the two guest times.
    """
    try:
        times = psutil.cpu_times()._asdict()
    except OSError:
        return 0.0
    return sum(value for key, value in times.items() if key not in ("idle", "iowait", "guest", "guest_nice"))


def _own_seconds() -> float:
    return sum(os.times()[:4])  # user and system time of this process and of its children


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _read(path)
    return float(text) if text and text.isdigit() else None
