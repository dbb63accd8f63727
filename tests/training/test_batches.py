import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.datasets.store import Part
from stages.training import batches
from stages.training.batches import AHEAD, Images

CPU = torch.device("cpu")


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """60 memory-mapped images."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8))
    return Part(np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(60))


def indices() -> list[np.ndarray]:
    return list(np.random.default_rng(1).permutation(60).reshape(6, 10))


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["fits", "read ahead"])
def test_batches_hold_the_images_that_are_asked_for_in_that_order(part, share, monkeypatch):
    monkeypatch.setattr(batches, "SHARE", share)
    images = Images(part, CPU)
    assert images.fit == (share > 0)
    found = list(images.batches(iter(indices())))
    assert len(found) == 6
    for index, (pixels, labels) in zip(indices(), found, strict=True):
        assert torch.equal(pixels, torch.from_numpy(np.array(part.images)[index]))
        assert labels.tolist() == index.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["fits", "read ahead"])
def test_batches_are_on_the_device(part, share, monkeypatch):
    monkeypatch.setattr(batches, "SHARE", share)
    for index, (pixels, labels) in zip(indices(), Images(part, torch.device("cuda")).batches(indices()), strict=True):
        assert pixels.is_cuda
        assert labels.is_cuda
        assert torch.equal(pixels.cpu(), torch.from_numpy(np.array(part.images)[index]))


def test_the_next_batches_are_read_while_one_is_used_and_no_more_than_these(part, monkeypatch):
    monkeypatch.setattr(batches, "SHARE", 0.0)
    read, enough, threads = [], threading.Event(), set()

    class Watched:
        nbytes = part.images.nbytes

        def __getitem__(self, index):
            read.append(index)
            threads.add(threading.current_thread())
            if len(read) == 1 + AHEAD:
                enough.set()
            return part.images[index]

    found = Images(Part(Watched(), part.labels), CPU).batches(indices())
    next(found)
    assert enough.wait(10)
    assert len(read) == 1 + AHEAD
    assert threading.main_thread() not in threads
    found.close()
    assert len(read) == 1 + AHEAD


def test_an_error_while_reading_ahead_reaches_the_training(part, monkeypatch):
    monkeypatch.setattr(batches, "SHARE", 0.0)

    class Broken:
        nbytes = 1

        def __getitem__(self, index):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(Images(Part(Broken(), part.labels), CPU).batches(indices()))


def test_images_are_brought_to_a_device_piece_by_piece(part, monkeypatch):
    monkeypatch.setattr(batches, "COPIED", 7)
    held = batches._on_device(part.images, CPU)
    assert held.dtype == torch.uint8
    assert torch.equal(held, torch.from_numpy(np.array(part.images)))
