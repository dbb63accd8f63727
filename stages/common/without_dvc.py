"""Run stages in order on a machine without DVC, and leave where their results come from in `reports/provenance.json`.

    PYTHONPATH=<root> python -m stages.common.without_dvc [--resume] [--jobs N] [stage ...]

A stage is named as `dvc stage list` does: `download`, `finetune@<model>`, `prune@<pruning>`, `quantize@<variant>`,
`profile@<variant>`, `edge-benchmark`, `report`; a bare `finetune` is all of its entries, and without names the whole
pipeline runs. With several jobs a stage starts as soon as those that it needs are done; the edge benchmark has the
machine to itself. No stage starts after one has failed. The provenance tells, for each stage that ended well: the
commit, the sha256 of params.yaml and of the artifact that it wrote, seconds, the GPU and the versions of the libraries.
Where the code came without its repository, the environment variable EDGEWISE_COMMIT names its commit.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from stages.common import paths
from stages.common.errors import INTERRUPTED, UserError, run_stage
from stages.common.files import sha256_of, write_json
from stages.params.load import load_params
from stages.params.whole import Params

PROVENANCE = paths.REPORTS / "provenance.json"
DIRTY = "-dirty"
LIBRARIES = ("torch", "torchvision", "timm", "only-train-once", "onnx", "onnxruntime", "numpy")
ARTIFACTS = {"finetune": paths.dense, "prune": paths.pruned, "quantize": paths.compressed}
OUTS = {
    "download": lambda _: paths.IMAGES,
    "finetune": paths.dense_curve,
    "prune": paths.pruned_curve,
    "quantize": paths.compressed_curve,
    "profile": paths.profile,
    "edge-benchmark": lambda _: paths.EDGE,
    "report": lambda _: paths.REPORTS / "index.html",
}
"""What each stage leaves beside its artifact, by which it is seen whether it is still there."""
TERMINATED = 128 + signal.SIGTERM  # exit code, as a shell reports it
_under_way: set[subprocess.Popen] = set()


def all_stages(params: Params) -> list[str]:
    """The pipeline's stages in an order in which they can run."""
    each = {
        "finetune": params.models,
        "prune": params.pruned,
        "quantize": params.variants,
        "profile": params.variants,
    }
    named = [f"{stage}@{key}" for stage, entries in each.items() for key in entries]
    return ["download", *named, "edge-benchmark", "report"]


def chosen(names: list[str], params: Params) -> list[str]:
    """The stages that `names` ask for, in the pipeline's order.

    Raises:
        UserError: for a name that is none.
    """
    known = all_stages(params)
    if unknown := [name for name in names if name not in known and not any(k.startswith(f"{name}@") for k in known)]:
        raise UserError(f"{unknown[0]}: is no stage of {paths.PARAMS}; its stages: {', '.join(known)}")
    return [stage for stage in known if not names or stage in names or stage.partition("@")[0] in names]


def needs(stage: str, params: Params) -> set[str]:
    """All stages that have to be done before this one, however far back."""
    name, _, key = stage.partition("@")
    match name:
        case "download":
            return set()
        case "finetune":
            before = "download"
        case "prune":
            before = f"finetune@{params.pruned[key].model}"
        case "quantize":
            before = f"prune@{params.variants[key].pruned}"
        case "profile":
            before = f"quantize@{key}"
        case _:  # alone on the machine, when all else is done
            return set(itertools.takewhile(lambda other: other != stage, all_stages(params)))
    return {before} | needs(before, params)


def run_all(stages: list[str], params: Params, jobs: int, done: Callable[[str, dict[str, object]], None]) -> None:
    """Run `stages`, `jobs` at a time, in their order where it is free; `done` is told of each that ended well.

    Raises:
        UserError: of the first that failed, when those under way have ended.
    """
    waiting, running, failed = list(stages), {}, None
    with ThreadPoolExecutor(jobs) as pool:
        while running or (waiting and failed is None):
            for stage in list(waiting) if failed is None else []:
                if len(running) < jobs and not needs(stage, params) & {*waiting, *running.values()}:
                    waiting.remove(stage)
                    running[pool.submit(run, stage)] = stage
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    done(stage, future.result())
                except UserError as error:
                    failed = failed or error
    if failed is not None:
        raise failed


