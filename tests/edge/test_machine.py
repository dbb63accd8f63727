import json
import os
import subprocess
import sys
import time

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
