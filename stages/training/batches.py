"""Batches of stored images on the device: from its own memory where they fit, else read ahead by a thread."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch

from stages.datasets.store import Part
from stages.training.cuda_graphs import CAPTURE

AHEAD = 2
"""Batches that are read before they are asked for."""
COPIED = 4096
"""Images that are in the computer's own memory at once on their way to a device's."""
SHARE = 0.5
"""Of the free memory: so much the images may take, to be held there."""


class Images:
    """The images of a part, for a device.

    Args:
        device: on CUDA, images that take less than half of its free memory are copied there once. On the CPU
            such images stay memory-mapped: after the first epoch the system holds their pages.
    """

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part, self.device = part, device
        size = getattr(part.images, "nbytes", float("inf"))  # unknown: as if they did not fit
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
        self.fit = size < SHARE * free
        self._held = None
        if self.fit and cuda:
            self._held = tuple(_on_device(array, device) for array in (part.images, part.labels))

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each index int64 `[B]`, images uint8 `[B, H, W, 3]` and labels int64 `[B]` in its order."""
        if self._held is not None:
            for index in indices:
                on_device = torch.from_numpy(index).to(self.device, non_blocking=True)
                yield tuple(tensor.index_select(0, on_device) for tensor in self._held)
        elif self.fit:
            yield from map(self._read, indices)
        else:
            yield from self._read_ahead(indices)

    def _read(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        order = np.argsort(index, kind="stable")  # the disk is read forwards
        found = self.part.images[index[order]]
        images = np.empty_like(found)
        images[order] = found
        return torch.from_numpy(images), torch.from_numpy(self.part.labels[index])

    def _read_ahead(self, indices: Iterable[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pinned = self.device.type == "cuda"

        def read(index: np.ndarray) -> tuple[torch.Tensor, ...]:
            batch = self._read(index)
            if not pinned:
                return batch
            with CAPTURE:
                return tuple(tensor.pin_memory() for tensor in batch)

        with ThreadPoolExecutor(1, "read-ahead") as pool:
            waiting: deque = deque()
            for index in indices:
                waiting.append(pool.submit(read, index))
                if len(waiting) > AHEAD:
                    yield self._moved(waiting.popleft().result())
            while waiting:
                yield self._moved(waiting.popleft().result())

    def _moved(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A memory-mapped `[N, ...]` in the device's memory, without being in the computer's as a whole."""
    held = torch.empty(array.shape, dtype=torch.from_numpy(np.array(array[:1])).dtype, device=device)
    for start in range(0, len(array), COPIED):
        held[start : start + COPIED] = torch.from_numpy(np.array(array[start : start + COPIED]))
    return held
