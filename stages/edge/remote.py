"""Time variants on a device over SSH, with the user's own OpenSSH client, keys and known hosts.

The folder ~/.cache/edgewise on the device keeps, for the next run, an environment for each set of pinned requirements
and each model under its hash. Neither counts before it is complete. Remains of an interrupted run are removed after a
week, unused environments and models after a month.
"""

import contextlib
import hashlib
import io
import json
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np

from stages.common.errors import UserError
from stages.edge.bundle import STAGES, pinned
from stages.edge.local import Candidate, Soaked, Timing, refuse_many_threads
from stages.edge.protocol import Log, Protocol
from stages.params.edge_benchmark import EdgeBenchmark

SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
ARCHITECTURES = ("x86_64", "aarch64")  # with wheels of ONNX Runtime
PYTHON = (3, 11)  # the oldest version that runs the scripts
REQUIREMENTS = ("onnxruntime", "numpy", "psutil")
ENVIRONMENT_BYTES = 400 * 10**6  # disk space for a new environment, downloads included
SOURCES = {
    "timing.py": STAGES / "edge/device/timing.py",
    "edgewise_model.py": STAGES / "edge/device/edgewise_model.py",
    **{f"edgewise_{name}.py": STAGES / f"edge/{name}.py" for name in ("machine", "protocol", "soak")},
}
PROBE = """
printf '%s\\n' "architecture=$(uname -m)" "home=$HOME"
printf '%s\\n' "python=$(python3 -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)"
printf '%s\\n' "venv=$(python3 -c 'import ensurepip, venv; print("yes")' 2>/dev/null)"
printf '%s\\n' "cores=$(python3 -c 'import os; print(len(os.sched_getaffinity(0)))' 2>/dev/null)"
kept="$HOME/.cache/edgewise"
mkdir -p "$kept/models"
for folder in "$kept"/run-* "$kept"/env-*; do
  used="$folder" days=6
  if [ -e "$folder/complete" ]; then used="$folder/complete" days=29; fi
  if [ -n "$(find "$used" -prune -mtime +$days 2>/dev/null)" ]; then rm -rf "$folder"; fi
done
find "$kept/models" -type f -mtime +29 -exec rm -f {} +
printf '%s\\n' "free_kb=$(df -Pk "$kept" | awk 'END {print $4}')"
for file in "$kept"/models/*.onnx "$kept"/*/complete; do echo "has=$file"; done
"""


