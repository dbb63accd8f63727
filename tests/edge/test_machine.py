import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from stages.edge import machine
from stages.edge.machine import BUSY_CORES, CpuWatch, describe_machine, is_busy, machine_state

needs_idle_accounting = pytest.mark.skipif(
    machine._used_seconds() == 0, reason="this system does not tell what its processors do"
)


def test_the_description_names_the_processor_and_the_versions():
    described = describe_machine()
    assert described["cpu"]
    assert 1 <= described["usable_cores"] <= described["cores"] == os.cpu_count()
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(described[name][0].isdigit() for name in ("onnxruntime", "torch", "numpy"))
    json.dumps(described | machine_state(), allow_nan=False)


def test_what_the_system_does_not_tell_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    assert describe_machine()["governor"] is None
    path = tmp_path / "devices/system/cpu/cpu0/cpufreq/scaling_governor"
    path.parent.mkdir(parents=True)
    path.write_text("performance\n")
    assert describe_machine()["governor"] == "performance"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_frequency_is_the_mean_over_cores_and_temperature_that_of_the_hottest_sensor(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SYSTEM", tmp_path / "sys")
    monkeypatch.setattr(machine, "PROCESSES", tmp_path / "proc")
    assert machine_state() | {"load_average_1min": None} == dict.fromkeys(machine_state())
    write(tmp_path / "sys/class/thermal/thermal_zone0/temp", "47200\n")
    for core, kilohertz in enumerate((1_500_000, 600_000)):
        write(tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", f"{kilohertz}\n")
    assert machine_state()["temperature_c"] == 47.2
    assert machine_state()["frequency_mhz"] == 1050
    for sensor, text in enumerate(("51000", "-3000", "")):  # one does not answer
        write(tmp_path / f"sys/class/hwmon/hwmon0/temp{sensor}_input", text)
    write(tmp_path / "proc/cpuinfo", "cpu MHz\t\t: 2000.5\n\ncpu MHz\t\t: 3000.5\n")
    assert machine_state()["temperature_c"] == 51
    assert machine_state()["frequency_mhz"] == 2500.5


def test_a_board_without_a_processors_name_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "PROCESSES", tmp_path)
    write(tmp_path / "cpuinfo", "processor\t: 0\nFeatures\t: asimd\n")
    write(tmp_path / "device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\0")
    assert describe_machine()["cpu"] == "Raspberry Pi 4 Model B Rev 1.4"


@needs_idle_accounting
def test_memory_and_processor_time_are_those_that_psutil_tells():
    assert describe_machine()["memory_bytes"] == psutil.virtual_memory().total
    times = psutil.cpu_times()
    used = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
    assert machine._used_seconds() == pytest.approx(used, abs=0.5)


def test_instruction_sets_are_read_from_x86_flags_and_from_arm_features(monkeypatch):
    for text, expected in [
        ("model name\t: An x86\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name\t: Second\n", ["avx2", "avx512_vnni"]),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", ["asimd", "asimddp", "i8mm"]),
    ]:
        monkeypatch.setattr(machine, "_read", lambda path, text=text: text if str(path) == "/proc/cpuinfo" else None)
        assert describe_machine()["instruction_sets"] == expected
    monkeypatch.setattr(machine, "_read", lambda path: None)
    assert describe_machine()["instruction_sets"] == []


def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@needs_idle_accounting
def test_a_busy_neighbour_is_seen():
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        watch = CpuWatch.start()
        time.sleep(0.6)
        assert watch.others_cores() > 0.3
    finally:
        neighbour.kill()
        neighbour.wait()


def test_own_work_is_not_counted_as_that_of_others(monkeypatch):
    """With a machine on which only this process works."""
    monkeypatch.setattr(machine, "_used_seconds", machine._own_seconds)
    watch = CpuWatch.start()
    spin(0.2)
    assert watch.others_cores() < BUSY_CORES / 2  # the two clocks are read one after the other


def test_a_run_is_busy_where_any_part_of_it_was():
    assert not is_busy(0.0, BUSY_CORES)
    assert is_busy(0.0, BUSY_CORES + 0.01)
    assert is_busy(1.0, 0.0)


def test_a_run_waits_for_a_quiet_second_but_not_for_ever(monkeypatch):
    used = iter([1.0, 0.5, 0.1, 0.9, 1.0, 1.0, 0.7])
    monkeypatch.setattr(machine, "others_cores_now", lambda: next(used))
    assert machine.quiet_second() == 0.1
    assert machine.quiet_second(patience=4) == 0.7


def test_energy_is_summed_over_packages_and_goes_on_where_a_counter_starts_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    assert machine.EnergyMeter()() is None
    for zone, name, microjoules in (
        ("0", "package-0", 900),
        ("1", "package-1", 50),
        ("2", "psys", 7),
        ("0:0", "core", 3),
    ):
        write(tmp_path / f"class/powercap/intel-rapl:{zone}/name", name)
        write(tmp_path / f"class/powercap/intel-rapl:{zone}/energy_uj", str(microjoules))
        write(tmp_path / f"class/powercap/intel-rapl:{zone}/max_energy_range_uj", "1000")
    meter = machine.EnergyMeter()
    assert meter() == 0
    write(tmp_path / "class/powercap/intel-rapl:0/energy_uj", "100")  # 900 to 1000, and on from 0
    write(tmp_path / "class/powercap/intel-rapl:1/energy_uj", "80")
    write(tmp_path / "class/powercap/intel-rapl:2/energy_uj", "9")
    assert meter() == pytest.approx((200 + 30) / 1e6)
    assert meter() == pytest.approx((200 + 30) / 1e6)


def test_a_run_is_throttled_where_a_core_was_slowed_down_or_the_frequency_fell(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SYSTEM", tmp_path)
    monkeypatch.setattr(machine, "PROCESSES", tmp_path)
    monkeypatch.setattr(machine, "others_cores_now", lambda: 0.0)
    frequency = tmp_path / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
    counter = tmp_path / "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    for before, after, events, throttled in [(2000, 1900, 0, False), (2000, 1700, 0, True), (2000, 2000, 3, True)]:
        write(frequency, str(before * 1000))
        write(counter, "5")
        watch = machine.RunWatch.start()
        write(frequency, str(after * 1000))
        write(counter, str(5 + events))
        marks, state = watch.finish()
        assert marks["throttled"] is throttled
        assert (state["frequency_mhz_before"], state["frequency_mhz_after"]) == (before, after)
        assert state["throttle_events"] == events


def test_a_process_is_kept_to_the_cores_that_it_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        machine.keep_to_cores([min(allowed)])
        assert os.sched_getaffinity(0) == {min(allowed)}
        with pytest.raises(ValueError, match=r"affinity names core 4095; this process may use \d+"):
            machine.keep_to_cores([4095])
    finally:
        os.sched_setaffinity(0, allowed)
