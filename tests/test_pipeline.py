"""The pipeline in miniature in a new git repository: run, run again, change a setting, run as a profile."""

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
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    return run.stdout


def stages_run(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A new git repository with the code and the settings of the pipeline, params that no user has changed."""
    folder = tmp_path_factory.mktemp("pipeline") / "edgewise"
    shutil.copytree(TOP / "stages", folder / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    for name in (".gitignore", ".dvcignore", ".dvc/.gitignore", ".dvc/config", "dvc.yaml"):
        shutil.copy2(TOP / name, folder / name)
    (folder / "params.yaml").write_text(PARAMS)
    call(*GIT, "init", "-q", cwd=folder)
    call("dvc", "config", "core.no_scm", "false", cwd=folder)  # an archive's configuration says true
    commit(folder, "start")
    return folder


def commit(folder: Path, message: str) -> None:
    call("git", "add", "-A", cwd=folder)
    call(*GIT, "commit", "-qm", message, cwd=folder)


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


def test_git_sees_only_the_lock_and_small_results_in_text(checkout, first_run):
    changed = call("git", "status", "--porcelain", "--untracked-files=all", cwd=checkout).splitlines()
    results = {
        f"reports/{name}" for name in ("metrics.json", "run.json", "summary.md", "variants.csv", "variants.json")
    }
    assert {line[3:] for line in changed} <= {"dvc.lock"} | results
    assert "up to date" in call("dvc", "status", cwd=checkout)


def test_the_second_run_does_nothing(checkout, first_run):
    output = call("dvc", "repro", cwd=checkout)
    assert stages_run(output) == []
    assert "up to date" in output


def test_a_changed_pruner_makes_its_own_branch_stale_and_no_other(checkout, first_run):
    params = checkout / "params.yaml"
    params.write_text(PARAMS.replace("group_sparsity: 0.5", "group_sparsity: 0.7"))
    try:
        status = json.loads(call("dvc", "status", "--json", cwd=checkout))
        assert set(status) == {"prune@convnext-oto50", "report"}  # the report words the settings
        branch = call("dvc", "repro", "--dry", "--force", "--downstream", "prune@convnext-oto50", cwd=checkout)
    finally:
        params.write_text(PARAMS)
    assert set(stages_run(branch)) == {
        "prune@convnext-oto50",
        "quantize@convnext-oto50-int8_dynamic",
        "profile@convnext-oto50-int8_dynamic",
        "edge-benchmark",
        "report",
    }


def test_a_queued_experiment_runs_its_own_code_and_only_the_stages_that_it_changes(checkout, first_run):
    commit(checkout, "first run")
    call("dvc", "exp", "run", "--queue", "--name", "longer", "-S", "edge_benchmark.windows=3", cwd=checkout)
    script = checkout / "stages/edge_benchmark.py"
    code = script.read_text()
    script.write_text("raise SystemExit('the code of the workspace, not of the experiment')\n")
    try:
        call("dvc", "exp", "run", "--run-all", cwd=checkout)
    finally:
        script.write_text(code)
    assert stages_run(call("dvc", "queue", "logs", "longer", cwd=checkout)) == ["edge-benchmark", "report"]
    assert "longer" in call("dvc", "exp", "show", "--csv", "--rev", "HEAD", cwd=checkout)
    found = call("git", "for-each-ref", "--format=%(objectname)", "refs/exps/*/*/longer", cwd=checkout).strip()
    results = [
        (json.loads(text), json.loads((checkout / path).read_text()))
        for path in ("reports/run.json", "reports/variants.json")
        for text in [call("git", "show", f"{found}:{path}", cwd=checkout)]
    ]
    (longer, first), (rows, before) = results
    assert (longer["protocol"]["windows"], first["protocol"]["windows"]) == (3, 2)
    assert [row["top1"] for row in rows] == [row["top1"] for row in before]


def test_a_profile_with_the_same_settings_takes_every_artifact_from_the_shared_cache(checkout, first_run):
    profile = checkout / "profiles/same"
    profile.mkdir(parents=True)
    call("dvc", "init", "--subdir", cwd=profile)
    call("dvc", "cache", "dir", "../../.dvc/cache", cwd=profile)
    for name in (".dvcignore", "dvc.yaml", "params.yaml"):
        shutil.copy2(checkout / name, profile / name)
    (profile / "stages").symlink_to("../../stages")
    assert not stages_run(call("dvc", "repro", "download", "finetune", "prune", "quantize", cwd=profile))
    assert (profile / "models/compressed/convnext-oto50-int8_dynamic/model.onnx").exists()
    changed = call("git", "status", "--porcelain", "--untracked-files=all", "profiles", cwd=checkout).splitlines()
    assert {Path(line[3:]).name for line in changed} == {
        *(".gitignore", "config", ".dvcignore", "dvc.lock"),
        *("dvc.yaml", "params.yaml", "stages"),
    }


def test_a_bad_value_stops_before_any_work_with_one_message(checkout, tmp_path):
    params = yaml.safe_load(PARAMS)
    params["data"]["image_size"] = 0
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    command, environment = [sys.executable, "-m", "stages.download"], os.environ | {"PYTHONPATH": str(checkout)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr == "error: params.yaml: 1 problem\n  data.image_size = 0: must be greater than or equal to 4\n"
