import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from stages.edge import machine
from stages.edge.machine import BUSY_CORES, CpuWatch, describe_machine, machine_state

needs_idle_accounting = pytest.mark.skipif(
    machine._used_seconds() == 0, reason="this system does not count processor time"
)


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Replaces /sys and /proc; writes a file there."""
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    monkeypatch.setattr(machine, "PROCESSES", tmp_path)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_the_description_has_the_processor_and_the_versions():
    described = describe_machine()
    assert described["cpu"]
    assert 1 <= described["usable_cores"] <= described["cores"] == os.cpu_count()
    assert described["affinity"] == sorted(os.sched_getaffinity(0))
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(described[name][0].isdigit() for name in ("onnxruntime", "torch", "numpy"))
    json.dumps(described | machine_state(), allow_nan=False)


@pytest.mark.parametrize(
    ("cpuinfo", "cpu", "sets"),
    [
        (
            "model name\t: An x86\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name\t: 2\n",
            "An x86",
            ["avx2", "avx512_vnni"],
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", "Raspberry Pi 4", ["asimd", "asimddp", "i8mm"]),
        ("", "Raspberry Pi 4", []),
    ],
)
def test_processor_and_instruction_sets_come_from_cpuinfo_or_the_board(system, cpuinfo, cpu, sets):
    system("cpuinfo", cpuinfo)
    system("device-tree/model", "Raspberry Pi 4\0")
    described = describe_machine()
    assert (described["cpu"], described["instruction_sets"], described["governor"]) == (cpu, sets, None)
    system("devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")
    assert describe_machine()["governor"] == "performance"


def test_the_state_has_the_hottest_sensor_and_none_where_the_system_has_no_value(monkeypatch):
    sensors = {"cpu": [SimpleNamespace(current=47.2), SimpleNamespace(current=51.0)], "disk": []}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    monkeypatch.setattr(psutil, "cpu_freq", lambda: SimpleNamespace(current=1050.0))
    state = machine_state()
    assert (state["temperature_c"], state["frequency_mhz"]) == (51.0, 1050.0)
    assert machine.process_state()["rss_bytes"] > 10**6

    def unreadable():
        raise NotImplementedError

    monkeypatch.setattr(psutil, "cpu_freq", unreadable)
    monkeypatch.delattr(psutil, "sensors_temperatures")
    state = machine_state()
    assert (state["temperature_c"], state["frequency_mhz"]) == (None, None)


@needs_idle_accounting
def test_a_busy_neighbor_is_detected():
    neighbor = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        watch = CpuWatch()
        time.sleep(0.6)
        assert watch.others_cores() > 0.3
    finally:
        neighbor.kill()
        neighbor.wait()


def test_own_work_does_not_count_as_that_of_others(monkeypatch):
    """On a machine on which only this process works."""
    monkeypatch.setattr(machine, "_used_seconds", machine._own_seconds)
    watch = CpuWatch()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    assert watch.others_cores() < BUSY_CORES / 2  # the two clocks are read one after the other


@pytest.mark.parametrize(("cores", "busy"), [((0.0, BUSY_CORES), False), ((0.0, 0.21), True), ((1.0, 0.0), True)])
def test_a_run_is_busy_if_any_part_of_it_was(monkeypatch, cores, busy):
    monkeypatch.setattr(machine, "others_cores_now", lambda: cores[0])
    monkeypatch.setattr(CpuWatch, "others_cores", lambda watch: cores[1])
    assert machine.RunWatch(1).finish()[0]["busy"] is busy


def test_a_run_waits_for_a_quiet_second_up_to_a_limit(monkeypatch):
    used = iter([1.0, 0.5, 0.1, 0.9, 1.0, 1.0, 0.7])
    monkeypatch.setattr(machine, "others_cores_now", lambda: next(used))
    assert machine.quiet_second(10) == 0.1
    assert machine.quiet_second(4) == 0.7


def test_energy_adds_up_the_packages_and_continues_after_a_counter_wraps_around(system):
    assert machine.EnergyMeter()() is None
    for zone, name, microjoules in (
        ("0", "package-0", 900),
        ("1", "package-1", 50),
        ("2", "psys", 7),
        ("0:0", "core", 3),
    ):
        system(f"class/powercap/intel-rapl:{zone}/name", name)
        system(f"class/powercap/intel-rapl:{zone}/energy_uj", str(microjoules))
        system(f"class/powercap/intel-rapl:{zone}/max_energy_range_uj", "1000")
    meter = machine.EnergyMeter()
    assert meter() == 0
    system("class/powercap/intel-rapl:0/energy_uj", "100")  # from 900 to 1000, and on from 0
    system("class/powercap/intel-rapl:1/energy_uj", "80")
    system("class/powercap/intel-rapl:2/energy_uj", "9")
    assert meter() == pytest.approx((200 + 30) / 1e6)
    assert meter() == pytest.approx((200 + 30) / 1e6)


@pytest.mark.parametrize(
    ("after", "events", "throttled"), [(1900, 0, False), (1700, 0, True), (2000, 3, True), (None, 0, False)]
)
def test_a_run_is_throttled_if_a_counter_or_a_lower_frequency_says_so(monkeypatch, system, after, events, throttled):
    frequency = iter([2000, after])
    state = {"load_average_1min": 0.1, "temperature_c": None}
    monkeypatch.setattr(machine, "machine_state", lambda: state | {"frequency_mhz": next(frequency)})
    monkeypatch.setattr(machine, "others_cores_now", lambda: 0.0)
    counter = "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    system(counter, "5")
    watch = machine.RunWatch(1)
    system(counter, str(5 + events))
    marks, found = watch.finish()
    assert marks["throttled"] is throttled
    assert (found["frequency_mhz_before"], found["frequency_mhz_after"]) == (2000, after)
    assert found["throttle_events"] == events


def test_a_process_is_restricted_to_cores_that_it_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        machine.keep_to_cores([min(allowed)])
        assert os.sched_getaffinity(0) == {min(allowed)}
        with pytest.raises(ValueError, match=r"affinity names core 4095, .* \d+$"):
            machine.keep_to_cores([4095])
    finally:
        os.sched_setaffinity(0, allowed)
