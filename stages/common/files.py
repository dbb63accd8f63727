"""Atomic files and folders: they are written under a temporary name and renamed when complete."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stages.common.errors import UserError, disk_error


def _partial(path: Path) -> Path:
    """A temporary name beside `path`, after the removal of temporary files that a killed process left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.partial"):
        import psutil  # rarely needed, and too slow an import for short commands

        pid = left.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system (no room, no access, a file in the way) into a `UserError` about `path`."""
    try:
        yield
    except OSError as error:
        named = [Path(str(name)) for name in (error.filename, error.filename2) if name is not None]  # a copy has two
        elsewhere = named and not any(name.is_relative_to(path.parent) for name in named)
        if elsewhere or (readable := disk_error(error, path)) is None:
            raise
        raise readable from None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which is renamed to `path` on success and removed on failure.

    Raises:
        UserError: if there is no room or no access; an earlier file then stays unchanged.
    """
    with clear_disk_errors(path):
        temporary = _partial(path)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())  # otherwise a power cut may leave an empty file under the new name
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which replaces `path` on success and is removed on failure.

    Raises:
        UserError: if there is no room or no access; an earlier folder then stays unchanged.
    """
    with clear_disk_errors(path):
        temporary = _partial(path)
        temporary.mkdir()
        former = path.with_name(f".{path.name}.former.{os.getpid()}.partial")
        try:
            yield temporary
            if path.exists():
                os.replace(path, former)  # one step, whereas removing its files may stop half-way
            try:
                os.replace(temporary, path)
            except OSError:
                if former.exists():
                    os.replace(former, path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final newline. NaN and infinity raise a `ValueError`, since JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a file; a missing or broken one raises a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro` to make it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): delete it and run `dvc repro`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and run `dvc repro`") from None


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> None:
    """Write rows below a header line; `columns` is required if `rows` may be empty."""
    columns = list(columns or rows[0])
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """All rows, with strings as values; a missing file raises a `UserError`."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run `dvc repro` to make it") from None


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
