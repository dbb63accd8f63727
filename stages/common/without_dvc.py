"""Run stages in order on a machine without DVC, and leave where their results come from in `reports/provenance.json`.

    PYTHONPATH=<root> python -m stages.common.without_dvc [--resume] [stage ...]

A stage is named as `dvc stage list` does: `download`, `finetune@<model>`, `prune@<pruning>`, `quantize@<variant>`,
`profile@<variant>`, `edge-benchmark`, `report`; a bare `finetune` is all of its entries, and without names the whole
pipeline runs. It stops at the first that fails. The provenance tells, for each stage that ended well: the commit, the
sha256 of params.yaml and of the artifact that it wrote, seconds, the GPU and the versions of the libraries.
"""

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path

from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import read_json, sha256_of, write_json
from stages.common.params import Params, load_params

PROVENANCE = paths.REPORTS / "provenance.json"
LIBRARIES = ("torch", "torchvision", "timm", "only-train-once", "onnx", "onnxruntime", "numpy")
OUTS = {"finetune": paths.dense, "prune": paths.pruned, "quantize": paths.compressed}


def all_stages(params: Params) -> list[str]:
    """The pipeline's stages in an order in which they can run."""
    each = {
        "finetune": params.models,
        "prune": params.prunings,
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


def run(stage: str) -> dict[str, object]:
    """Run one stage as DVC would; what there is to tell of it.

    Raises:
        UserError: if it fails, with its name: it has told the reason itself.
    """
    name, _, key = stage.partition("@")
    started = time.time()
    command = [sys.executable, "-m", f"stages.{name.replace('-', '_')}", *([key] if key else [])]
    if code := subprocess.run(command).returncode:
        raise UserError(f"{stage}: ended with exit code {code}; the stages before it are done")
    told: dict[str, object] = {"seconds": round(time.time() - started, 1), "finished": round(time.time())}
    if name in OUTS:
        files = sorted(file for file in OUTS[name](key).iterdir() if file.is_file())
        told["sha256"] = {file.name: sha256_of(file) for file in files}
    return told


def surroundings() -> dict[str, object]:
    """Where and with what the stages run."""
    return {
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
        "params_sha256": sha256_of(paths.PARAMS),
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


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
    arguments = parser.parse_args()
    stages, around = chosen(arguments.stages, load_params()), surroundings()
    told = read_json(PROVENANCE) if PROVENANCE.exists() else {}
    for stage in stages:
        done = told.get(stage, {})
        if arguments.resume and all(done.get(name) == around[name] for name in ("commit", "params_sha256")):
            continue
        told[stage] = run(stage) | around
        write_json(PROVENANCE, told)


if __name__ == "__main__":
    run_stage(main)
