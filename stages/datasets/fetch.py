"""Get files from the web: resumed after a break, under their final name only when whole and checked."""

import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from stages.common.errors import UserError
from stages.datasets.checksums import Checksum

TIMEOUT_S = 60
CHUNK_BYTES = 1 << 20
REMEDY = "download it elsewhere and give its path as data.location"


class _CutError(Exception):
    """The connection ended before the file did."""


def fetch(url: str, folder: Path, checksum: Checksum | None = None, attempts: int = 3, pause_s: float = 1.0) -> Path:
    """Download `url` (http or https) below `folder`, or return the file of an earlier, complete download.

    An unfinished download stays as `<name>.partial` and is resumed where the server can (Range) and vouches that the
    file is still the same (If-Range), or where `checksum` will tell; otherwise it starts again. A connection that
    breaks is tried `attempts` times, `pause_s` seconds apart.

    Raises:
        UserError: no network, an answer other than the file, a connection that keeps breaking, a wrong checksum,
            a full disk, or another process that is downloading the same file.
    """
    target = _target(url, folder)
    _make_folder(target.parent)
    with _locked(target):
        if target.exists():
            if checksum is None or checksum.of(target) == checksum.digest.lower():
                return target
            target.unlink()  # another version than the one asked for now
        partial = target.with_name(f"{target.name}.partial")
        for attempt in range(1, attempts + 1):
            try:
                _transfer(url, partial, resume_unvouched=checksum is not None)
                break
            except _CutError as error:
                if attempt == attempts:
                    raise UserError(f"{url}: {error}: run again to resume it, or {REMEDY}") from None
                time.sleep(pause_s * attempt)
        if checksum is not None and (found := checksum.of(partial)) != checksum.digest.lower():
            partial.unlink()  # resuming would end in the same bytes
            _validator_file(partial).unlink(missing_ok=True)
            raise UserError(
                f"{url}: wrong checksum of {target.name}: {checksum.algorithm} is {found}, expected {checksum.digest}:"
                f" run again to download it anew, correct data.sha256 if it lists this file, or {REMEDY}"
            )
        os.replace(partial, target)
        _validator_file(partial).unlink(missing_ok=True)
    return target


def file_name(url: str) -> str:
    """The name under which the file of `url` is kept."""
    return Path(unquote(urlsplit(url).path)).name


def _target(url: str, folder: Path) -> Path:
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"data.location = {url!r}: only http and https URLs can be fetched: {REMEDY}")
    name = file_name(url)
    if not name:
        raise UserError(f"data.location = {url!r}: the URL names no file")
    # Two URLs may end in the same file name.
    return folder / hashlib.sha256(url.encode()).hexdigest()[:12] / name


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} for downloads: {error.strerror}") from None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Killing only DVC leaves its child at work: two writers would mix their bytes."""
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target} is being downloaded by another process: wait for it, or end it") from None
        yield


def _validator_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _transfer(url: str, partial: Path, resume_unvouched: bool) -> None:
    """Bring `partial` from what it holds to the whole file; raises `_CutError` when the connection breaks."""
    validator_file = _validator_file(partial)
    validator = validator_file.read_text(encoding="utf-8") if validator_file.exists() else ""
    offset = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "edgewise", "Accept-Encoding": "identity"}
    if offset and (validator or resume_unvouched):
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink(missing_ok=True)
            raise _CutError("the file on the server is another one than before") from None
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}: check data.location, or {REMEDY}"
        ) from None
    with response:
        if response.status == http.client.PARTIAL_CONTENT:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if start is None or int(start[1]) != offset:
                partial.unlink(missing_ok=True)
                raise _CutError("the server resumed at another byte than asked for")
        else:
            offset = 0
        validator_file.write_text(_validator(response.headers), encoding="utf-8")
        length = response.headers.get("Content-Length")
        with partial.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            size = offset + _copy(response, file, partial)
    if length is not None and size != offset + int(length):
        raise _CutError(f"the connection broke after {size:,} of {offset + int(length):,} bytes")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError:
        raise
    except (http.client.HTTPException, OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be reached ({reason}): check the network, or {REMEDY}") from None


def _validator(headers: http.client.HTTPMessage) -> str:
    """What If-Range may carry: a strong ETag or a date (RFC 9110, section 13.1.5)."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _copy(response: http.client.HTTPResponse, file: BinaryIO, path: Path) -> int:
    copied = 0
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (http.client.HTTPException, OSError) as error:
            raise _CutError(f"the connection broke after {copied:,} bytes ({error})") from None
        try:
            if not chunk:
                file.flush()
                return copied
            file.write(chunk)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}: make room and run again, it resumes") from None
        copied += len(chunk)
