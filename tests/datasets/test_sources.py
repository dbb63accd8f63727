import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10

from stages.common.errors import UserError
from stages.datasets.decode import decode
from stages.datasets.source import Source
from stages.datasets.sources.cifar10 import CLASSES, cifar10_source
from stages.datasets.sources.digits import digits_source
from stages.datasets.sources.folder import folder_source
from stages.datasets.sources.parquet import parquet_source
from stages.datasets.store import Info
from stages.datasets.writer import write_images
from stages.params.data import Data

CAT_DOG = ["cat", "dog"]
NUMBERS = [*range(10)]


def picture(image_format: str = "PNG", gray: int = 0, size: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (gray, gray, gray)).save(buffer, image_format)
    return buffer.getvalue()


# digits


def test_digits_are_the_1797_of_scikit_learn_from_black_to_white() -> None:
    source = digits_source({})
    pixels = np.stack([image.content for image in source.images("train")])

    assert source.classes == [str(digit) for digit in range(10)]
    assert list(source.labels) == ["train"]
    assert len(source.labels["train"]) == len(pixels) == 1797
    assert (pixels.min(), pixels.max(), pixels.dtype) == (0, 255, np.uint8)
    assert np.bincount(source.labels["train"]).min() > 170
    assert "CC BY 4.0" in source.licence
    with pytest.raises(UserError, match=r"data.sha256 lists 'digits.csv', but source digits has no files"):
        digits_source({"digits.csv": "0" * 64})


# cifar10


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A release in miniature, packed as the official one: two train batches and a test batch of 20 images each."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    folder = tmp_path / "published/cifar-10-batches-py"
    folder.mkdir(parents=True)
    files = {"batches.meta": {"label_names": CLASSES}}
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        planes = pixels[number * 20 : number * 20 + 20].transpose(0, 3, 1, 2).reshape(20, 3072)
        files[name] = {"data": planes, "labels": [index % 10 for index in range(20)]}
    md5 = {}
    for name, value in files.items():
        (folder / name).write_bytes(pickle.dumps(value))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    archive = tmp_path / "published/cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return archive, pixels


def test_cifar_is_read_from_its_archive_or_from_the_unpacked_folder(cifar, tmp_path: Path) -> None:
    archive, pixels = cifar
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / archive.name).hardlink_to(archive)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    (archive.parent / "cifar-10-batches-py").rename(unpacked / "cifar-10-batches-py")

    for location in (archive, alone, unpacked, unpacked / "cifar-10-batches-py"):
        source = cifar10_source(str(location), {}, tmp_path / "scratch")

        assert source.classes == CLASSES
        assert source.labels["train"].tolist() == NUMBERS * 4
        assert source.labels["test"].tolist() == NUMBERS * 2
        np.testing.assert_array_equal([image.content for image in source.images("train")], pixels[:40])
        np.testing.assert_array_equal([image.content for image in source.images("test")], pixels[40:])


class _Attack:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("attacked"),)


