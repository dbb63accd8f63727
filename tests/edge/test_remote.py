"""With a real OpenSSH server on loopback, whose 'device' is a home folder of its own with the python3 of the tests."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from toy_project import compressed_project

from stages import edge_benchmark
from stages.common import paths
from stages.common.errors import UserError
from stages.edge import remote
from stages.edge.remote import Device, check_device, probe
from stages.edge.soak import SoakPlan

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
needs_server = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="no OpenSSH server here: apt install openssh-server"
)
FP32, INT8 = "toy-none-fp32", "toy-none-int8"
PYTHON3 = """#!/bin/sh
# makes environments without a network, from the interpreter of the tests and a pip that does nothing
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
        """Add a program that the device finds before that of the system."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def cut(self) -> None:
        """End all connections."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a child ends with its parent
                if process.name().startswith("sshd"):
                    process.kill()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A device, and a client that can log in to it."""
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
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = compressed_project(tmp_path / "project")
    monkeypatch.chdir(folder)
    protocol_of = edge_benchmark.protocol_of
    quick = {"start_up_runs": 1, "quiet_seconds": 1}
    monkeypatch.setattr(edge_benchmark, "protocol_of", lambda section: replace(protocol_of(section), **quick))
    return folder


def run_on(target, **edge_benchmark_params):
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["edge_benchmark"] |= {"target": target} | edge_benchmark_params
    Path("params.yaml").write_text(yaml.safe_dump(params))
    edge_benchmark.main()
    return json.loads((paths.EDGE / "edge.json").read_text())


@needs_server
def test_a_device_is_timed_with_onnx_runtime_as_the_baseline_and_reuses_its_environment(server, project, capsys):
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
    assert kept == ["env", "models"]  # without the folder of the run
    used = [*server.home.glob(".cache/edgewise/env-*/complete"), *server.home.glob(".cache/edgewise/models/*.onnx")]
    assert len(used) == 3
    for path in used:
        os.utime(path, (time.time() - 20 * 24 * 3600,) * 2)

    run_on(server.target)
    assert (server.home / "environments").read_text() == "made\n"  # once
    printed = capsys.readouterr().out
    assert "copying" not in printed
    assert "making an environment" not in printed
    assert all(path.stat().st_mtime > time.time() - 3600 for path in used)  # or they would count as unused


@needs_server
def test_old_remains_and_unused_files_are_removed_and_nothing_else(server, project):
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
    probe(Device(server.target))
    assert sorted(path.name for path in kept.iterdir()) == ["env-new", "env-used", "models", "run-new"]
    assert [path.name for path in (kept / "models").iterdir()] == ["used.onnx"]


@needs_server
def test_an_incomplete_environment_is_not_used_and_its_installation_ends_with_the_connection(server, project):
    (server.home / "pip").write_text("echo 'ERROR: No matching distribution found for onnxruntime' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"ssh://.*: ERROR: No matching distribution found for onnxruntime$"):
        run_on(server.target)
    (server.home / "pip").write_text('touch "$HOME/installing"; sleep 60.5 & wait\n')

    def cut_while_installing():
        _wait_for(lambda: (server.home / "installing").exists())
        server.cut()

    cutter = threading.Thread(target=cut_while_installing)
    cutter.start()
    with pytest.raises(UserError, match="the connection failed or was lost"):
        run_on(server.target)
    cutter.join()
    _wait_for(lambda: not _processes("sleep 60.5"))
    assert not list(server.home.glob(".cache/edgewise/env-*/complete"))
    (server.home / "pip").write_text("exit 0\n")
    assert run_on(server.target)["rows"]
    assert (server.home / "environments").read_text() == "made\n" * 3


@needs_server
def test_a_failed_connection_is_an_error_in_one_line_and_keeps_the_last_figures(server, project):
    paths.EDGE.mkdir(parents=True)
    (paths.EDGE / "edge.json").write_text("the last figures")
    (server.folder / "authorized").write_text("")
    cases = [(server.target, "Permission denied")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cases.append((f"ssh://127.0.0.1:{free.getsockname()[1]}", "Connection refused"))
        for target, words in cases:
            with pytest.raises(UserError, match=f"{target}: the connection failed or was lost: .*{words}") as caught:
                run_on(target)
            assert "\n" not in str(caught.value)
    (server.folder / "known").write_text("")
    with pytest.raises(UserError, match="Host key verification failed"):
        run_on(server.target)
    assert (paths.EDGE / "edge.json").read_text() == "the last figures"


@needs_server
def test_a_model_that_was_copied_in_part_or_damaged_later_is_copied_again(server, project, monkeypatch):
    sent = remote.Device.run

    def cut(device, script, content=None):
        return sent(device, script, content[:1000] if content and ".partial" in script else content)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Device, "run", cut)
        with pytest.raises(UserError):
            run_on(server.target)
    models = server.home / ".cache/edgewise/models"
    assert not list(models.glob("*.onnx"))
    assert len(run_on(server.target)["rows"]) == 2
    damaged = next(models.glob("*.onnx"))
    damaged.write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"was not the model.onnx of toy-none-.* removed: run again"):
        run_on(server.target)
    assert not damaged.exists()


@needs_server
def test_after_a_lost_connection_nothing_runs_on_the_device(server, project, monkeypatch):
    running = []

    def cut(line):
        if "timing" in line:
            running[:] = _processes("timing.py plan.json")
            server.cut()

    monkeypatch.setattr(edge_benchmark, "log", cut)
    with pytest.raises(UserError, match="the connection failed or was lost"):
        run_on(server.target, window_seconds=5.0)
    assert running
    _wait_for(lambda: not _processes("timing.py plan.json"))
    assert not paths.EDGE.exists()


def _processes(words):
    """Other processes whose command line contains `words`."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if words in " ".join(p.info["cmdline"] or ()) and p.pid != os.getpid()]


@needs_server
def test_a_full_disk_and_an_unsupported_device_are_refused(server, project):
    server.program("df", "#!/bin/sh\nprintf 'head\\nfs 9 9 1000 9%% /\\n'\n")
    with pytest.raises(UserError, match=r"ssh://.*: 1 MB are free, .* 400: make room"):
        run_on(server.target)
    (server.folder / "bin/df").unlink()
    server.program("tar", "#!/bin/sh\necho 'tar: plan.json: Cannot write: No space left on device' >&2; exit 2\n")
    with pytest.raises(UserError, match=r"its disk is full \(tar: plan.json: Cannot write.*\): make room there"):
        run_on(server.target)
    server.program("uname", "#!/bin/sh\necho armv7l\n")
    with pytest.raises(UserError, match=r"is armv7l.*x86_64 and aarch64"):
        run_on(server.target)


GOOD = {"architecture": "aarch64", "python": "3.11.2", "venv": "yes", "free_kb": "9000000", "cores": "4"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"python": "3.9.2"}, r"python3 is 3.9.2: install Python 3.11 or later"),
        ({"python": ""}, r"there is no python3: install Python 3.11"),
        ({"venv": ""}, r"install python3-venv there"),
    ],
)
def test_an_unsuitable_python_is_refused_with_the_remedy(wrong, words):
    check_device("ssh://pi", GOOD, 10**6)
    with pytest.raises(UserError, match=words):
        check_device("ssh://pi", GOOD | wrong, 10**6)


def test_the_images_of_the_soak_accompany_the_plan(project):
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