def run(stage: str) -> dict[str, object]:
    """Run one stage as DVC would; what there is to tell of it.

    Raises:
        UserError: if it fails, with its name: it has told the reason itself.
    """
    name, _, key = stage.partition("@")
    started = time.time()
    command = [sys.executable, "-m", f"stages.{name.replace('-', '_')}", *([key] if key else [])]
    with subprocess.Popen(command) as process:
        _under_way.add(process)
        code = process.wait()
    _under_way.discard(process)
    if code:
        raise UserError(f"{stage}: ended with exit code {code}; the stages before it are done")
    told: dict[str, object] = {"seconds": round(time.time() - started, 1), "finished": round(time.time())}
    if artifact := hashes(stage):
        told["sha256"] = artifact
    return told


def _end_all(*_: object) -> None:
    """End the stages under way with this process: a time limit ends only the one that it started."""
    for process in tuple(_under_way):
        process.terminate()
    sys.exit(TERMINATED)


def hashes(stage: str) -> dict[str, str]:
    """The SHA-256 of every file of a stage's artifact, by name; empty where there is none."""
    name, _, key = stage.partition("@")
    if name not in ARTIFACTS:
        return {}
    folder = ARTIFACTS[name](key)
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return {file.name: sha256_of(file) for file in files}


def surroundings() -> dict[str, object]:
    """Where and with what the stages run."""
    return {
        "commit": commit(),
        "params_sha256": sha256_of(paths.PARAMS),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def commit(*others: Path) -> str | None:
    """The commit that holds the code, and these other files, marked where it does not; None where there is none."""
    git = ("git", "-C", str(Path(__file__).parents[1]))  # reports may have changed: a run has written them
    name = _output(*git, "rev-parse", "HEAD")
    changes = _output(*git, "status", "--porcelain", ".", *(str(other.resolve()) for other in others))
    return os.environ.get("EDGEWISE_COMMIT") or (f"{name}{DIRTY}" if changes else name)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="stage")
    parser.add_argument("--resume", action="store_true", help="leave out what the provenance has from these params")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="stages that run at once (1)")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: must be at least 1")
    params, around = load_params(Params), surroundings()
    told, dirty = _told_before(), str(around["commit"]).endswith(DIRTY)
    if arguments.resume and dirty:
        print("the code has changes that no commit holds: nothing is taken as done")

    def is_of_these(stage: str) -> bool:
        return all(told[stage].get(name) == around[name] for name in ("commit", "params_sha256"))

    def is_done(stage: str, kept: set[str]) -> bool:
        """Whether it was made by these, is still there, and stands on what is `kept` and was not made again since."""
        if dirty or stage not in told or not is_of_these(stage):
            return False
        entry, before, (name, _, key) = told[stage], needs(stage, params) & told.keys(), stage.partition("@")
        newest = max((told[other].get("finished", 0) for other in before), default=0)
        fresh = before <= kept and newest <= entry.get("finished", 0)
        return fresh and OUTS[name](key).exists() and entry.get("sha256", {}) == hashes(stage)

    def done(stage: str, entry: dict[str, object]) -> None:
        told[stage] = entry | around
        write_json(PROVENANCE, {name: told[name] for name in [*all_stages(params), *told] if name in told})

    left_out: set[str] = set()
    for stage in all_stages(params) if arguments.resume else []:
        if is_done(stage, left_out):
            left_out.add(stage)
    stages = [stage for stage in chosen(arguments.stages, params) if stage not in left_out]
    if not stages:
        print("nothing to do: all of it is done by this commit and these params")
    read = {other for stage in stages for other in needs(stage, params)} - {*stages}
    if others := [other for other in all_stages(params) if other in read & told.keys() and not is_of_these(other)]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        print(f"read as it is, though other params or another commit made it: {', '.join(others[:3])}{more}")
    before = signal.signal(signal.SIGTERM, _end_all)
    try:
        run_all(stages, params, arguments.jobs, done)
    except KeyboardInterrupt:  # the stages under way were interrupted too, and have said what is kept
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _told_before() -> dict[str, dict[str, object]]:
    if not PROVENANCE.exists():
        return {}
    try:
        told = json.loads(PROVENANCE.read_bytes())
    except ValueError:
        told = None
    if not isinstance(told, dict) or not all(isinstance(entry, dict) for entry in told.values()):
        raise UserError(f"{PROVENANCE} holds no provenance (an entry for each stage): move it away")
    return told


if __name__ == "__main__":
    run_stage(main)