def test_a_forged_archive_or_batch_is_refused_before_it_is_unpickled(cifar, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    archive, _ = cifar
    folder = archive.parent / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(pickle.dumps({"data": 0, "labels": [_Attack()]}))
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(folder, folder.name)

    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: wrong checksum: md5 is "):
        cifar10_source(str(archive), {}, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    for remove in (False, True):
        if remove:
            (folder / "data_batch_2").unlink()
        with pytest.raises(UserError, match=r"cifar-10-batches-py: a batch is missing or has a wrong checksum"):
            cifar10_source(str(folder), {}, tmp_path / "scratch")
    assert not Path("attacked").exists()


def test_without_network_cifar_says_how_to_give_the_archive(cifar, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "*")

    with pytest.raises(UserError, match=r"10-python.tar.gz: the download failed .*give its path as data.location"):
        cifar10_source(None, {}, tmp_path / "scratch")


def test_cifar_may_be_given_as_parquet_files_of_the_same_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        parquet(tmp_path / f"cifar/plain_text/{part}-00000-of-00001.parquet", NUMBERS, CLASSES)

    source = cifar10_source(str(tmp_path / "cifar"), {}, tmp_path / "scratch")
    assert source.description == "CIFAR-10 (parquet)"
    assert {part: labels.tolist() for part, labels in source.labels.items()} == {"train": NUMBERS, "test": NUMBERS}

    pets = parquet(tmp_path / "pets/train.parquet", [0, 1], CAT_DOG)
    with pytest.raises(UserError, match=r"is not CIFAR-10: .*source: parquet"):
        cifar10_source(str(pets), {}, tmp_path / "scratch")


# parquet


def parquet(
    path: Path,
    labels: list[int | None],
    names: list[str] | None = None,
    column: str = "img",
    content: bytes | None = None,
    licence: str | None = None,
    image_format: str = "PNG",
    cut: int | None = None,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [content or picture(image_format, gray=9 * i % 256) for i in range(len(labels))]
    table = pa.table(
        {column: [{"bytes": b[:cut], "path": f"{i}.png"} for i, b in enumerate(contents)], "label": labels}
    )
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        info = {"features": features, **({"license": licence} if licence else {})}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": info})})
    pq.write_table(table, path, row_group_size=8)
    return path


def read_parquet(path: Path, tmp_path: Path) -> Source:
    return parquet_source(str(path), {}, tmp_path / "scratch")


def write(source: Source, tmp_path: Path, threads: int = 1) -> Info:
    (tmp_path / "out").mkdir(exist_ok=True)
    data = Data(name="toy", source="digits", image_size=8, validation_fraction=0.2)
    return write_images(source, data, tmp_path / "out", threads)


def test_parquet_parts_classes_and_licence_come_from_names_and_metadata(tmp_path: Path) -> None:
    for name, labels in [
        ("train-00000-of-00002", [0] * 8),
        ("train-00001-of-00002", [1] * 9),
        ("validation-00000-of-00001", [0, 1, 1]),
        ("test-00000-of-00001", [0, 1]),
    ]:
        parquet(tmp_path / f"{name}.parquet", labels, CAT_DOG, licence="CC0")

    source = read_parquet(tmp_path, tmp_path)

    assert (source.classes, source.licence, source.remark) == (CAT_DOG, "CC0", "")
    assert source.labels["train"].tolist() == [0] * 8 + [1] * 9
    assert {part: len(labels) for part, labels in source.labels.items()} == {"train": 17, "validation": 3, "test": 2}
    images = list(source.images("train"))
    assert len(images) == 17
    assert images[9] == ("train-00001-of-00002.parquet: row 1 (1.png)", picture(gray=9))


def test_a_single_parquet_file_without_metadata_has_numbers_as_class_names(tmp_path: Path) -> None:
    source = read_parquet(parquet(tmp_path / "flowers.parquet", [0, 2, 1, 2], column="image"), tmp_path)

    assert source.classes == ["0", "1", "2"]
    assert source.labels["train"].tolist() == [0, 2, 1, 2]
    assert len(list(source.images("train"))) == 4


def test_parquet_files_belong_to_the_part_that_their_folder_is_named_after(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train/0000.parquet", [0, 1])
    parquet(tmp_path / "data/test/0000.parquet", [1])

    source = read_parquet(tmp_path / "data", tmp_path)

    assert {part: len(labels) for part, labels in source.labels.items()} == {"train": 2, "test": 1}
    assert source.remark == "test lacks images of 1 of 2 classes, such as '0'"


def test_jpeg_images_are_described_as_such(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [0, 1] * 5, image_format="JPEG")

    info = write(read_parquet(path, tmp_path), tmp_path)

    assert info.source == "parquet, JPEG images"
    assert info.counts == {"train": 6, "validation": 2, "test": 2}


def test_an_unreadable_image_and_an_empty_class_in_parquet_are_named(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [0, 1] * 5, cut=48)
    with pytest.raises(UserError, match=r"train.parquet: row 0 \(0.png\): unreadable image"):
        write(read_parquet(path, tmp_path), tmp_path)

    path = parquet(tmp_path / "train.parquet", [0, 1] * 5, [*CAT_DOG, "unicorn"])
    with pytest.raises(UserError, match="class 'unicorn' has 0 different training images"):
        write(read_parquet(path, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, -1], CAT_DOG, r"test.parquet\): row 2 has label -1, the classes are 0 to 1: .*an unlabeled part"),
        ([0, 2], CAT_DOG, r"row 1 has label 2, the classes are 0 to 1"),
        ([0, None], CAT_DOG, r"test.parquet: 1 rows have no label"),
        ([0, 1], ["dog", "cat"], r"test.parquet names other classes than .*train.parquet"),
    ],
)
def test_labels_and_class_names_that_do_not_fit_are_refused(labels, names, message: str, tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [0, 1], CAT_DOG)
    parquet(tmp_path / "test.parquet", labels, names)

    with pytest.raises(UserError, match=message):
        read_parquet(tmp_path, tmp_path)


def test_parquet_files_that_are_no_data_set_are_refused_with_the_reason(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "whole/test.parquet", [0, 1] * 50)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(whole.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"picture": [b"x"], "label": ["cat"]}), other)
    for name in ("fine", "coarse"):
        parquet(tmp_path / f"several/{name}/train.parquet", [0, 1])

    for path, message in [
        (broken, r"broken.parquet: broken parquet file .*: get it again"),
        (whole, r"there is no train part: its parquet files are named for test"),
        (tmp_path / "empty", r"empty holds no .parquet files: check data.location"),
        (other, r"needs columns `img` or `image` .* it has picture: binary, label: string"),
        (tmp_path / "several", r"several data sets \(coarse, fine\): name one of them in data.location"),
    ]:
        with pytest.raises(UserError, match=message):
            read_parquet(path, tmp_path)


