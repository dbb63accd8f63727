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
