"""Batches of stored images on the device: from memory if the images fit, else a thread reads them ahead."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch

from stages.datasets.store import Part
from stages.params.finetune import Finetune

AHEAD = 2
"""Number of batches that the thread reads in advance."""
CHUNK = 4096
"""Number of images that are copied to a GPU at once."""
FRACTION = 0.5
"""Largest fraction of the free memory that the images may take."""


def steps_per_epoch(recipe: Finetune, images: int) -> int:
    """Full batches in one epoch. The images of an incomplete batch are left out; the next epoch has another order."""
    return max(1, images // recipe.batch_size)


class Images:
    """The images of a part, for a device.

    Args:
        device: images that fit into the memory of a CUDA device are copied there once. On the CPU, images that fit stay
            memory-mapped: after the first epoch the operating system has them in its page cache.
    """

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part, self.device = part, device
        size = getattr(part.images, "nbytes", float("inf"))
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
        self.fit = size < FRACTION * free
        self._on_device = None
        if self.fit and cuda:
            self._on_device = tuple(copy_in_chunks(array, device) for array in (part.images, part.labels))

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each index int64 `[B]`: images uint8 `[B, H, W, C]` and labels int64 `[B]` in its order."""
        if self._on_device is not None:
            for index in indices:
                index = torch.from_numpy(index).to(self.device, non_blocking=True)
                yield tuple(tensor.index_select(0, index) for tensor in self._on_device)
        elif self.fit:
            yield from map(self._read, indices)
        else:
            yield from self._read_ahead(indices)

    def _read(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        order = np.argsort(index, kind="stable")  # reads the disk in one direction
        found = self.part.images[index[order]]
        images = np.empty_like(found)
        images[order] = found
        return torch.from_numpy(images), torch.from_numpy(self.part.labels[index])

    def _read_pinned(self, index: np.ndarray) -> tuple[torch.Tensor, ...]:
        batch = self._read(index)
        return tuple(tensor.pin_memory() for tensor in batch) if self.device.type == "cuda" else batch

    def _read_ahead(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[torch.Tensor, ...]]:
        with ThreadPoolExecutor(1, "read-ahead") as pool:
            waiting: deque = deque()
            for index in indices:
                waiting.append(pool.submit(self._read_pinned, index))
                if len(waiting) > AHEAD:
                    yield self._to_device(waiting.popleft().result())
            while waiting:
                yield self._to_device(waiting.popleft().result())

    def _to_device(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)


def copy_in_chunks(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a memory-mapped `[N, ...]` to the device without holding all of it in the computer's memory."""
    copied = torch.empty(array.shape, dtype=torch.from_numpy(np.array(array[:1])).dtype, device=device)
    for start in range(0, len(array), CHUNK):
        copied[start : start + CHUNK] = torch.from_numpy(np.array(array[start : start + CHUNK]))
    return copied