# folder


def tree(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("JPEG" if path.suffix == ".jpg" else "PNG", gray=index * 10))
    return root


def read_folder(root: Path, tmp_path: Path) -> dict[str, list[tuple[str, str]]]:
    """(class, image) in each part."""
    source = folder_source(str(root), {}, tmp_path / "scratch")
    return {
        part: [(source.classes[label], image.name) for label, image in zip(labels, source.images(part), strict=True)]
        for part, labels in source.labels.items()
    }


def test_folders_are_classes_read_recursively_in_order_without_hidden_files(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", "cat/2.png", "cat/1.JPG", "dog/deep/er/3.png", "cat/.hidden.png", "dog/.git/x.png")

    assert read_folder(root, tmp_path) == {
        "train": [("cat", "cat/1.JPG"), ("cat", "cat/2.png"), ("dog", "dog/deep/er/3.png")]
    }


def test_folders_for_parts_above_the_classes(tmp_path: Path) -> None:
    names = [f"{part}/{name}/1.png" for part in ("train", "test", "val") for name in CAT_DOG]

    assert read_folder(tree(tmp_path / "pets", *names), tmp_path) == {
        part: [(name, f"{folder}/{name}/1.png") for name in CAT_DOG]
        for part, folder in [("train", "train"), ("test", "test"), ("validation", "val")]
    }


def test_an_archive_with_one_folder_around_the_rest(tmp_path: Path) -> None:
    root = tree(tmp_path / "made/pets", "train/cat/1.png", "train/dog/1.png", "__MACOSX/cat/1.png")
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, path.relative_to(root.parent))

    source = folder_source(str(tmp_path / "pets.zip"), {}, tmp_path / "scratch")

    assert source.classes == CAT_DOG
    assert [image.name for image in source.images("train")] == ["train/cat/1.png", "train/dog/1.png"]
    assert decode(next(source.images("train")).content, 4, "crop", 3)[1] == "PNG"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = read_folder(tree(tmp_path / "vehicles", "train/1.png", "bus/1.png"), tmp_path)

    assert found == {"train": [("bus", "bus/1.png"), ("train", "train/1.png")]}


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", "cat/1.png", "dog/1.png")
    (root / "cat/notes.txt").write_text("whiskers")

    source = folder_source(str(root), {}, tmp_path / "scratch")

    assert len(source.labels["train"]) == 2
    assert source.remark == "files ignored because they are no images: 1"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.heic"], "'test/dog' .*such as 1.heic"),
        (
            ["train/cat/1.png", "train/dog/1.png", "train/eel/1.png", *["test/cat/1.png", "test/dog/1.png"]],
            "class 'eel' is in .*/train but not in .*/test",
        ),
        (
            ["train/cat/1.png", "train/dog/1.png", *["test/cat/1.png", "test/dog/1.png", "test/eel/1.png"]],
            "class 'eel' is in .*/test but not in .*/train",
        ),
        (["train/cat/1.png", "test/cat/1.png", "more/cat/1.png"], "'more' lies beside the parts"),
        (["train/cat/1.png", "val/cat/1.png", "valid/cat/1.png"], "'valid' and 'val' are both the validation part"),
        (["test/cat/1.png", "val/cat/1.png"], "there is no train part beside"),
        (["1.png", "2.png"], "two or more; {root} holds none, and 2 images outside: sort them"),
        (["cat/1.png", "2.png"], "two or more; {root} holds one, 'cat', and 1 image outside: sort them"),
        (["cat/1.png"], "two or more; {root} holds one, 'cat'$"),
        (["train/cat/1.png", "test/cat/1.png"], "two or more; {root}/train holds one, 'cat'$"),
    ],
)
def test_folders_that_are_no_data_set_are_refused_with_the_reason(files, message: str, tmp_path: Path) -> None:
    root = tree(tmp_path / "pets", *files)

    with pytest.raises(UserError, match=message.format(root=root)):
        read_folder(root, tmp_path)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(picture())

    with pytest.raises(UserError, match=r"image.png is neither a folder nor a zip or tar archive"):
        read_folder(tmp_path / "image.png", tmp_path)


def test_a_mixed_folder_is_described_by_its_formats(tmp_path: Path) -> None:
    files = ["cat/1.png", "cat/2.jpg", "cat/3.png", "dog/1.png", "dog/2.jpg", "dog/3.png"]
    root = tree(tmp_path / "pets", *(f"{part}/{name}" for part in ("train", "test") for name in files))

    info = write(folder_source(str(root), {}, tmp_path / "scratch"), tmp_path, threads=2)

    assert info.source == "folder, JPEG and PNG images"
    assert info.licence == "not stated"
    assert info.counts == {"train": 4, "validation": 2, "test": 6}
