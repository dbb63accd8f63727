"""Forward and backward of a network as CUDA graphs, one launch each.

A ConvNeXt on small images has hundreds of operations, each of which the GPU does faster than the host starts it.
"""

import contextlib
import gc
import threading
from collections.abc import Iterator

import torch
from torch import nn

CAPTURE = threading.Lock()
"""Held while a graph is captured: memory that another thread pins for the device meanwhile would spoil it."""


class Graphed:
    """Calls a network in training mode by a graph for each shape of its input, captured when that shape is first seen.

    A network that cannot be captured (one that waits for the device, say) is called as it is, and this is told.

    Args:
        network: on a CUDA device, called under autocast without its cache or without autocast. Its parameters may be
            changed in place between the calls.
        title: for messages.
    """

    def __init__(self, network: nn.Module, title: str) -> None:
        self._network, self._title = network, title
        self._calls: dict[torch.Size, nn.Module] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `[N, classes]` of images `[N, 3, S, S]`."""
        if x.shape not in self._calls:
            self._calls[x.shape] = self._captured(x)
        return self._calls[x.shape](x)

    def _captured(self, x: torch.Tensor) -> nn.Module:
        whole = _Whole(self._network)  # what is captured gets another `forward`; the network keeps its own
        buffers = [buffer.clone() for buffer in self._network.buffers()]
        if quiet := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None):
            quiet(False)  # capturing takes a stream of its own, for once
        try:
            with _undisturbed():
                return torch.cuda.make_graphed_callables(whole, (x.detach().clone(),), allow_unused_input=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(f"{self._title}: trains without a CUDA graph, more slowly ({reason})", flush=True)
            return self._network
        finally:
            with torch.no_grad():
                for buffer, value in zip(self._network.buffers(), buffers, strict=True):
                    buffer.copy_(value)  # capturing ran the network: running statistics are not to have moved


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no other thread and no garbage collection come between: to free an earlier graph would spoil this one too."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with CAPTURE:
            yield
    finally:
        if collects:
            gc.enable()


class _Whole(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)
