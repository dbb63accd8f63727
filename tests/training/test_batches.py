import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.datasets.store import Part
from stages.training import batches
from stages.training.batches import AHEAD, Images, copy_in_chunks

CPU = torch.device("cpu")


@pytest.fixture
def part(tmp_path: Path) -> Part:
    """60 memory-mapped images."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8))
    return Part(np.load(tmp_path / "images.npy", mmap_mode="r"), np.arange(60))


def indices() -> list[np.ndarray]:
    return list(np.random.default_rng(1).permutation(60).reshape(6, 10))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fraction", [0.5, 0.0], ids=["fits", "read ahead"])
def test_batches_hold_the_indexed_images_in_order(part, fraction, device, monkeypatch):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(batches, "FRACTION", fraction)
    images = Images(part, torch.device(device))
    assert images.fit == (fraction > 0)
    for index, (pixels, labels) in zip(indices(), images.batches(iter(indices())), strict=True):
        assert pixels.device.type == labels.device.type == device
        assert torch.equal(pixels.cpu(), torch.from_numpy(np.array(part.images)[index]))
        assert labels.tolist() == index.tolist()


def test_a_thread_reads_the_next_batches_and_no_more(part, monkeypatch):
    monkeypatch.setattr(batches, "FRACTION", 0.0)
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
    monkeypatch.setattr(batches, "FRACTION", 0.0)

    class Broken:
        nbytes = 1

        def __getitem__(self, index):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        list(Images(Part(Broken(), part.labels), CPU).batches(indices()))


def test_images_are_copied_to_a_device_in_chunks(part, monkeypatch):
    monkeypatch.setattr(batches, "CHUNK", 7)
    copied = copy_in_chunks(part.images, CPU)
    assert copied.dtype == torch.uint8
    assert torch.equal(copied, torch.from_numpy(np.array(part.images)))
