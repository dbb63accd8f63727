"""Against a real OpenSSH server on loopback, whose 'device' is a home folder of its own with a python3 of the tests."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_project import compressed_project

from stages import edge_benchmark
from stages.common import paths
from stages.common.errors import UserError
from stages.edge import remote
from stages.edge.remote import check_device, device_at, probe
from stages.edge.soak import SoakPlan

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
needs_server = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="no OpenSSH server here: apt install openssh-server"
)
FP32, INT8 = "toy-none-fp32", "toy-none-int8"
PYTHON3 = """#!/bin/sh
# makes environments without a network: the interpreter of the tests, and a pip that does nothing
if [ "$1 $2" = "-m venv" ]; then
    echo made >> "$HOME/environments"
    mkdir -p "$3/bin"
    cp "$HOME/python" "$3/bin/python"
    chmod +x "$3/bin/python"
    exit 0
fi
exec {python} "$@"
"""
PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then exec sh "$HOME/pip"; fi
exec {python} "$@"
"""


@dataclass
class Server:
    folder: Path
    port: int
    process: subprocess.Popen

    @property
    def target(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def program(self, name: str, text: str) -> None:
        """One that the device finds before the system's."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A device, and a client that reaches it."""
    folder = tmp_path / "server"
    (folder / "bin").mkdir(parents=True)
    (folder / "home").mkdir()
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copyfile(folder / "user.pub", folder / "authorized")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    path = f"{folder}/bin:{os.environ['PATH']}"
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder}/host",
        f"AuthorizedKeysFile {folder}/authorized",
        f"PidFile {folder}/pid",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "UsePAM no",
        "StrictModes no",
        "PermitRootLogin yes",
        f'SetEnv HOME={folder}/home "PATH={path}"',
    ]
    (folder / "config").write_text("\n".join(lines) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=(folder / "log").open("w"))
    made = Server(folder, port, process)
    made.program("python3", PYTHON3.format(python=sys.executable))
    (made.home / "python").write_text(PYTHON.format(python=sys.executable))
    (made.home / "pip").write_text("exit 0\n")
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    known, key = f"UserKnownHostsFile={folder}/known", f"IdentityFile={folder}/user"
    own = ("-F", "none", "-o", known, "-o", key, "-o", "IdentitiesOnly=yes")
    monkeypatch.setattr(remote, "SSH", (*remote.SSH, *own))
    _wait_for(lambda: _listens(port))
    yield made
    process.terminate()
    process.wait()


def _listens(port):
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = compressed_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def run_on(target, **edge_benchmark_params):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["edge_benchmark"] |= {"target": target} | edge_benchmark_params
    Path("params.yaml").write_text(yaml.safe_dump(params))
    edge_benchmark.main()
    return json.loads((paths.EDGE / "edge.json").read_text())


@needs_server
def test_numbers_come_back_with_the_device_and_a_baseline_that_it_has(server, project, capsys):
    soak = {"variant": INT8, "minutes": 0.005, "window_seconds": 0.05}
    edge = run_on(server.target, runtimes=["onnxruntime", "openvino"], soak=soak)
    assert edge["target"] == server.target
    rows = {row["variant"]: row for row in edge["rows"]}
    assert list(rows) == [FP32, INT8]
    for row in rows.values():
        assert (row["runtime"], row["baseline"], row["baseline_runtime"]) == ("onnxruntime", FP32, "onnxruntime")
        assert 0 < row["latency_ms_min"] <= row["latency_ms_p50"]
        assert row["load_ms"] > 0
        assert 20 * 2**20 < row["peak_rss_bytes"] < 2**30
    assert rows[FP32]["latency_ratio"] == 1
    assert edge["machine"]["cpu"]
    assert "torch" not in edge["machine"]
    assert [entry["runtime"] for entry in edge["left_out"]] == ["openvino"]
    assert edge["soak"]["wrong"] == 0
    assert len((paths.EDGE / "windows.csv").read_text().splitlines()) == 1 + 2 * 2
    assert "127.0.0.1: timing 2 contenders" in capsys.readouterr().out
    kept = sorted(path.name.split("-")[0] for path in (server.home / ".cache/edgewise").iterdir())
    assert kept == ["env", "models"]  # the run's own folder is gone

    run_on(server.target)
    assert (server.home / "environments").read_text() == "made\n"  # once
    said = capsys.readouterr().out
    assert "copying" not in said
    assert "making an environment" not in said


