import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.datasets.checksums import Checksum
from stages.datasets.obtain import obtain, unpack


def zipped(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, *entries: tuple[str, bytes, str], mode: str = "w:gz") -> Path:
    """Entries are (name, kind, where a link points to)."""
    with tarfile.open(path, mode) as archive:
        for name, kind, link in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(b"data"))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_archive_is_unpacked(mode: str, tmp_path: Path) -> None:
    entries = [("top", tarfile.DIRTYPE, ""), ("top/a/1.png", tarfile.REGTYPE, "")]
    path = tarred(tmp_path / "images.tar", *entries, mode=mode)

    folder = obtain(str(path), {}, tmp_path / "scratch")

    assert (folder / "top/a/1.png").read_bytes() == b"data"


def test_a_zip_archive_is_unpacked(tmp_path: Path) -> None:
    path = zipped(tmp_path / "images.zip", {"a/": b"", "a/1.png": b"data"})

    assert (obtain(str(path), {}, tmp_path / "scratch") / "a/1.png").read_bytes() == b"data"


@pytest.mark.parametrize("name", ["../evil.png", "a/../../evil.png", "/tmp/evil.png", "a\\..\\..\\evil.png"])
def test_an_entry_that_leaves_the_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    archives = [
        zipped(tmp_path / "images.zip", {"ok.png": b"data", name: b"data"}),
        tarred(tmp_path / "images.tar.gz", (name, tarfile.REGTYPE, "")),
    ]

    for archive in archives:
        with pytest.raises(UserError) as caught:
            unpack(archive, tmp_path / "deep/inside/unpacked")
        assert str(caught.value).startswith(f"{archive}: entry {name!r} would be written outside the folder")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused_by_name(kind: bytes, tmp_path: Path) -> None:
    archive = tarred(tmp_path / "images.tar.gz", ("a/trap.png", kind, "/etc/passwd"))

    with pytest.raises(UserError, match=r"entry 'a/trap.png' is a link or device"):
        unpack(archive, tmp_path / "unpacked")


def test_a_symbolic_link_in_a_zip_is_refused_by_name(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("a/trap.png")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")

    with pytest.raises(UserError, match=r"entry 'a/trap.png' is a link or device"):
        unpack(tmp_path / "images.zip", tmp_path / "unpacked")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    noise = b"".join(hashlib.sha256(bytes([index])).digest() for index in range(200))
    whole = zipped(tmp_path / "whole.zip", {"a/1.png": noise}).read_bytes()
    (tmp_path / "bad.zip").write_bytes(whole.replace(noise[:100], noise[100:200], 1))
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.size = len(noise)
        archive.addfile(info, io.BytesIO(noise))
    (tmp_path / "bad.tar.gz").write_bytes((tmp_path / "whole.tar.gz").read_bytes()[:3000])

    for name in ("bad.zip", "bad.tar.gz"):
        with pytest.raises(UserError, match=rf"{name}: broken or encrypted archive .*: get it again"):
            unpack(tmp_path / name, tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "images.tar.gz", "images.tar.bz2", "images.tar.xz"])
def test_an_archive_that_was_cut_off_is_called_that(tmp_path: Path, name: str) -> None:
    whole = tmp_path / f"whole-{name}"
    if name.endswith("zip"):
        zipped(whole, {"a/1.png": bytes(5000)})
    else:
        with tarfile.open(whole, f"w:{name.split('.')[2]}" if name.count(".") == 2 else "w") as archive:
            info = tarfile.TarInfo("a/1.png")
            info.size = 5000
            archive.addfile(info, io.BytesIO(bytes(5000)))
    content = whole.read_bytes()
    for cut in (len(content) // 2, 20):
        (tmp_path / name).write_bytes(content[:cut])
        with pytest.raises(UserError, match=rf"{name}: broken or .* get it again"):
            obtain(str(tmp_path / name), {}, tmp_path / "scratch")


def test_a_location_that_does_not_exist_is_told_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.location: {tmp_path}/nothing does not exist"):
        obtain(str(tmp_path / "nothing"), {}, tmp_path)


def test_checksums_of_an_archive_and_of_files_in_a_folder_are_checked(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    archive = zipped(tmp_path / "images/images.zip", {"a/1.png": b"data"})
    good = hashlib.sha256(archive.read_bytes()).hexdigest()

    for location in (archive, archive.parent):
        obtain(str(location), {"images.zip": good}, tmp_path / "scratch")
        with pytest.raises(UserError) as caught:
            obtain(str(location), {"images.zip": "0" * 64}, tmp_path / "scratch")
        for part in (str(archive), good, "0" * 64, "correct data.sha256"):
            assert part in str(caught.value)


def test_a_checksum_that_the_publisher_tells_is_checked(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "images.zip", {"a/1.png": b"data"})

    with pytest.raises(UserError, match="wrong checksum: md5"):
        obtain(str(archive), {}, tmp_path / "scratch", Checksum("md5", "0" * 32))


def test_a_listed_file_that_is_not_there_would_go_unchecked_and_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "images.zip", {"a/1.png": b"data"})

    for location in (archive, tmp_path):
        with pytest.raises(UserError, match=r"data.sha256 lists 'image.zip', which .* does not have"):
            obtain(str(location), {"image.zip": "0" * 64}, tmp_path / "scratch")
