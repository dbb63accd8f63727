"""From what `data.location` says (a folder, a file, an archive, a URL) to a folder or file on this disk."""

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stages.common.errors import UserError
from stages.datasets.checksums import Checksum, check_listed
from stages.datasets.fetch import fetch, file_name

MAGIC = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # zip, gzip, bzip2, xz
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


def obtain(location: str, sha256: dict[str, str], scratch: Path, checksum: Checksum | None = None) -> Path:
    """The folder or file that `location` names, fetched if it is a URL, checked, and unpacked if it is an archive.

    Downloads are kept in `scratch/downloads`; archives are unpacked into `scratch/unpacked`, which the caller removes.
    `sha256` lists expected checksums by file name, within a folder by the path below it; `checksum` is one that the
    publisher of a single file tells.

    Raises:
        UserError: if there is nothing there, a checksum is wrong, or an archive is broken or unsafe.
    """
    if "://" in location:
        name = file_name(location)
        listed = Checksum("sha256", sha256[name]) if name in sha256 else None
        path = fetch(location, scratch / "downloads", checksum or listed)
    else:
        path = Path(location).expanduser()
        if not path.exists():
            raise UserError(f"data.location: {path.absolute()} does not exist: give a folder, a file or a URL")
        if checksum is not None and path.is_file():
            checksum.check(path)
    if path.is_dir():
        check_listed(sha256, {name: path / name for name in sha256}, str(path))
        return path
    check_listed(sha256, {path.name: path}, str(path))
    if not is_archive(path):
        if _begins_as_archive(path):
            raise UserError(f"{path}: broken or cut-off archive: delete it and get it again")
        return path
    folder = scratch / "unpacked" / path.name
    unpack(path, folder)
    return folder


def is_archive(path: Path) -> bool:
    try:
        return _is_zip(path) or tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):  # cut off within the first entry
        return False


def _is_zip(path: Path) -> bool:
    # `is_zipfile` alone looks at the end of the file, where a parquet file may hold any image's bytes.
    with path.open("rb") as file:
        return file.read(2) == b"PK" and zipfile.is_zipfile(path)


def _begins_as_archive(path: Path) -> bool:
    """By its first bytes, which a download that was cut off still has, or by its name."""
    with path.open("rb") as file:
        begins = file.read(6).startswith(MAGIC)
    return begins or path.name.lower().endswith(ARCHIVES)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar (also compressed) archive into the new folder `folder`.

    Raises:
        UserError: if an entry would leave the folder or is neither a file nor a folder, or the archive is broken.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for name, content in _zip_files(archive) if _is_zip(archive) else _tar_files(archive):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        # RuntimeError is how zipfile says that an entry is encrypted or compressed in an unknown way.
        raise UserError(f"{archive}: broken or encrypted archive ({error}): get it again") from None
    except OSError as error:  # a full disk, but also gzip's and bzip2's word for broken data
        raise UserError(f"{archive}: cannot be unpacked into {folder} ({error}): make room, or get it again") from None


def _zip_files(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the archive was not made on Unix
            _refuse_unsafe(archive, entry.filename, plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if not entry.is_dir():
                yield entry.filename, opened.open(entry)


def _tar_files(archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    with tarfile.open(archive) as opened:
        for entry in opened:
            _refuse_unsafe(archive, entry.name, plain=entry.isreg() or entry.isdir())
            if entry.isreg():
                yield entry.name, opened.extractfile(entry)


def _refuse_unsafe(archive: Path, name: str, plain: bool) -> None:
    remedy = "make the archive anew from plain files, without it"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{archive}: entry {name!r} would be written outside the folder: {remedy}")
    if not plain:
        raise UserError(f"{archive}: entry {name!r} is a link or device, not a file: {remedy}")
