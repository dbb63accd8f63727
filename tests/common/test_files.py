import errno
import os
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.common.files import atomic_file, atomic_folder, read_csv, read_json, write_csv, write_json


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A complete folder with one file."""
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("good")
    return tmp_path / "model"


def check_unchanged(model: Path) -> None:
    assert (model / "a").read_text() == "good"
    assert list(model.parent.iterdir()) == [model]


def test_a_failure_keeps_the_earlier_file_or_folder_and_leaves_no_partial_one(model):
    with pytest.raises(RuntimeError), atomic_folder(model) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    check_unchanged(model)
    with pytest.raises(RuntimeError), atomic_file(model / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    check_unchanged(model)
    assert len(list(model.iterdir())) == 1


def test_a_folder_replaces_the_earlier_one_with_all_its_files(model):
    with atomic_folder(model) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in model.iterdir()] == ["new"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("nested", [False, True])
def test_a_full_disk_is_one_line_with_the_final_path_and_keeps_the_earlier_folder(model, nested):
    with pytest.raises(UserError) as error, atomic_folder(model) as folder:
        (folder / "a").write_text("half")
        if nested:
            with atomic_file(folder / "b"), open("/dev/full", "w") as full:
                full.write("b")
        with open("/dev/full", "w") as full:
            full.write("b")
    shown = model / "b" if nested else model
    assert str(error.value) == f"cannot write {shown}: No space left on device: make room, then run again"
    check_unchanged(model)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "reports").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*cards: .*move away the file"):
        write_json(tmp_path / "reports/cards", {})


@pytest.mark.parametrize("refused", ["mkdir", "replace"])
def test_a_folder_without_access_is_named_and_stays_unchanged(model, monkeypatch, refused):
    """The test patches `os`, because root may write anywhere."""

    def no(first, *_):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(first))

    monkeypatch.setattr(f"os.{refused}", no)
    message = r"cannot write .*model: Operation not permitted: give this user access to it"
    with pytest.raises(UserError, match=message), atomic_folder(model) as folder:
        (folder / "a").write_text("new")
    check_unchanged(model)


def test_a_failed_replacement_restores_the_earlier_folder(model, monkeypatch):
    rename = os.replace

    def no_new_folder(source, target):
        if Path(target) == model and ".former." not in str(source):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        rename(source, target)

    monkeypatch.setattr("os.replace", no_new_folder)
    with pytest.raises(UserError, match="make room"), atomic_folder(model):
        pass
    check_unchanged(model)


def test_a_copy_without_room_names_its_target(tmp_path):
    message = f"cannot write {tmp_path / 'new'}: No space left"
    with pytest.raises(UserError, match=message) as raised, atomic_folder(tmp_path / "new") as unfinished:
        files = "models/source.onnx", str(unfinished / "copy.onnx")  # as shutil.copyfile names them
        raise OSError(errno.ENOSPC, "No space left on device", files[0], None, files[1])
    assert "source" not in str(raised.value)


def test_partial_folders_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    killed, living = tmp_path / ".model.4194304.partial", tmp_path / ".model.1.partial"  # above pid_max; always alive
    for folder in (killed, living):
        folder.mkdir()
        (folder / "half").touch()
    with atomic_folder(tmp_path / "model"):
        pass
    assert not killed.exists()
    assert living.exists()


def test_json_ends_in_a_newline_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_broken_or_missing_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    (tmp_path / "c.json").mkdir()
    for name, problem in [("a", "is not valid JSON"), ("b", "is missing"), ("c", "cannot be read .Is a directory.")]:
        with pytest.raises(UserError, match=rf"{name}\.json {problem}"):
            read_json(tmp_path / f"{name}.json")


def test_a_csv_without_rows_still_has_its_header(tmp_path):
    write_csv(tmp_path / "a.csv", [], ["epoch", "loss"])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n"
    assert read_csv(tmp_path / "a.csv") == []
