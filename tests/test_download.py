import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from PIL import Image

from stages.common import paths
from stages.common.errors import UserError
from stages.datasets.store import open_part, read_info
from stages.download import download, main
from stages.params.data import Data

DIGITS = {"name": "digits", "source": "digits", "image_size": 16, "validation_fraction": 0.1}
PETS = {**DIGITS, "name": "pets", "source": "folder", "location": "pets"}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(data: dict) -> None:
    paths.PARAMS.write_text(yaml.safe_dump({"data": data}))


def write_pets() -> None:
    """Eight images of each class, and a broken one."""
    for label, name in enumerate(("cat", "dog")):
        (Path("pets") / name).mkdir(parents=True)
        for index in range(8):
            Image.new("L", (8, 8), 16 * (8 * label + index)).save(Path("pets") / name / f"{index}.png")
    Path("pets/dog/9.png").write_bytes(b"no image")


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_stage_writes_the_digits_and_prints_what_to_know(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    write_params(DIGITS)

    main()

    assert read_info(paths.IMAGES).counts == {"train": 1295, "validation": 143, "test": 359}
    assert open_part(paths.IMAGES, "train").images.shape == (1295, 16, 16, 3)
    out = capsys.readouterr().out
    assert out.startswith("data/images: digits (")
    assert "10 classes, train 1,295, validation 143, test 359 images of 16x16 (crop, RGB), 1.4 MB" in out
    assert "top-1 of a constant answer, such as" in out
    assert "validation has 143 images: the 95 % interval of an accuracy of 90 % is ±5 points" in out
    assert "copies" not in out
    assert [path.name for path in Path("data").iterdir()] == ["images"]
    first = everything(paths.IMAGES)
    main()
    assert everything(paths.IMAGES) == first


def test_bad_input_and_a_full_disk_keep_the_earlier_images(workspace: Path) -> None:
    write_params(DIGITS)
    main()
    before = everything(paths.IMAGES)

    write_pets()
    write_params(PETS)
    with pytest.raises(UserError, match=r"^pets: dog/9.png: unreadable image .*data.allow_unreadable: true"):
        main()
    write_params({**DIGITS, "image_size": 64})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match=r"^cannot write data/images: File too large: make room"):
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    assert everything(paths.IMAGES) == before
    assert [path.name for path in Path("data").iterdir()] == ["images"]


def test_unreadable_images_and_the_remark_end_the_line(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    write_pets()
    Path("pets/dog/notes.txt").write_text("barks")
    write_params({**PETS, "allow_unreadable": True})

    main()

    out = capsys.readouterr().out
    assert "; unreadable images left out: 1; files ignored because they are no images: 1\n" in out
    assert read_info(paths.IMAGES).unreadable == ["dog/9.png"]


def test_an_unpacked_archive_is_removed_even_after_an_error(workspace: Path) -> None:
    with zipfile.ZipFile("pets.zip", "w") as archive:
        archive.writestr("cat/1.png", b"no image")

    with pytest.raises(UserError):
        download(Data(**{**PETS, "location": "pets.zip"}), workspace, paths.SCRATCH, threads=1)

    assert not (paths.SCRATCH / "unpacked").exists()


def test_importing_the_stage_imports_no_data_library(workspace: Path) -> None:
    heavy = {"sklearn", "pyarrow", "torch", "torchvision", "pooch", "requests", "rich", "psutil"}
    code = f"import sys; before = set(sys.modules); import stages.download; print({heavy} & set(sys.modules) - before)"
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "set()"
