import functools
import hashlib
import io
import resource
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.datasets.obtain import fetch, obtain, unpack

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WRONG = "0" * 64
ONLY_IMAGE = ("a/1.png", tarfile.REGTYPE, "")


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, *entries: tuple[str, bytes, str], mode: str = "w:gz", content: bytes = b"data") -> Path:
    """Entries are (name, kind, target of a link)."""
    with tarfile.open(path, mode) as archive:
        for name, kind, link in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))
    return path


# files from the web


@dataclass
class Site:
    """A loopback server with one file."""

    content: bytes = CONTENT
    cut_after: int | None = None
    """Bytes after which the connection breaks."""
    requests: int = 0
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    def __init__(self, site: Site, *arguments: object) -> None:
        self.site = site
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.site.requests += 1
        if self.path.startswith("/gone"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.site.content)))
        self.end_headers()
        self.wfile.write(self.site.content[: self.site.cut_after])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, site))
    site.url = f"http://127.0.0.1:{server.server_port}/data/images.zip"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_under_its_own_name(site: Site, tmp_path: Path, capfd) -> None:
    path = fetch(site.url, tmp_path, f"sha256:{SHA256}")

    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["images.zip"]
    assert fetch(site.url, tmp_path, f"sha256:{SHA256}") == fetch(site.url, tmp_path) == path
    assert site.requests == 1
    assert fetch(site.url.replace("/data/", "/other/"), tmp_path) != path
    assert capfd.readouterr() == ("", "")


def test_an_archive_behind_a_url_is_downloaded_checked_and_unpacked(site: Site, tmp_path: Path) -> None:
    site.content = zipped(tmp_path / "images.zip", {"cat/1.png": b"data"}).read_bytes()
    right = {"images.zip": hashlib.sha256(site.content).hexdigest()}

    with pytest.raises(UserError, match=r"wrong checksum"):
        obtain(site.url, {"images.zip": WRONG}, tmp_path)
    for _ in range(2):
        assert (obtain(site.url, right, tmp_path) / "cat/1.png").read_bytes() == b"data"
    assert site.requests == 2  # one for each checksum


def test_a_wrong_checksum_is_one_line_and_leaves_no_file(site: Site, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"images.zip: wrong checksum: .*{WRONG}.*{SHA256}.*data.sha256") as caught:
        fetch(site.url, tmp_path, f"sha256:{WRONG}")
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == []


def test_a_kept_file_of_another_version_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    site.content = b"old"
    fetch(site.url, tmp_path)
    site.content = CONTENT

    assert fetch(site.url, tmp_path, f"sha256:{SHA256}").read_bytes() == CONTENT


def test_a_broken_connection_is_one_line_and_leaves_no_half_file(site: Site, tmp_path: Path) -> None:
    site.cut_after = 300_000
    with pytest.raises(UserError, match=r"images.zip: the download failed \(.*300000.*\): .*run again"):
        fetch(site.url, tmp_path)
    assert files_in(tmp_path) == []

    site.cut_after = None
    assert fetch(site.url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{site}/gone/x.zip", r"gone/x.zip: the server answers 404 Not Found: check data.location"),
        ("http://127.0.0.1:9/images.zip", r"\(\[Errno 111\] Connection refused\): .*give its path as data.location"),
        ("ftp://host/images.zip", r"data.location = 'ftp.*only http and https"),
        ("http://host/", r"data.location = 'http://host/': the URL names no file"),
    ],
)
def test_a_url_that_gives_no_file_is_one_line(site: Site, tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fetch(url.replace("{site}", site.url.removesuffix("/data/images.zip")), tmp_path)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_and_a_full_disk_are_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*images.zip: Not a directory"):
        fetch(site.url, tmp_path / "file")

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*images.zip: File too large: make room"):
            fetch(site.url, tmp_path / "downloads")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert files_in(tmp_path) == ["file"]


# archives


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_recognized_without_its_suffix(mode: str, tmp_path: Path) -> None:
    if mode == "zip":
        path = zipped(tmp_path / "images", {"a/": b"", "a/1.png": b"data"})
    else:
        path = tarred(tmp_path / "images", ("a", tarfile.DIRTYPE, ""), ONLY_IMAGE, mode=mode)

    assert (obtain(str(path), {}, tmp_path / "scratch") / "a/1.png").read_bytes() == b"data"


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "a\\..\\..\\evil.png"])
def test_no_entry_leaves_the_folder(name: str, tmp_path: Path) -> None:
    target = tmp_path / "deep/inside/unpacked"
    archive = zipped(tmp_path / "images.zip", {"ok.png": b"data", name: b"data"})
    with pytest.raises(UserError) as caught:
        unpack(archive, target)
    assert str(caught.value).startswith(f"{archive}: unsafe entry: {name!r} is outside")

    archive = tarred(tmp_path / "images.tar.gz", (name, tarfile.REGTYPE, ""))
    if "../" in name:
        with pytest.raises(UserError, match=r"unsafe entry: .*evil.png' would be extracted .* outside"):
            unpack(archive, target)
    else:  # tarfile takes the name as relative; a backslash does not separate folders
        unpack(archive, target)
    assert all(path.is_relative_to(target) for path in tmp_path.rglob("*evil*"))
    assert not Path("/tmp/evil.png").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, None])
