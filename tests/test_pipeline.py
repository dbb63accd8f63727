"""The real pipeline in miniature, in a fresh git checkout: run, run again, change one pruner's value."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from miniature import PARAMS

TOP = Path(__file__).parents[1]
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")


def call(*command: str, cwd: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "COLUMNS": "160",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run.stdout


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What git tracks or would track, at the top alone, with params that no user has changed."""
    folder = tmp_path_factory.mktemp("pipeline") / "edgewise"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        left_out = name.startswith(("profiles/", "tests/")) or name in ("dvc.lock", "params.yaml")
        if (TOP / name).is_file() and not left_out:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / name, folder / name, follow_symlinks=False)
    (folder / "params.yaml").write_text(PARAMS)
    call(*GIT, "init", "-q", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call(*GIT, "commit", "-qm", "start", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def first_run(checkout: Path) -> str:
    return call("dvc", "repro", cwd=checkout)


def test_the_first_run_does_every_stage_and_reports_every_variant(checkout, first_run):
    assert len(stages_run(first_run)) == 11
    rows = json.loads((checkout / "reports/variants.json").read_text())
    assert [row["variant"] for row in rows] == ["convnext-none-fp32", "convnext-oto50-int8_dynamic"]
    dense, small = rows
    assert dense["n_test"] == small["n_test"] == 359
    assert small["params"] < 0.8 * dense["params"]
    assert small["size_bytes"] < dense["size_bytes"]
    assert small["params_visible"] < 0.5 * small["params"]
    assert dense["run_id"] == small["run_id"]
    assert (checkout / "models/compressed/convnext-oto50-int8_dynamic/model.onnx").stat().st_size == small["size_bytes"]
    assert "<html" in (checkout / "reports/index.html").read_text()


def test_nothing_is_untracked_and_only_the_lock_and_reports_differ(checkout, first_run):
    changed = call("git", "status", "--porcelain", cwd=checkout).splitlines()
    cards = [line for line in changed if line.startswith("?? reports/cards/")]  # the miniature's own variants
    assert all(line[3:] == "dvc.lock" or line[3:].startswith("reports/") for line in changed)
    assert not [
        line
        for line in changed
        if line.startswith("??") and line not in cards and line[3:] not in ("dvc.lock", "reports/")
    ]
    assert "up to date" in call("dvc", "status", "dvc.yaml", cwd=checkout)


def test_the_second_run_does_nothing(checkout, first_run):
    output = call("dvc", "repro", cwd=checkout)
    assert stages_run(output) == []
    assert "up to date" in output


def test_a_queued_change_of_one_pruner_runs_its_own_code_and_its_branch_alone(checkout, first_run):
    call("git", "add", "-A", cwd=checkout)
    call(*GIT, "commit", "-qm", "first run", cwd=checkout)
    call("dvc", "exp", "run", "--queue", "--name", "sparser", "-S", "pruners.oto50.group_sparsity=0.7", cwd=checkout)
    script = checkout / "stages/prune.py"
    code = script.read_text()
    script.write_text("raise SystemExit('the code of the workspace, not of the experiment')\n")
    try:
        call("dvc", "exp", "run", "--run-all", cwd=checkout)
    finally:
        script.write_text(code)
    assert stages_run(call("dvc", "queue", "logs", "sparser", cwd=checkout)) == [
        "prune@convnext-oto50",
        "quantize@convnext-oto50-int8_dynamic",
        "profile@convnext-oto50-int8_dynamic",
        "edge-benchmark",
        "report",
    ]
    shown = call("dvc", "exp", "show", "--csv", "--rev", "HEAD", cwd=checkout)
    assert "sparser" in shown
    commit = call("git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/sparser", cwd=checkout).strip()
    sparser = json.loads(call("git", "show", f"{commit}:reports/variants.json", cwd=checkout))
    dense, small = json.loads((checkout / "reports/variants.json").read_text())
    assert sparser[0]["top1"] == dense["top1"]
    assert sparser[1]["params"] < small["params"]


def test_a_bad_value_stops_before_any_work_with_one_message(checkout, first_run):
    run = subprocess.run(
        [sys.executable, "-m", "stages.download"],
        cwd=_with_params(checkout, lambda params: params["finetune"].update(epochs=0)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )
    assert run.returncode == 2
    assert run.stderr == "error: params.yaml: 1 problem\n  finetune.epochs = 0: must be greater than or equal to 1\n"


def _with_params(checkout: Path, change) -> Path:
    folder = checkout.parent / "bad"
    folder.mkdir(exist_ok=True)
    params = yaml.safe_load((checkout / "params.yaml").read_text())
    change(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder
