import fcntl
import functools
import hashlib
import io
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.datasets.checksums import Checksum
from stages.datasets.fetch import fetch
from stages.datasets.obtain import obtain

CONTENT = bytes(range(256)) * 4000
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())


@dataclass
class Site:
    """A loopback server that hands out one file and can be told to misbehave."""

    content: bytes = CONTENT
    ranges: bool = True
    etag: str = '"first"'
    length: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the connection of each next answer breaks."""
    asked: list[str | None] = field(default_factory=list)
    """The Range header of each request."""
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)

    def do_GET(self) -> None:
        site = self.site
        site.asked.append(self.headers["Range"])
        if self.path.startswith("/gone"):
            return self.send_error(404)
        start = 0
        same = self.headers["If-Range"] in (None, site.etag)
        if site.ranges and same and (asked := re.match(r"bytes=(\d+)-", self.headers["Range"] or "")):
            start = int(asked[1])
            if start >= len(site.content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(site.content) - 1}/{len(site.content)}")
        else:
            self.send_response(200)
        if site.etag:
            self.send_header("ETag", site.etag)
        if site.length:
            self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        body = site.content[start:]
        self.wfile.write(body[: site.cut_after.pop(0)] if site.cut_after else body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    told = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, told))
    told.url = f"http://127.0.0.1:{server.server_port}/data/images.zip"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def leftovers(folder: Path) -> list[str]:
    """What lies there beside lock files, which are empty and stay."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_comes_whole_under_its_own_name(site: Site, tmp_path: Path) -> None:
    path = fetch(site.url, tmp_path, SHA256)

    assert path.name == "images.zip"
    assert path.read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["images.zip"]


def test_a_file_that_is_there_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    first = fetch(site.url, tmp_path)

    assert fetch(site.url, tmp_path, SHA256) == first
    assert len(site.asked) == 1


def test_an_archive_behind_a_url_is_fetched_checked_and_unpacked(site: Site, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("cat/1.png", b"data")
    site.content = buffer.getvalue()
    right, wrong = {"images.zip": hashlib.sha256(site.content).hexdigest()}, {"images.zip": "0" * 64}

    with pytest.raises(UserError, match=r"wrong checksum of images.zip"):
        obtain(site.url, wrong, tmp_path)
    assert (obtain(site.url, right, tmp_path) / "cat/1.png").read_bytes() == b"data"
    obtain(site.url, right, tmp_path)
    assert len(site.asked) == 2  # once for the wrong checksum, once for the right one


def test_two_urls_that_end_in_the_same_name_do_not_meet(site: Site, tmp_path: Path) -> None:
    assert fetch(site.url, tmp_path) != fetch(site.url.replace("/data/", "/other/"), tmp_path)


def test_a_broken_connection_is_resumed_where_it_broke(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000, 200_000]

    path = fetch(site.url, tmp_path, pause_s=0)

    assert path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-", "bytes=500000-"]


def test_an_interrupted_download_keeps_a_partial_file_and_goes_on_in_the_next_run(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000]
    with pytest.raises(UserError, match=r"images.zip: the connection broke after 300,000 of 1,024,000 bytes: run"):
        fetch(site.url, tmp_path, attempts=1)
    assert leftovers(tmp_path) == ["images.zip.partial", "images.zip.partial.version"]

    path = fetch(site.url, tmp_path, attempts=1)

    assert path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-"]


def test_a_server_without_ranges_starts_again(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cut_after = False, [300_000]

    path = fetch(site.url, tmp_path, pause_s=0)

    assert path.read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-"]


def test_a_file_that_changed_meanwhile_is_not_glued_to_the_old_half(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000]
    with pytest.raises(UserError):
        fetch(site.url, tmp_path, attempts=1)
    site.content, site.etag = CONTENT[::-1], '"second"'

    assert fetch(site.url, tmp_path).read_bytes() == CONTENT[::-1]


def test_without_a_version_to_compare_it_resumes_only_if_a_checksum_will_tell(site: Site, tmp_path: Path) -> None:
    site.etag, site.cut_after = "", [1000]
    fetch(site.url, tmp_path / "unchecked", pause_s=0)
    assert site.asked == [None, None]

    site.asked, site.cut_after = [], [1000]
    fetch(site.url, tmp_path / "checked", SHA256, pause_s=0)
    assert site.asked == [None, "bytes=1000-"]


def test_a_partial_file_longer_than_the_servers_is_thrown_away(site: Site, tmp_path: Path) -> None:
    site.cut_after = [300_000]
    with pytest.raises(UserError):
        fetch(site.url, tmp_path, attempts=1)
    site.content = CONTENT[:1000]

    assert fetch(site.url, tmp_path, pause_s=0).read_bytes() == CONTENT[:1000]


def test_a_wrong_checksum_names_file_found_expected_and_remedy_and_keeps_nothing(site: Site, tmp_path: Path) -> None:
    wrong = Checksum("sha256", "0" * 64)

    with pytest.raises(UserError, match=rf"images.zip: sha256 is {SHA256.digest}, expected 0+: run again.*data.sha256"):
        fetch(site.url, tmp_path, wrong)
    assert leftovers(tmp_path) == []


def test_a_kept_file_of_another_version_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    site.content = b"old"
    fetch(site.url, tmp_path)
    site.content = CONTENT

    assert fetch(site.url, tmp_path, SHA256).read_bytes() == CONTENT


def test_a_missing_page_and_no_server_are_told_apart(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/x.zip: the server answers 404 Not Found: check data.location"):
        fetch(site.url.replace("/data/images.zip", "/gone/x.zip"), tmp_path)
    with pytest.raises(UserError, match=r"cannot be reached .*check the network, or download it elsewhere"):
        fetch("http://127.0.0.1:9/images.zip", tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("url", ["ftp://host/images.zip", "s3://bucket/images.zip", "http://host/"])
def test_a_url_that_cannot_be_fetched_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.location = .*(only http and https|names no file)"):
        fetch(url, tmp_path)


def test_a_second_process_does_not_write_into_the_same_file(site: Site, tmp_path: Path) -> None:
    path = fetch(site.url, tmp_path)
    with path.with_name("images.zip.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being downloaded by another process"):
            fetch(site.url, tmp_path)


def test_a_folder_that_cannot_be_written_is_told(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(UserError, match=r"cannot make .* for downloads: Not a directory"):
        fetch(site.url, tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_told(site: Site, tmp_path: Path) -> None:
    path = fetch(site.url, tmp_path)
    path.unlink()
    path.with_name("images.zip.partial").symlink_to("/dev/full")

    with pytest.raises(UserError, match=r"cannot write .*No space left on device: make room"):
        fetch(site.url, tmp_path)