def test_links_and_devices_are_refused_by_name(kind: bytes | None, tmp_path: Path) -> None:
    archive = tmp_path / "images"
    if kind is None:
        entry = zipfile.ZipInfo("a/trap.png")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr(entry, "ok.png")
    else:
        tarred(archive, ("ok.png", tarfile.REGTYPE, ""), ("a/trap.png", kind, "ok.png"))

    with pytest.raises(UserError, match=r"images: unsafe entry: 'a/trap.png' is a "):
        unpack(archive, tmp_path / "unpacked")


def test_a_damaged_and_an_encrypted_archive_are_named(tmp_path: Path) -> None:
    noise = b"".join(hashlib.sha256(bytes([index])).digest() for index in range(200))
    whole = zipped(tmp_path / "whole.zip", {"a/1.png": noise}).read_bytes()
    (tmp_path / "bad.zip").write_bytes(whole.replace(noise[:100], noise[100:200], 1))
    whole_tar = tarred(tmp_path / "whole.tar.gz", ONLY_IMAGE, content=noise).read_bytes()
    (tmp_path / "bad.tar.gz").write_bytes(whole_tar[:3000])
    encrypted = bytearray(whole)
    encrypted[6] |= 1  # the flag in the local header, and in the directory
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(encrypted)

    for name in ("bad.zip", "bad.tar.gz", "encrypted.zip"):
        with pytest.raises(UserError, match=rf"{name}: broken or encrypted archive .*: get it again"):
            unpack(tmp_path / name, tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tar.gz", "images.tar.bz2", "images.tar.xz"])
def test_an_archive_that_was_cut_off_is_named(tmp_path: Path, name: str) -> None:
    whole = tmp_path / f"whole-{name}"
    if name.endswith("zip"):
        zipped(whole, {"a/1.png": bytes(5000)})
    else:
        mode = "w:" + name.removeprefix("images.tar").removeprefix(".")
        tarred(whole, ONLY_IMAGE, mode=mode, content=bytes(5000))
    content = whole.read_bytes()
    for cut in (len(content) // 2, 20):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(UserError, match=rf"{name}: (broken or encrypted|cannot be unpacked) .*get it again"):
            obtain(str(tmp_path / name), {}, tmp_path / "scratch")


# checksums


def test_a_location_that_does_not_exist_is_named_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.location: {tmp_path}/nothing does not exist"):
        obtain(str(tmp_path / "nothing"), {}, tmp_path)


def test_the_listed_and_the_published_checksums_are_checked_before_unpacking(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    archive = zipped(tmp_path / "images/images.zip", {"a/1.png": b"data"})
    right = hashlib.sha256(archive.read_bytes()).hexdigest()

    for location in (archive, archive.parent):
        obtain(str(location), {"images.zip": right.upper()}, tmp_path / "scratch")
        with pytest.raises(UserError, match=rf"{archive}: wrong checksum: .*{right}.*{WRONG}.*data.sha256"):
            obtain(str(location), {"images.zip": WRONG}, tmp_path / "wrong")
    with pytest.raises(UserError, match="wrong checksum: md5"):
        obtain(str(archive), {}, tmp_path / "wrong", f"md5:{WRONG[:32]}")
    assert not (tmp_path / "wrong").exists()


def test_a_listed_file_that_is_missing_is_refused_because_it_would_go_unchecked(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "images.zip", {"a/1.png": b"data"})
    zipped(tmp_path / "other.zip", {})

    for location, name in [(archive, "image.zip"), (tmp_path, "image.zip"), (archive, "other.zip")]:
        with pytest.raises(UserError, match=rf"data.sha256 lists '{name}', which .* does not have"):
            obtain(str(location), {name: WRONG}, tmp_path / "scratch")
