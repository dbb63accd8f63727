"""What the tests of training share: a tiny network, parts that watch their reads, and a constraint that records."""

from collections.abc import Callable

import numpy as np
from torch import nn

from stages.datasets.store import Part
from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec
from stages.params.base import Base
from stages.training.constraint import Constraint

BASE = Base(device="cpu", threads=1)


def tiny_network() -> nn.Module:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.1, "ls_init_value": None}
    return build_network(NetworkSpec("timm", "convnext_atto", arguments, classes=2))


def weights(network: nn.Module) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())


def rows_of(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """The curve without its timing."""
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in curve]


class Watched(Part):
    """A part that lists the index of each batch that is read, and calls `on_read` with the number of reads."""

    def __init__(self, part: Part, on_read: Callable[[int], None] = lambda count: None) -> None:
        super().__init__(WatchedImages(part.images, on_read), part.labels)

    @property
    def reads(self) -> list[tuple[int, ...]]:
        return self.images.reads


class WatchedImages:
    def __init__(self, images: np.ndarray, on_read: Callable[[int], None]) -> None:
        self.images, self.on_read, self.reads = images, on_read, []

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        self.reads.append(tuple(index))
        self.on_read(len(self.reads))
        return self.images[index]


def interrupt_at(read: int) -> Callable[[int], None]:
    """An `on_read` that interrupts the training as Ctrl-C does."""

    def on_read(count: int) -> None:
        if count == read:
            raise KeyboardInterrupt

    return on_read


class Recorder(Constraint):
    """A constraint that records its calls and the weights after each step, and is met from a step on."""

    def __init__(self, network: nn.Module, met_from: int = 0) -> None:
        self.network, self.met_from, self.calls, self.taken = network, met_from, [], {}

    def before_step(self, step: int) -> None:
        assert all(parameter.grad is not None for parameter in self.network.parameters())
        self.calls.append(f"before {step}")

    def after_step(self, step: int) -> None:
        self.calls.append(f"after {step}")
        self.taken[step] = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def met_after(self, step: int) -> bool:
        return step >= self.met_from