@dataclass(frozen=True)
class Device:
    target: str  # `ssh://[user@]host[:port]`, which OpenSSH takes as it is

    def run(self, script: str, content: bytes | None = None) -> str:
        """The output of a POSIX shell script with `content` as its input; a `UserError` if the run fails."""
        command = [*SSH, self.target, f"set -e; {script}"]
        done = subprocess.run(command, input=content or b"", capture_output=True, check=False)
        if done.returncode:
            raise self.failure(done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    def follow(self, script: str, log: Log) -> None:
        """Like `run`, but pass each line of output to `log` at once, and keep the script's input open until it ends."""
        command = [*SSH, self.target, f"set -e; {script}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            assert client.stdout is not None
            assert client.stderr is not None
            for line in client.stdout:
                log(line.decode(errors="replace").rstrip())
            errors = client.stderr.read().decode(errors="replace")
        if client.returncode:
            raise self.failure(client.returncode, errors)

    def failure(self, code: int, errors: str) -> UserError:
        """The last line of the error output. Exit code 255 comes from the SSH client, any other from the script."""
        lines = [line for line in errors.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        if code == 255:
            remedy = "is it on, and is its name correct?"
            if "Permission denied" in reason or "verification failed" in reason:
                remedy = "ssh must log in without a prompt (keys, known_hosts)"
            return UserError(f"{self.target}: the connection failed or was lost: {reason.strip()}: {remedy}, run again")
        if "No space left" in errors:
            return UserError(f"{self.target}: its disk is full ({reason.strip()}): make room there, then run again")
        return UserError(f"{self.target}: {reason.strip()}")


def time_there(
    candidates: Sequence[Candidate], section: EdgeBenchmark, protocol: Protocol, soaked: Soaked | None, log: Log
) -> Timing:
    """Time every candidate in ONNX Runtime on the device, in one interleaved run.

    The device has no PyTorch, so the baseline of a ratio is the dense float network in ONNX Runtime.

    Raises a `UserError` if the device is not reachable, not supported or full, or the run fails. The environment and
    the models stay on the device.
    """
    target = section.target
    device = Device(target)

    def log_device(line: str) -> None:
        log(f"{urlsplit(target).hostname}: {line}")

    found, held = probe(device)
    check_device(target, found, sum(c.folder.joinpath("model.onnx").stat().st_size for c in candidates))
    refuse_many_threads(protocol.threads, int(found["cores"]))
    home = f"{found['home']}/.cache/edgewise"
    environment = make_environment(device, home, found["python"], held, log_device)
    copy_models(device, home, candidates, held, log_device)
    plan, content = plan_of(home, candidates, section, protocol, soaked)
    used = " ".join(shlex.quote(path) for path in [f"{environment}/complete", *(m["file"] for m in plan["models"])])
    folder = device.run(f"touch {used}; mktemp -d {shlex.quote(home)}/run-XXXXXX").strip()
    try:
        device.run(f"tar xf - -C {shlex.quote(folder)}", _tar({"plan.json": json.dumps(plan).encode(), **content}))
        python = shlex.quote(f"{environment}/bin/python")
        device.follow(f"cd {shlex.quote(folder)}; exec {python} -u timing.py plan.json result.json", log_device)
        timed = json.loads(device.run(f"cat {shlex.quote(folder)}/result.json"))
    finally:
        with contextlib.suppress(UserError):  # without a connection the folder stays, which does no harm
            device.run(f"rm -rf {shlex.quote(folder)}")
    others = [name for name in section.runtimes if name != "onnxruntime"]
    reason = "on devices, only ONNX Runtime is timed"
    left_out = [{"variant": None, "runtime": name, "reason": f"{name}: {reason}"} for name in others]
    return Timing(timed["result"] | {"left_out": left_out}, timed["windows"], timed["soak"])


def probe(device: Device) -> tuple[dict[str, str], set[str]]:
    """Properties of the device, and the files of earlier runs on it. Removes old files there."""
    pairs = [line.split("=", 1) for line in device.run(PROBE).splitlines() if "=" in line]
    return {key: value for key, value in pairs if key != "has"}, {value for key, value in pairs if key == "has"}


def check_device(target: str, found: dict[str, str], model_bytes: int) -> None:
    """Raise a `UserError` if the device cannot run the models."""
    if found["architecture"] not in ARCHITECTURES:
        wheels = " and ".join(ARCHITECTURES)
        raise UserError(f"{target} is {found['architecture']}, but ONNX Runtime has wheels only for {wheels}")
    version = tuple(map(int, found["python"].split("."))) if found["python"] else ()
    if version < PYTHON:
        has = f"python3 is {found['python']}" if version else "there is no python3"
        raise UserError(f"{target}: {has}: install Python {'.'.join(map(str, PYTHON))} or later there")
    if found["venv"] != "yes":
        raise UserError(f"{target}: its Python cannot make environments: install python3-venv there")
    free, wanted = int(found["free_kb"]) * 1024 / 1e6, (ENVIRONMENT_BYTES + model_bytes) / 1e6
    if free < wanted:
        needs = f"the environment and the models need up to {wanted:,.0f}"
        raise UserError(f"{target}: {free:,.0f} MB are free, but {needs}: make room there")


def make_environment(device: Device, home: str, python: str, held: set[str], log: Log) -> str:
    """The folder of a complete environment, new if there is none: an incomplete one may belong to another run."""
    pins = [f"{name}=={pinned(name)}" for name in REQUIREMENTS]
    start = f"{home}/env-{hashlib.sha256(' '.join([python, *pins]).encode()).hexdigest()[:12]}-"
    for path in sorted(held):
        if path.startswith(start):
            return path.removesuffix("/complete")
    log(f"making an environment with {' and '.join(pins)}, once")
    install = f"-m pip install --quiet --no-compile --disable-pip-version-check {' '.join(pins)}"
    printed: list[str] = []
    # SSH closes the script's input when the connection is lost, and then `kill 0` ends the installation
    device.follow(
        f"exec 3<&0; (cat <&3; kill 0) >/dev/null 2>&1 & watch=$!; folder=$(mktemp -d {shlex.quote(start)}XXXXXX);"
        f' python3 -m venv "$folder" >&2; "$folder/bin/python" {install} >&2; touch "$folder/complete";'
        ' echo "$folder"; kill $watch',
        printed.append,
    )
    return printed[-1]


def copy_models(device: Device, home: str, candidates: Sequence[Candidate], held: set[str], log: Log) -> None:
    """Copy the models that the device lacks; each gets its final name when it is complete."""
    files = {f"{home}/models/{c.onnx_sha256}.onnx": c.folder / "model.onnx" for c in candidates}
    missing = {place: file for place, file in files.items() if place not in held}
    for number, (place, file) in enumerate(missing.items(), 1):
        content, quoted = file.read_bytes(), shlex.quote(place)
        log(f"copying model {number} of {len(missing)}, {len(content) / 1e6:.1f} MB")
        # after a lost connection cat ends as after a complete file
        complete = f'[ "$(wc -c < {quoted}.partial)" -eq {len(content)} ]'
        device.run(f"cat > {quoted}.partial; {complete}; mv {quoted}.partial {quoted}", content)


def plan_of(
    home: str, candidates: Sequence[Candidate], section: EdgeBenchmark, protocol: Protocol, soaked: Soaked | None
) -> tuple[dict, dict[str, bytes]]:
    """The plan for timing.py, and the files that it needs."""
    content = {name: path.read_bytes() for name, path in SOURCES.items()}
    soak = None
    if soaked is not None:
        candidate, images, plan = soaked
        stored = io.BytesIO()
        np.save(stored, images)
        content["soak.npy"] = stored.getvalue()
        soak = {"variant": candidate.variant, "file": "soak.npy", "plan": asdict(plan)}
    models = [
        {"variant": c.variant, "baseline": c.baseline, "file": f"{home}/models/{c.onnx_sha256}.onnx"}
        | {"onnx_sha256": c.onnx_sha256}
        for c in candidates
    ]
    return {"protocol": asdict(protocol), "affinity": section.affinity, "models": models, "soak": soak}, content


def _tar(content: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, value in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(value)
            archive.addfile(entry, io.BytesIO(value))
    return packed.getvalue()
