"""Time variants on a device that is reached by SSH: with the user's own OpenSSH client, keys and known hosts.

What is made there stays in ~/.cache/edgewise for the next run: an environment for each set of pinned requirements, and
each model by its hash. Neither is taken for whole before it is. What a run that was cut off left there goes after a
week, what no run has used for a month then.
"""

import contextlib
import hashlib
import io
import json
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from stages.common.errors import UserError
from stages.edge.bundle import STAGES, pinned
from stages.edge.local import Candidate, Timing, refuse_many_threads
from stages.edge.protocol import Protocol
from stages.edge.soak import SoakPlan
from stages.params.edge_benchmark import SSH_TARGET, EdgeBenchmark

SSH = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
ARCHITECTURES = ("x86_64", "aarch64")
"""For which ONNX Runtime has wheels."""
PYTHON = (3, 11)
"""The oldest that the scripts run on."""
REQUIREMENTS = ("onnxruntime", "numpy")
ENVIRONMENT_BYTES = 400 * 10**6
"""Free disk that making an environment takes, downloads included."""
SOURCES = {
    "timing.py": STAGES / "edge/device/timing.py",
    "edgewise_model.py": STAGES / "edge/device/edgewise_model.py",
    **{f"edgewise_{name}.py": STAGES / f"edge/{name}.py" for name in ("machine", "memory", "protocol", "soak")},
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


ENDS_WITH_THE_CONNECTION = "exec 3<&0; (cat <&3; kill 0) >/dev/null 2>&1 & watch=$!; "
"""Before a script that `Device.follow` runs: SSH closes its input when it is cut, and then all that it started ends."""


@dataclass(frozen=True)
class Device:
    target: str
    """As the params name it, for messages."""
    address: tuple[str, ...]
    """The client's own way to name it."""

    def run(self, script: str, content: bytes | None = None) -> str:
        """Run a POSIX shell script there, with `content` as its input; what it prints.

        Raises:
            UserError: if the device cannot be reached, or the script fails there.
        """
        command = [*SSH, *self.address, f"set -e; {script}"]
        done = subprocess.run(command, input=content or b"", capture_output=True, check=False)
        if done.returncode:
            raise self.failure(done.returncode, done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    def follow(self, script: str, say: Callable[[str], None]) -> None:
        """As `run`, but each line goes to `say` as it comes, and the script's input stays open until it has ended."""
        command = [*SSH, *self.address, f"set -e; {script}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            for line in client.stdout:
                say(line.decode(errors="replace").rstrip())
            said = client.stderr.read().decode(errors="replace")
        if client.returncode:
            raise self.failure(client.returncode, said)

    def failure(self, code: int, said: str) -> UserError:
        """The client's exit code and last words in one line; 255 is its own, any other the script's."""
        lines = [line for line in said.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        if code == 255:
            remedy = "is it on, and named right?"
            if "Permission denied" in reason or "verification failed" in reason:
                remedy = "ssh must reach it without a question (keys, known_hosts)"
            return UserError(f"{self.target}: the connection failed or was lost: {reason.strip()}: {remedy}, run again")
        if "No space left" in said:
            return UserError(f"{self.target}: its disk is full ({reason.strip()}): make room there, then run again")
        return UserError(f"{self.target}: {reason.strip()}")


def device_at(target: str) -> Device:
    """From `ssh://[user@]host[:port]`, as the params have checked it."""
    user, host, port = SSH_TARGET.fullmatch(target).groups()
    place = f"{user}@{host}" if user else host
    return Device(target, (*(("-p", port) if port else ()), place))


def time_there(
    target: str,
    candidates: Sequence[Candidate],
    section: EdgeBenchmark,
    protocol: Protocol,
    soaked: tuple[Candidate, np.ndarray, SoakPlan] | None,
    say: Callable[[str], None],
) -> Timing:
    """Time every candidate in ONNX Runtime on the device, in one interleaved run.

    There is no PyTorch there: the baseline of a ratio is the dense float network in ONNX Runtime.

    Raises:
        UserError: if the device cannot be reached, is of a kind that cannot run this, lacks room, or the run fails;
            what was made there before is kept.
    """
    device = device_at(target)

    def say_there(line: str) -> None:
        say(f"{device.address[-1]}: {line}")

    found, held = probe(device)
    check_device(target, found, sum(c.folder.joinpath("model.onnx").stat().st_size for c in candidates))
    refuse_many_threads(protocol.threads, int(found["cores"]))
    home = f"{found['home']}/.cache/edgewise"
    environment = make_environment(device, home, found["python"], held, say_there)
    copy_models(device, home, candidates, held, say_there)
    plan, content = plan_of(home, candidates, section, protocol, soaked)
    used = " ".join(shlex.quote(path) for path in [f"{environment}/complete", *(m["file"] for m in plan["models"])])
    folder = device.run(f"touch {used}; mktemp -d {shlex.quote(home)}/run-XXXXXX").strip()
    try:
        device.run(f"tar xf - -C {shlex.quote(folder)}", _tar({"plan.json": json.dumps(plan).encode(), **content}))
        python = shlex.quote(f"{environment}/bin/python")
        device.follow(f"cd {shlex.quote(folder)}; exec {python} -u timing.py plan.json result.json", say_there)
        timed = json.loads(device.run(f"cat {shlex.quote(folder)}/result.json"))
    except ValueError as error:
        raise UserError(f"{target}: its result cannot be read ({error}): run again") from None
    finally:
        _remove(device, folder)
    rows = {row["variant"]: row["onnx_sha256"] for row in timed["result"]["rows"]}
    if rows != {c.variant: c.onnx_sha256 for c in candidates}:
        raise UserError(f"{target}: its result is about other models than were asked for: run again")
    others = [name for name in section.runtimes if name != "onnxruntime"]
    left_out = [
        {
            "variant": None,
            "runtime": name,
            "reason": f"{name} is not timed on devices: ONNX Runtime alone is",
        }
        for name in others
    ]
    return Timing(timed["result"] | {"left_out": left_out}, timed["windows"], timed["soak"])


def probe(device: Device) -> tuple[dict[str, str], set[str]]:
    """What the device is, and the files that earlier runs left there."""
    pairs = [line.split("=", 1) for line in device.run(PROBE).splitlines() if "=" in line]
    return {key: value for key, value in pairs if key != "has"}, {value for key, value in pairs if key == "has"}


def check_device(target: str, found: dict[str, str], model_bytes: int) -> None:
    """Raise a `UserError` where it cannot run what would be copied there."""
    if found["architecture"] not in ARCHITECTURES:
        raise UserError(
            f"{target} is {found['architecture']}: ONNX Runtime has wheels for {' and '.join(ARCHITECTURES)} only"
        )
    version = tuple(map(int, found["python"].split("."))) if found["python"] else ()
    if version < PYTHON:
        has = f"python3 is {found['python']}" if version else "there is no python3"
        raise UserError(f"{target}: {has}: install Python {'.'.join(map(str, PYTHON))} or later there")
    if found["venv"] != "yes":
        raise UserError(f"{target}: its Python makes no environments: install python3-venv there")
    free, wanted = int(found["free_kb"]) * 1024, ENVIRONMENT_BYTES + model_bytes
    if free < wanted:
        raise UserError(
            f"{target}: {free / 1e6:,.0f} MB are free there, environment and models take up to {wanted / 1e6:,.0f}:"
            " make room"
        )


def make_environment(device: Device, home: str, python: str, held: set[str], say: Callable[[str], None]) -> str:
    """Its folder; made anew where none was finished: one that is still being made for somebody else is not touched."""
    pins = [f"{name}=={pinned(name)}" for name in REQUIREMENTS]
    start = f"{home}/env-{hashlib.sha256(' '.join([python, *pins]).encode()).hexdigest()[:12]}-"
    for path in sorted(held):
        if path.startswith(start):
            return path.removesuffix("/complete")
    say(f"making an environment with {' and '.join(pins)}, once")
    install = f"-m pip install --quiet --no-compile --disable-pip-version-check {' '.join(pins)}"
    told: list[str] = []
    device.follow(
        f'{ENDS_WITH_THE_CONNECTION} folder=$(mktemp -d {shlex.quote(start)}XXXXXX); python3 -m venv "$folder" >&2;'
        f' "$folder/bin/python" {install} >&2; touch "$folder/complete"; echo "$folder"; kill $watch',
        told.append,
    )
    return told[-1]


def copy_models(
    device: Device, home: str, candidates: Sequence[Candidate], held: set[str], say: Callable[[str], None]
) -> None:
    """Those that are not there yet; each appears under its hash when it is whole."""
    missing = {c.onnx_sha256: c.folder / "model.onnx" for c in candidates}
    missing = {sha: path for sha, path in missing.items() if model_path(home, sha) not in held}
    for number, (sha, path) in enumerate(missing.items(), 1):
        say(f"copying model {number} of {len(missing)}, {path.stat().st_size / 1e6:.1f} MB")
        place, content = shlex.quote(model_path(home, sha)), path.read_bytes()
        whole = (
            f'[ "$(wc -c < {place}.partial)" -eq {len(content)} ]'  # a lost connection ends cat as a whole file does
        )
        device.run(f"cat > {place}.partial; {whole}; mv {place}.partial {place}", content)


def model_path(home: str, sha256: str) -> str:
    return f"{home}/models/{sha256}.onnx"


def plan_of(
    home: str,
    candidates: Sequence[Candidate],
    section: EdgeBenchmark,
    protocol: Protocol,
    soaked: tuple[Candidate, np.ndarray, SoakPlan] | None,
) -> tuple[dict, dict[str, bytes]]:
    """What timing.py is told, and the files that go with it."""
    content = {name: path.read_bytes() for name, path in SOURCES.items()}
    soak = None
    if soaked is not None:
        candidate, images, plan = soaked
        stored = io.BytesIO()
        np.save(stored, images)
        content["soak.npy"] = stored.getvalue()
        soak = {"variant": candidate.variant, "file": "soak.npy", "plan": asdict(plan)}
    models = [
        {
            "variant": c.variant,
            "baseline": c.baseline,
            "file": model_path(home, c.onnx_sha256),
            "image_size": c.image_size,
            "onnx_sha256": c.onnx_sha256,
        }
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


def _remove(device: Device, folder: str) -> None:
    """The run's own folder; one that cannot be removed now, for want of a connection, does no harm."""
    with contextlib.suppress(UserError):
        device.run(f"rm -rf {shlex.quote(folder)}")
