"""Turn `data.location` (a folder, a file, an archive or a URL) into a checked folder or file on this disk."""

import hashlib
import lzma
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.common.errors import UserError
from stages.common.files import clear_disk_errors

ZIP = b"PK\x03\x04"
MAGIC = (ZIP, b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
CHUNK_BYTES = 1 << 20
DOWNLOAD_BY_HAND = "download it elsewhere and give its path as data.location"
PACK_AGAIN = "pack the files again, without it"


def obtain(location: str, sha256: dict[str, str], scratch: Path, known_hash: str | None = None) -> Path:
    """The folder or file that `location` names: downloaded if it is a URL, checked, and unpacked if it is an archive.

    Downloads stay in `scratch/downloads`. Archives are unpacked into `scratch/unpacked`, which the caller removes.

    Args:
        sha256: expected checksums by file name; in a folder, by the path relative to it.
        known_hash: the published checksum of a single file, as in "md5:0123...".

    Raises:
        UserError: if there is nothing there, a checksum is wrong, or an archive is broken or unsafe.
    """
    if "://" in location:
        name = file_name(location)
        listed = f"sha256:{sha256[name]}" if name in sha256 else None
        path = fetch(location, scratch / "downloads", known_hash or listed)
    else:
        path = Path(location).expanduser()
        if not path.exists():
            raise UserError(f"data.location: {path.absolute()} does not exist: give a folder, a file or a URL")
        if known_hash and path.is_file():
            check(path, known_hash)
    for name in sha256:
        file = path / name if path.is_dir() else path.with_name(name)
        if not file.is_file() or (path.is_file() and name != path.name):
            raise UserError(f"data.sha256 lists {name!r}, which {path} does not have: correct the name or remove it")
        check(file, f"sha256:{sha256[name]}")
    if path.is_dir() or not _is_archive(path):
        return path
    folder = scratch / "unpacked" / path.name
    unpack(path, folder)
    return folder


def check(path: Path, known_hash: str) -> None:
    """Raise a `UserError` if `path` does not have the checksum `known_hash` ("sha256:..." or "md5:...")."""
    algorithm, _, expected = known_hash.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected.lower():
        raise UserError(
            f"{path}: wrong checksum: {algorithm} is {found}, expected {expected}: the file is damaged or another"
            " version; get it again, or correct data.sha256 if it lists this file"
        )


def file_name(url: str) -> str:
    """The name of the downloaded file."""
    return Path(unquote(urlsplit(url).path)).name


def fetch(url: str, folder: Path, known_hash: str | None = None) -> Path:
    """Download `url` below `folder`, or return the file of an earlier download if its checksum is right.

    The file gets its name only when it is complete and has the checksum `known_hash`.

    Raises:
        UserError: for a URL that is not http, no connection, an error of the server, a wrong checksum or a full disk.
    """
    import pooch  # imports for 0.3 s what only a download needs
    from requests import HTTPError, RequestException

    name = file_name(url)
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"data.location = {url!r}: only http and https URLs can be fetched: {DOWNLOAD_BY_HAND}")
    if not name:
        raise UserError(f"data.location = {url!r}: the URL names no file")
    target = folder / hashlib.sha256(url.encode()).hexdigest()[:12] / name  # two URLs may end in the same name
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(), chunk_size=CHUNK_BYTES, headers={"Accept-Encoding": "identity"}
    )
    try:
        with clear_disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            pooch.retrieve(url, known_hash, name, target.parent, downloader=downloader)
    except HTTPError as error:
        answer = f"{error.response.status_code} {error.response.reason}" if error.response is not None else str(error)
        raise UserError(f"{url}: the server answers {answer}: check data.location, or {DOWNLOAD_BY_HAND}") from None
    except RequestException as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # the system's error, below several layers of wrapping
            cause = cause.__context__
        raise UserError(
            f"{url}: the download failed ({cause}): check the network and run again, or {DOWNLOAD_BY_HAND}"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{url}: wrong checksum: {error} Correct data.sha256 if it lists this file, or {DOWNLOAD_BY_HAND}"
        ) from None
    return target


def _is_archive(path: Path) -> bool:
    """True by the first bytes or the name, which a file that was cut off still has, or if it is a plain tar."""
    with path.open("rb") as file:
        begins = file.read(6).startswith(MAGIC)
    return begins or path.name.lower().endswith(ARCHIVES) or tarfile.is_tarfile(path)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive, compressed or not, into the new folder `folder`.

    Raises:
        UserError: if the archive is broken or encrypted, or if an entry is a link, a device or outside the folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with archive.open("rb") as file:
            is_zip = file.read(4) == ZIP
        if is_zip:
            with zipfile.ZipFile(archive) as opened:
                for entry in opened.infolist():
                    _check_zip_entry(entry, archive)
                opened.extractall(folder)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter=_only_plain_files)
    except tarfile.FilterError as error:
        raise UserError(f"{archive}: unsafe entry: {error}: {PACK_AGAIN}") from None
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
        # zipfile raises RuntimeError for an encrypted entry and for an unknown compression.
        reason = str(error).partition(":\n")[0]  # tarfile goes on with a line for each format that it tried
        raise UserError(f"{archive}: broken or encrypted archive ({reason}): get it again") from None
    except OSError as error:  # a full disk, but gzip and bzip2 raise it for broken data too
        raise UserError(f"{archive}: cannot be unpacked into {folder} ({error}): make room, or get it again") from None


def _check_zip_entry(entry: zipfile.ZipInfo, archive: Path) -> None:
    if entry.filename.startswith(("/", "\\")) or ".." in entry.filename.replace("\\", "/").split("/"):
        raise UserError(f"{archive}: unsafe entry: {entry.filename!r} is outside the destination: {PACK_AGAIN}")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: not packed on Unix
        raise UserError(f"{archive}: unsafe entry: {entry.filename!r} is a link or device: {PACK_AGAIN}")


def _only_plain_files(entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """The filter "data" of tarfile, but without links: several versions of Python let them lead outside."""
    if not (entry.isreg() or entry.isdir()):
        raise tarfile.SpecialFileError(entry)
    return tarfile.data_filter(entry, folder)
