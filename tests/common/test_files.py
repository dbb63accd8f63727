import errno
import os
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.common.files import atomic_file, atomic_folder, read_csv, read_json, write_csv, write_json


def test_a_file_whose_writing_fails_keeps_its_last_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("good")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_whose_writing_fails_keeps_its_last_content_and_leaves_nothing_beside_it(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("good")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "good"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_replaces_the_one_before_with_all_its_files(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / name).touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("nested", [False, True])
def test_a_full_disk_is_one_line_that_names_the_final_path_and_keeps_what_was_there(tmp_path, nested):
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("good")
    with pytest.raises(UserError) as error, atomic_folder(path) as folder:
        (folder / "a").write_text("half")
        if nested:
            with atomic_file(folder / "b"), open("/dev/full", "w") as full:
                full.write("b")
        with open("/dev/full", "w") as full:
            full.write("b")
    shown = path / "b" if nested else path
    assert str(error.value) == f"cannot write {shown}: No space left on device: make room, then run again"
    assert (path / "a").read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_belongs_is_named(tmp_path):
    (tmp_path / "reports").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*cards: .*move away the file that stands where a folder"):
        write_json(tmp_path / "reports/cards", {})


@pytest.mark.parametrize("refused", ["mkdir", "replace"])
def test_a_folder_without_access_is_named_and_stays_as_it_is(tmp_path, monkeypatch, refused):
    """Patched, since root may write anywhere."""
    path = tmp_path / "model"
    with atomic_folder(path) as folder:
        (folder / "a").write_text("good")

    def no(first, *_):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(first))

    monkeypatch.setattr(f"os.{refused}", no)
    told = r"cannot write .*model: Operation not permitted: give this user access to it"
    with pytest.raises(UserError, match=told), atomic_folder(path) as folder:
        (folder / "a").write_text("new")
    assert (path / "a").read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_take_its_name_leaves_the_former_one_in_place(tmp_path, monkeypatch):
    path, rename = tmp_path / "model", os.replace
    with atomic_folder(path) as folder:
        (folder / "a").write_text("good")

    def no_new_folder(source, target):
        if Path(target) == path and ".former." not in str(source):
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        rename(source, target)

    monkeypatch.setattr("os.replace", no_new_folder)
    with pytest.raises(UserError, match="make room"), atomic_folder(path):
        pass
    assert (path / "a").read_text() == "good"
    assert list(tmp_path.iterdir()) == [path]


def test_json_ends_in_a_newline_and_refuses_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_broken_or_missing_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")
    (tmp_path / "c.json").mkdir()
    with pytest.raises(UserError, match=r"c\.json cannot be read \(Is a directory\): delete it"):
        read_json(tmp_path / "c.json")


def test_a_csv_without_rows_still_has_its_header(tmp_path):
    write_csv(tmp_path / "a.csv", [], ["epoch", "loss"])
    assert (tmp_path / "a.csv").read_text() == "epoch,loss\n"
    assert read_csv(tmp_path / "a.csv") == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    gone, living = tmp_path / ".model.4194304.partial", tmp_path / ".model.1.partial"  # above pid_max; always there
    for folder in (gone, living):
        folder.mkdir()
        (folder / "half").touch()
    with atomic_folder(tmp_path / "model"):
        pass
    assert not gone.exists()
    assert living.exists()


def test_a_copy_for_which_there_is_no_room_names_where_it_was_to_go(tmp_path):
    told = f"cannot write {tmp_path / 'new'}: No space left"
    with pytest.raises(UserError, match=told) as raised, atomic_folder(tmp_path / "new") as unfinished:
        files = "models/source.onnx", str(unfinished / "copy.onnx")  # as shutil.copyfile names them
        raise OSError(errno.ENOSPC, "No space left on device", files[0], None, files[1])
    assert "source" not in str(raised.value)
