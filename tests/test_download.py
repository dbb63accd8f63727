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


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(data: dict, architecture: str = "convnext_atto") -> None:
    model = {"library": "timm", "architecture": architecture, "input_size": 32}
    sections = {
        "base": {},
        "data": data,
        "finetune": {"epochs": 1, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.001},
        "models": {"atto": model},
        "pruners": {"none": {"method": "none"}},
        "pruned": {"atto-none": {"model": "atto", "pruner": "none"}},
        "quantizers": {"fp32": {"method": "fp32"}},
        "variants": {"atto-none-fp32": {"pruned": "atto-none", "quantizer": "fp32"}},
    }
    paths.PARAMS.write_text(yaml.safe_dump(sections))


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_stage_writes_the_digits_and_says_so_in_one_line(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    write_params(DIGITS)

    main()

    assert read_info(paths.IMAGES).counts == {"train": 1295, "validation": 143, "test": 359}
    assert open_part(paths.IMAGES, "train").images.shape == (1295, 16, 16, 3)
    out = capsys.readouterr().out
    assert out.startswith("data/images: digits (")
    assert "10 classes, train 1,295, validation 143, test 359 images of 16x16, 1.4 MB" in out
    assert out.count("\n") == 1
    assert [path.name for path in Path("data").iterdir()] == ["images"]


def test_a_second_run_gives_the_same_bytes(workspace: Path) -> None:
    write_params(DIGITS)
    main()
    first = everything(paths.IMAGES)

    main()

    assert everything(paths.IMAGES) == first


def test_bad_input_leaves_what_was_there_untouched(workspace: Path) -> None:
    write_params(DIGITS)
    main()
    before = everything(paths.IMAGES)
    for name in ("cat", "dog"):
        (Path("pets") / name).mkdir(parents=True)
        for index in range(4):
            Image.new("L", (8, 8)).save(Path("pets") / name / f"{index}.png")
    (Path("pets/dog/9.png")).write_bytes(b"no image")
    write_params({**DIGITS, "source": "folder", "location": "pets"})

    with pytest.raises(UserError, match=r"^pets: dog/9.png: unreadable image .*data.allow_unreadable: true"):
        main()

    assert everything(paths.IMAGES) == before
    assert [path.name for path in Path("data").iterdir()] == ["images"]


def test_an_unknown_architecture_is_refused_before_any_work(workspace: Path) -> None:
    write_params(DIGITS, architecture="convnext_ato")

    with pytest.raises(UserError, match=r"models\.atto\.architecture"):
        main()
    assert not Path("data").exists()


def test_left_out_images_and_the_remark_end_the_summary(workspace: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("cat", "dog"):
        (Path("pets") / name).mkdir(parents=True)
        for index in range(8):
            Image.new("L", (8, 8)).save(Path("pets") / name / f"{index}.png")
    Path("pets/dog/9.png").write_bytes(b"no image")
    Path("pets/dog/notes.txt").write_text("barks")
    write_params({**DIGITS, "name": "pets", "source": "folder", "location": "pets", "allow_unreadable": True})

    main()

    out = capsys.readouterr().out
    assert out.endswith("; unreadable images left out: 1; files passed over because they are no images: 1\n")
    assert read_info(paths.IMAGES).unreadable == ["dog/9.png"]


def test_what_was_unpacked_is_cleared_away_also_after_an_error(workspace: Path) -> None:
    with zipfile.ZipFile("pets.zip", "w") as archive:
        archive.writestr("cat/1.png", b"no image")
    data = Data(name="pets", source="folder", location="pets.zip", image_size=8, validation_fraction=0.1)

    with pytest.raises(UserError):
        download(data, workspace, paths.SCRATCH, threads=1)

    assert not (paths.SCRATCH / "unpacked").exists()


def test_importing_the_stage_reads_no_data_library(workspace: Path) -> None:
    root = Path(__file__).parents[1]
    code = "import sys, stages.download; print(sorted({'sklearn', 'pyarrow', 'torch'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "[]"
