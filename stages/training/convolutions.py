"""Gradients of convolutions that oneDNN computes slowly, or wrongly, on CPUs.

oneDNN is fast at depthwise 3x3 kernels on maps of at least 3x3. For larger kernels on small maps, which the last stages
of a ConvNeXt have on small images, and for kernels larger than the map, it takes about ten times as long: this module
computes these weight gradients as matrix products.

In bfloat16, oneDNN takes 5 times float32's time for the weight gradient of larger depthwise kernels and 40 to 300 times
for the input gradient of a depthwise convolution with a stride: this module computes these gradients in float32.

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
            if slow(call) or slow_in_bfloat16(call):
                return _depthwise(call)
            if skips_pixels(call):
                down, right = call.stride
                return function(call.x[:, :, ::down, ::right], call.weight, call.bias)
        return function(*args, **(kwargs or {}))


def slow(call: Call) -> bool:
    """True if oneDNN is slow at the weight gradient of this convolution and `weight_gradient` can compute it."""
    kernel = call.weight.shape[2:]
    keeps_size = all(side % 2 for side in kernel) and call.padding == tuple(side // 2 for side in kernel)
    if not (is_depthwise(call) and keeps_size and (call.stride, call.dilation) == ((1, 1), (1, 1))):
        return False
    height, width = call.x.shape[2:]
    return height * width <= LARGEST_MAP and (max(kernel) > FAST_KERNEL or height < kernel[0] or width < kernel[1])


def slow_in_bfloat16(call: Call) -> bool:
    """True for a depthwise convolution that bfloat16 autocast applies to and whose gradients oneDNN computes slowly."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    large = max(call.weight.shape[2:]) > FAST_KERNEL or call.stride != (1, 1)
    return autocast and large and is_depthwise(call) and not isinstance(call.padding, str)


def is_depthwise(call: Call) -> bool:
    """True for a batch of maps and one trained filter for each channel."""
    channels, depth, *_ = call.weight.shape
    return call.x.dim() == 4 and depth == 1 and call.groups == channels and call.weight.requires_grad


def skips_pixels(call: Call) -> bool:
    """True for a pointwise convolution of few channels with a stride and a weight gradient."""
    few = call.x.dim() == 4 and call.x.shape[1] < FEW_CHANNELS and call.weight.requires_grad
    pointwise = call.weight.shape[2:] == (1, 1) and call.padding == (0, 0) and call.groups == 1
    return few and pointwise and call.stride != (1, 1)


def _depthwise(call: Call) -> torch.Tensor:
    x, weight, bias = call.x, call.weight, call.bias
    if torch.is_autocast_enabled("cpu"):
        kind = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    return _Depthwise.apply(x, weight, bias, call.stride, call.padding, call.dilation, slow(call))


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose weight gradient is computed by products, or both gradients in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        by_products: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.by_products = (stride, padding, dilation), by_products
        return F.conv2d(x, weight, bias, stride, padding, dilation, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (stride, padding, dilation), channels = ctx.settings, len(weight)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[2]:  # oneDNN would compute the gradient of the weight too
            of_bias = gradient.sum((0, 2, 3))
        if ctx.by_products:
            if ctx.needs_input_grad[0]:
                of_x = F.conv2d(gradient, weight.flip(2, 3), padding=padding, groups=channels)
            of_weight = torch.empty_like(weight).copy_(weight_gradient(x, gradient, weight.shape[2:]))
        else:
            operands = gradient.float(), x.float(), weight.float()
            of_x, of_weight, _ = torch.ops.aten.convolution_backward(
                *operands,
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                channels,
                [ctx.needs_input_grad[0], True, False],
            )
            of_x, of_weight = None if of_x is None else of_x.to(x.dtype), of_weight.to(weight.dtype)
        return of_x, of_weight, of_bias, None, None, None, None


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
