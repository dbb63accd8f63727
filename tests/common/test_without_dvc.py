import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toy_project import pruned_project

from stages.common import paths, without_dvc
from stages.common.errors import INTERRUPTED, UserError
from stages.common.without_dvc import DIRTY, PROVENANCE, all_stages, chosen, needs, run_all, surroundings
from stages.params.load import load_params
from stages.params.whole import Params

TOP = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    pruned_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    return tmp_path


def run(monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr("sys.argv", ["without_dvc", *arguments])
    without_dvc.main()
    return json.loads(PROVENANCE.read_text())


@pytest.mark.parametrize("folder", [TOP, TOP / "profiles/cifar10"], ids=["default", "cifar10"])
def test_the_stages_are_those_of_dvc_in_an_order_in_which_they_can_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"], check=True, capture_output=True, text=True
    ).stdout.split()
    stages = all_stages(load_params(Params))
    assert sorted(stages) == sorted(listed)
    kinds = list(dict.fromkeys(stage.partition("@")[0] for stage in stages))
    assert kinds == ["download", "finetune", "prune", "quantize", "profile", "edge-benchmark", "report"]


def test_a_name_stands_for_one_entry_or_all(project):
    params = load_params(Params)
    assert chosen(["profile@toy-none-int8", "quantize"], params) == [
        "quantize@toy-none-fp32",
        "quantize@toy-none-int8",
        "profile@toy-none-int8",
    ]
    assert chosen([], params) == all_stages(params)
    with pytest.raises(UserError, match=r"quantise: is no stage of params\.yaml; its stages: download, finetune@toy"):
        chosen(["quantise"], params)


def test_each_stage_tells_where_its_artifact_comes_from(project, monkeypatch):
    told = run(monkeypatch, "quantize@toy-none-fp32")
    entry = told["quantize@toy-none-fp32"]
    for name, digest in entry["sha256"].items():
        assert digest == hashlib.sha256((paths.compressed("toy-none-fp32") / name).read_bytes()).hexdigest()
    assert {"model.safetensors", "model.json", "model.onnx"} <= entry["sha256"].keys()
    assert entry["params_sha256"] == hashlib.sha256(paths.PARAMS.read_bytes()).hexdigest()
    assert len(entry["commit"].split("-")[0]) == 40
    assert entry["versions"]["torch"]
    assert entry["seconds"] > 0


def test_what_is_done_stays_told_and_is_left_out_when_resumed(project, monkeypatch, capsys):
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    first = run(monkeypatch, "quantize@toy-none-fp32")
    ran = []
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    told = run(monkeypatch, "--resume", "quantize")
    assert ran == ["quantize@toy-none-int8"]
    assert told["quantize@toy-none-fp32"] == first["quantize@toy-none-fp32"]
    assert "nothing to do" not in capsys.readouterr().out
    run(monkeypatch, "--resume", "quantize@toy-none-fp32")
    assert "nothing to do: all of it is done by this commit" in capsys.readouterr().out
    paths.PARAMS.write_text(paths.PARAMS.read_text() + "\n")
    run(monkeypatch, "--resume", "quantize")
    assert ran[1:] == ["quantize@toy-none-fp32", "quantize@toy-none-int8"]


def test_what_was_done_and_is_gone_or_changed_is_done_again(project, monkeypatch):
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    run(monkeypatch, "quantize@toy-none-fp32")
    ran = []
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    told = PROVENANCE.read_text()
    (paths.compressed("toy-none-fp32") / "model.json").write_text("{}")
    run(monkeypatch, "--resume", "quantize@toy-none-fp32")
    assert len(ran) == 1
    PROVENANCE.write_text(told)
    shutil.rmtree(paths.compressed("toy-none-fp32"))
    run(monkeypatch, "--resume", "quantize@toy-none-fp32")
    assert len(ran) == 2


def test_what_comes_after_a_stage_that_was_made_again_is_made_again(project, monkeypatch, capsys):
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    run(monkeypatch, "quantize@toy-none-fp32", "profile@toy-none-fp32")
    told, ran = json.loads(PROVENANCE.read_text()), []
    told["quantize@toy-none-fp32"]["finished"] = told["profile@toy-none-fp32"]["finished"] + 60
    PROVENANCE.write_text(json.dumps(told))
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    run(monkeypatch, "--resume", "quantize@toy-none-fp32", "profile@toy-none-fp32")
    assert ran == ["profile@toy-none-fp32"]
    assert "read as it is" not in capsys.readouterr().out


def test_what_is_read_of_other_params_is_told_and_not_taken_as_done(project, monkeypatch, capsys):
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    run(monkeypatch, "quantize@toy-none-fp32", "profile@toy-none-fp32")
    told, ran = json.loads(PROVENANCE.read_text()), []
    told["quantize@toy-none-fp32"]["params_sha256"] = "other"
    PROVENANCE.write_text(json.dumps(told))
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    run(monkeypatch, "--resume", "profile@toy-none-fp32")
    assert ran == ["profile@toy-none-fp32"]
    told = capsys.readouterr().out
    assert "read as it is, though other params or another commit made it: quantize@toy-none-fp32\n" in told


