import importlib.metadata
import os
import shutil
from pathlib import Path

import pytest
import torch

import stages
from stages.common.errors import UserError
from stages.training import checkpoint
from stages.training.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint

STATE = {"epochs": [0, 2], "curve": [], "chosen": {}, "trainer": {}}


def test_two_processes_do_not_train_the_same_thing(tmp_path):
    with checkpoint_folder(tmp_path, {"a": 1}) as first, checkpoint_folder(tmp_path, {"a": 2}) as second:
        assert first != second
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} is still training this"),
            checkpoint_folder(tmp_path, {"a": 1}),
        ):
            pass


@pytest.mark.parametrize("library", ["torch", "timm", "only-train-once", "torch-pruning"])
def test_another_version_of_a_library_does_not_resume_from_a_checkpoint(tmp_path, monkeypatch, library):
    version = importlib.metadata.version
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        pass
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == library else version(name))
    with checkpoint_folder(tmp_path, {"a": 1}) as other:
        assert other != folder


@pytest.mark.parametrize("source", ["finetune.py", "params/pruners.py", "pruning/hesso.py", "training/trainer.py"])
def test_other_code_does_not_resume_from_a_checkpoint(tmp_path, monkeypatch, source):
    code = shutil.copytree(Path(stages.__file__).parent, tmp_path / "stages")
    monkeypatch.setattr(stages, "__file__", str(code / "__init__.py"))
    with checkpoint_folder(tmp_path / "a", {"a": 1}) as folder:
        pass
    with (code / source).open("a") as file:
        file.write("# changed\n")
    with checkpoint_folder(tmp_path / "a", {"a": 1}) as other:
        assert other != folder


def test_a_finished_training_stays_until_another_with_the_same_parent_begins(tmp_path):
    with checkpoint_folder(tmp_path, {"a": 1}) as first:
        pass
    with pytest.raises(RuntimeError), checkpoint_folder(tmp_path, {"a": 2}) as failed:
        (failed / "checkpoint.pt").touch()
        raise RuntimeError
    assert not first.exists()
    with checkpoint_folder(tmp_path, {"a": 3}):
        pass
    assert (failed / "checkpoint.pt").exists()  # unfinished work is never removed


def full_disk(*_) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "b").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"cannot write .*move away the file"),
        checkpoint_folder(tmp_path / "b", {"a": 1}),
    ):
        pass
    monkeypatch.setattr(os, "write", full_disk)
    with (
        pytest.raises(UserError, match=rf"cannot write {tmp_path}/a/.*: No space left on device"),
        checkpoint_folder(tmp_path / "a", {"a": 1}),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos"), "make room, then run again"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_a_clear_error_and_the_last_one_stays(
    tmp_path, monkeypatch, error, message
):
    def fails(state, path) -> None:
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/checkpoint.pt: .*run again$"):
        save_checkpoint(tmp_path, STATE)
    monkeypatch.undo()
    save_checkpoint(tmp_path, STATE)
    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(UserError, match=f"{message}.*; the checkpoint before it is kept"):
        save_checkpoint(tmp_path, STATE | {"epochs": [0, 4]})
    assert load_checkpoint(tmp_path) == STATE


def test_a_checkpoint_that_is_broken_or_incomplete_is_named_and_training_starts_again(network, fit, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"half a checkpoint")
    assert load_checkpoint(tmp_path) is None
    assert f"{path} is broken" in capsys.readouterr().out
    torch.save({"epochs": [0, 2]}, path)
    assert len(fit(network, checkpoints=tmp_path).curve) == 3
    assert "is broken (it holds no chosen, curve, trainer)" in capsys.readouterr().out


def test_checkpoints_that_take_long_are_written_less_often(monkeypatch):
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now)
    spacing = checkpoint.Spacing()
    for seconds, pause in ((0.2, 0.0), (2.0, 40.0)):
        assert spacing.due()
        with spacing.measured():
            now += seconds
        if pause:
            now += pause - 0.1
            assert not spacing.due()
            now += 0.2
    assert spacing.due()
