"""Weight gradients of convolutions that oneDNN computes slowly, or wrongly, on CPUs.

oneDNN is fast at depthwise 3x3 kernels on maps of at least 3x3. For larger kernels on small maps, which the last stages
of a ConvNeXt have on small images, and for kernels larger than the map, it takes about ten times as long: this module
computes these weight gradients as matrix products.

A pointwise convolution with a stride on a large channels-last map of fewer than 16 channels, such as RepVGG's first,
writes its gradient outside its memory (torch 2.15, AVX2 and AVX-512): the process crashes, or continues with a wrong
gradient. This module passes such a convolution only the pixels that it reads.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

LARGEST_MAP = 36
"""Largest map in pixels: the work of the products grows with the square of it, that of a convolution linearly."""
FAST_KERNEL = 3
FEW_CHANNELS = 16


def mended_convolutions(device: torch.device) -> AbstractContextManager:
    """A context in which convolutions on a CPU use the weight gradients of this module, also under `torch.compile`."""
    return MendedConvolutions() if device.type == "cpu" else nullcontext()


class Call(NamedTuple):
    """The arguments of `conv2d` as `nn.Conv2d` passes them."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int


class MendedConvolutions(TorchFunctionMode):
    """Replaces the calls of `conv2d` that oneDNN computes slowly or wrongly; results are equal up to rounding."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.conv2d and len(args) == 7 and torch.is_grad_enabled():
            call = Call(*args)
            if slow(call):
                return _depthwise(call.x, call.weight, call.bias)
            if skips_pixels(call):
                down, right = call.stride
                return function(call.x[:, :, ::down, ::right], call.weight, call.bias)
        return function(*args, **(kwargs or {}))


def slow(call: Call) -> bool:
    """True if oneDNN is slow at the weight gradient of this convolution and `_Depthwise` can compute it."""
    x, weight, _, stride, padding, dilation, groups = call
    channels, depth, *kernel = weight.shape
    keeps_size = all(side % 2 for side in kernel) and padding == tuple(side // 2 for side in kernel)
    settings = keeps_size and (stride, dilation) == ((1, 1), (1, 1)) and depth == 1 and groups == channels
    if not settings or x.dim() != 4 or not weight.requires_grad:
        return False
    height, width = x.shape[2:]
    return height * width <= LARGEST_MAP and (max(kernel) > FAST_KERNEL or height < kernel[0] or width < kernel[1])


def skips_pixels(call: Call) -> bool:
    """True for a pointwise convolution of few channels with a stride and a weight gradient."""
    few = call.x.dim() == 4 and call.x.shape[1] < FEW_CHANNELS and call.weight.requires_grad
    pointwise = call.weight.shape[2:] == (1, 1) and call.padding == (0, 0) and call.groups == 1
    return few and pointwise and call.stride != (1, 1)


def _depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        bias = None if bias is None else bias.to(x.dtype)
    return _Depthwise.apply(x, weight, bias)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 whose output has the input's size."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        padding = [side // 2 for side in weight.shape[2:]]
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        padding, channels = [side // 2 for side in weight.shape[2:]], len(weight)
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = F.conv2d(gradient, weight.flip(2, 3), padding=padding, groups=channels)
        if ctx.needs_input_grad[2]:  # oneDNN would compute the gradient of the weight too
            of_bias = gradient.sum((0, 2, 3))
        of_weight = torch.empty_like(weight).copy_(weight_gradient(x, gradient, weight.shape[2:]))
        return of_x, of_weight, of_bias


def weight_gradient(x: torch.Tensor, gradient: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
    """The weight gradient of a depthwise convolution by two matrix products.

    The first multiplies all pairs of input and output pixels and sums over the batch; the second sums the pairs that
    each weight connects.

    Args:
        x, gradient: the input and the gradient of the output, `[N, C, H, W]`.
        kernel: odd height and width.

    Returns:
        float32 `[C, 1, *kernel]`.
    """
    channels, height, width = x.shape[1:]
    x, gradient = (of.float().permute(1, 2, 3, 0).contiguous().flatten(1, 2) for of in (x, gradient))
    pairs = torch.bmm(gradient, x.mT).flatten(1)
    return (pairs @ _connected(height, width, tuple(kernel))).view(channels, 1, *kernel)


@functools.lru_cache(maxsize=16)
def _connected(height: int, width: int, kernel: tuple[int, int]) -> torch.Tensor:
    """float32 `[(H W)^2, kernel]`: 1 if the weight connects the second pixel of the pair to the first, else 0."""
    rows, columns = torch.arange(height), torch.arange(width)
    down = (rows[None, :] - rows[:, None] + kernel[0] // 2)[:, None, :, None].expand(height, width, height, width)
    right = (columns[None, :] - columns[:, None] + kernel[1] // 2)[None, :, None, :].expand_as(down)
    inside = (down >= 0) & (down < kernel[0]) & (right >= 0) & (right < kernel[1])
    weight = torch.where(inside, down * kernel[1] + right, kernel[0] * kernel[1]).flatten()
    return F.one_hot(weight, kernel[0] * kernel[1] + 1)[:, :-1].float()