def test_what_leaves_no_artifact_is_done_again_where_it_is_gone(project, monkeypatch):
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    run(monkeypatch, "quantize@toy-none-fp32", "profile@toy-none-fp32")
    ran = []
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    run(monkeypatch, "--resume", "profile@toy-none-fp32")
    assert ran == []
    shutil.rmtree(paths.profile("toy-none-fp32"))
    run(monkeypatch, "--resume", "profile@toy-none-fp32")
    assert ran == ["profile@toy-none-fp32"]


def test_nothing_is_taken_as_done_by_code_that_no_commit_holds(project, monkeypatch, capfd):
    monkeypatch.setenv("EDGEWISE_COMMIT", f"abc{DIRTY}")
    ran = []
    monkeypatch.setattr(without_dvc, "run", lambda stage: ran.append(stage) or {"seconds": 1.0})
    for _ in range(2):
        run(monkeypatch, "--resume", "quantize@toy-none-fp32")
    assert len(ran) == 2
    assert "the code has changes that no commit holds: nothing is taken as done" in capfd.readouterr().out


def test_what_cannot_be_a_provenance_is_refused_and_kept(project, monkeypatch):
    PROVENANCE.parent.mkdir(exist_ok=True)
    for text in ("[]", "", '{"quantize": 1}'):
        PROVENANCE.write_text(text)
        with pytest.raises(UserError, match=r"provenance\.json holds no provenance"):
            run(monkeypatch, "quantize@toy-none-fp32")
        assert PROVENANCE.read_text() == text


def test_an_interruption_is_left_to_the_stages_to_tell(project, monkeypatch, capfd):
    def interrupted(stage: str) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(without_dvc, "run", interrupted)
    with pytest.raises(SystemExit, match=str(INTERRUPTED)):
        run(monkeypatch, "quantize@toy-none-fp32")
    assert capfd.readouterr().err == ""


def test_the_stages_under_way_end_with_a_run_that_is_terminated(project):
    command = [sys.executable, "-m", "stages.common.without_dvc", "--jobs", "2", "quantize"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        threads, started = Path(f"/proc/{process.pid}/task"), time.monotonic()
        while len(children := " ".join(file.read_text() for file in threads.glob("*/children")).split()) < 2:
            assert process.poll() is None
            assert time.monotonic() - started < 30
            time.sleep(0.05)
        time.sleep(0.5)  # Popen has come back, and the stages import what they need for seconds more
        process.terminate()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == without_dvc.TERMINATED
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not PROVENANCE.exists()


def test_a_stage_that_fails_ends_the_run_and_is_named(project, monkeypatch, capfd):
    (paths.pruned("toy-none") / "model.json").write_text("{")
    with pytest.raises(UserError, match="quantize@toy-none-fp32: ended with exit code 2; the stages before it"):
        run(monkeypatch, "quantize")
    assert not PROVENANCE.exists()
    assert "model.json" in capfd.readouterr().err


def test_several_stages_run_at_once_each_after_those_it_needs(project, monkeypatch):
    params, lock, under_way, ended, most = load_params(Params), threading.Lock(), set(), [], 0

    def run(stage: str) -> dict:
        nonlocal most
        with lock:
            assert needs(stage, params) <= set(ended)
            assert stage != "edge-benchmark" or not under_way
            under_way.add(stage)
            most = max(most, len(under_way))
        time.sleep(0.02)
        with lock:
            under_way.remove(stage)
            ended.append(stage)
        return {}

    monkeypatch.setattr(without_dvc, "run", run)
    run_all(all_stages(params), params, 2, lambda stage, told: None)
    assert sorted(ended) == sorted(all_stages(params))
    assert most == 2


def test_a_stage_waits_for_those_far_back_where_what_lies_between_is_left_out(project, monkeypatch):
    params, ended = load_params(Params), []
    monkeypatch.setattr(without_dvc, "run", lambda stage: time.sleep(0.05 * (stage == "finetune@toy")) or {})
    stages = ["finetune@toy", "quantize@toy-none-fp32"]
    run_all(stages, params, 2, lambda stage, told: ended.append(stage))
    assert ended == stages


def test_after_a_failure_no_stage_starts_and_what_is_under_way_is_still_told(project, monkeypatch):
    params, told, failed = load_params(Params), [], threading.Event()

    def run(stage: str) -> dict:
        if stage == "quantize@toy-none-fp32":
            failed.set()
            raise UserError("of the first")
        failed.wait()
        time.sleep(0.05)
        return {}

    monkeypatch.setattr(without_dvc, "run", run)
    stages = ["quantize@toy-none-fp32", "quantize@toy-none-int8", "profile@toy-none-int8"]
    with pytest.raises(UserError, match="of the first"):
        run_all(stages, params, 2, lambda stage, _: told.append(stage))
    assert told == ["quantize@toy-none-int8"]


def test_the_commit_may_be_given_where_there_is_no_repository(monkeypatch):
    monkeypatch.chdir(TOP)
    monkeypatch.setenv("EDGEWISE_COMMIT", "abc")
    assert surroundings()["commit"] == "abc"