@needs_server
def test_an_environment_that_was_not_finished_is_made_again(server, project):
    (server.home / "pip").write_text("echo 'ERROR: No matching distribution found for onnxruntime' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"ssh://.*: ERROR: No matching distribution found for onnxruntime$"):
        run_on(server.target)
    (server.home / "pip").write_text("exit 0\n")
    assert run_on(server.target)["rows"]
    assert (server.home / "environments").read_text() == "made\nmade\n"


@needs_server
def test_what_was_cut_off_long_ago_is_removed_and_nothing_else(server, project):
    kept = server.home / ".cache/edgewise"
    day = 24 * 3600
    for name, age in {"run-old": 8, "env-old": 8, "env-used": 40, "env-unused": 40, "run-new": 1, "env-new": 1}.items():
        (kept / name).mkdir(parents=True)
        if name in ("env-used", "env-unused"):
            (kept / name / "complete").touch()
        os.utime(kept / name, (time.time() - age * day,) * 2)
    os.utime(kept / "env-unused/complete", (time.time() - 31 * day,) * 2)
    (kept / "models").mkdir()
    for name, age in {"used.onnx": 8, "unused.onnx": 31, "cut.onnx.partial": 31}.items():
        (kept / "models" / name).touch()
        os.utime(kept / "models" / name, (time.time() - age * day,) * 2)
    probe(device_at(server.target))
    assert sorted(path.name for path in kept.iterdir()) == ["env-new", "env-used", "models", "run-new"]
    assert [path.name for path in (kept / "models").iterdir()] == ["used.onnx"]


@needs_server
def test_what_a_run_uses_counts_as_used(server, project):
    run_on(server.target)
    kept = server.home / ".cache/edgewise"
    used = [*kept.glob("env-*/complete"), *kept.glob("models/*.onnx")]
    for path in used:
        os.utime(path, (time.time() - 20 * 24 * 3600,) * 2)
    run_on(server.target)
    assert len(used) == 3
    assert all(path.stat().st_mtime > time.time() - 3600 for path in used)


@needs_server
def test_an_installation_ends_with_the_connection_and_is_not_taken_for_whole(server, project, monkeypatch):
    (server.home / "pip").write_text('touch "$HOME/installing"; sleep 60 & wait\n')

    def cut_while_installing():
        _wait_for(lambda: (server.home / "installing").exists())
        for process in _processes("sshd") & _descendants(server.process.pid):
            os.kill(process, signal.SIGKILL)

    cutter = threading.Thread(target=cut_while_installing)
    cutter.start()
    with pytest.raises(UserError, match="the connection failed or was lost"):
        run_on(server.target)
    cutter.join()
    _wait_for(lambda: not _processes("sleep 60"))
    assert not list(server.home.glob(".cache/edgewise/env-*/complete"))
    (server.home / "pip").write_text("exit 0\n")
    assert run_on(server.target)["rows"]


@needs_server
def test_a_connection_that_cannot_be_made_ends_in_one_line_and_keeps_the_last_numbers(server, project, monkeypatch):
    paths.EDGE.mkdir(parents=True)
    (paths.EDGE / "edge.json").write_text("the last good ones")
    (server.folder / "authorized").write_text("")
    cases = [(server.target, "Permission denied")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cases.append((f"ssh://127.0.0.1:{free.getsockname()[1]}", "Connection refused"))
        for target, words in cases:
            with pytest.raises(UserError, match=f"{target}: the connection failed or was lost: .*{words}") as told:
                run_on(target)
            assert "\n" not in str(told.value)
    (server.folder / "known").write_text("")
    with pytest.raises(UserError, match="Host key verification failed"):
        run_on(server.target)
    assert (paths.EDGE / "edge.json").read_text() == "the last good ones"


@needs_server
def test_a_model_whose_copy_was_cut_off_is_copied_again(server, project, monkeypatch):
    sent = remote.Device.run

    def cut(device, script, content=None):
        return sent(device, script, content[:1000] if content and ".partial" in script else content)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Device, "run", cut)
        with pytest.raises(UserError):
            run_on(server.target)
    assert not list((server.home / ".cache/edgewise/models").glob("*.onnx"))
    assert len(run_on(server.target)["rows"]) == 2


@needs_server
def test_a_connection_lost_midway_ends_in_one_line_and_nothing_goes_on_there(server, project, monkeypatch):
    running = []

    def cut(line):
        if "timing" in line:
            running[:] = _processes("timing.py plan.json")
            for process in _processes("sshd") & _descendants(server.process.pid):
                os.kill(process, signal.SIGKILL)

    monkeypatch.setattr(edge_benchmark, "say", cut)
    with pytest.raises(UserError, match="the connection failed or was lost"):
        run_on(server.target, window_seconds=5.0)
    assert running
    _wait_for(lambda: not _processes("timing.py plan.json"))
    assert not paths.EDGE.exists()


def _processes(words):
    """Numbers of the processes whose command line holds `words`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if words in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                found.add(int(folder.name))
    return found - {os.getpid()}


def _descendants(parent):
    found = {parent}
    while True:
        more = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) in found:
                    more.add(int(folder.name))
        if more <= found:
            return found - {parent}
        found |= more


@needs_server
def test_a_full_disk_and_a_wrong_device_are_named(server, project):
    server.program("df", "#!/bin/sh\nprintf 'head\\nfs 9 9 1000 9%% /\\n'\n")
    with pytest.raises(UserError, match=r"ssh://.*: 1 MB are free there, environment and models take up to 400: make"):
        run_on(server.target)
    (server.folder / "bin/df").unlink()
    server.program("tar", "#!/bin/sh\necho 'tar: plan.json: Cannot write: No space left on device' >&2; exit 2\n")
    with pytest.raises(UserError, match=r"its disk is full \(tar: plan.json: Cannot write.*\): make room there"):
        run_on(server.target)
    server.program("uname", "#!/bin/sh\necho armv7l\n")
    with pytest.raises(UserError, match="is armv7l: ONNX Runtime has wheels for x86_64 and aarch64 only"):
        run_on(server.target)


@needs_server
def test_a_damaged_model_is_not_timed(server, project):
    run_on(server.target)
    damaged = next((server.home / ".cache/edgewise/models").glob("*.onnx"))
    damaged.chmod(damaged.stat().st_mode | stat.S_IWUSR)
    damaged.write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"was not the model.onnx of toy-none-.* and is removed: run again"):
        run_on(server.target)
    assert len(run_on(server.target)["rows"]) == 2


GOOD = {"architecture": "aarch64", "python": "3.11.2", "venv": "yes", "free_kb": "9000000", "cores": "4"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"python": "3.9.2"}, r"python3 is 3.9.2: install Python 3.11 or later"),
        ({"python": ""}, r"there is no python3: install Python 3.11"),
        ({"venv": ""}, r"install python3-venv there"),
    ],
)
def test_a_device_that_cannot_run_it_is_refused_with_the_remedy(wrong, words):
    check_device("ssh://pi", GOOD, 10**6)
    with pytest.raises(UserError, match=words):
        check_device("ssh://pi", GOOD | wrong, 10**6)


def test_user_and_port_are_those_of_the_target():
    assert device_at("ssh://pi@raspberry.local:2222").address == ("-p", "2222", "pi@raspberry.local")
    assert device_at("ssh://raspberry/").address == ("raspberry",)


def test_the_soaks_images_go_with_the_plan(project):
    candidates = edge_benchmark.candidates_of(edge_benchmark.load_params(edge_benchmark.Params))
    section = edge_benchmark.load_params(edge_benchmark.Params).edge_benchmark
    images = np.arange(2 * 24 * 24 * 3, dtype=np.uint8).reshape(2, 24, 24, 3)
    protocol = edge_benchmark.protocol_of(section)
    plan, content = remote.plan_of(
        "/home/pi", candidates, section, protocol, (candidates[1], images, SoakPlan(60, 0, 5))
    )
    assert plan["soak"] == {
        "variant": INT8,
        "file": "soak.npy",
        "plan": {"seconds": 60, "images_per_second": 0, "window_seconds": 5},
    }
    assert {"timing.py", "edgewise_protocol.py", "edgewise_soak.py", "soak.npy"} <= content.keys()
    assert plan["models"][1]["file"].startswith("/home/pi/models/")
