import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.training import convolutions
from stages.training.convolutions import MendedConvolutions, mended_convolutions, weight_gradient


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Lists the input shapes of the weight gradients that this module computed."""
    shapes: list[tuple[int, ...]] = []

    def recorded(x: torch.Tensor, gradient: torch.Tensor, kernel: tuple[int, int]) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return weight_gradient(x, gradient, kernel)

    monkeypatch.setattr(convolutions, "weight_gradient", recorded)
    return shapes


def gradients(layer: nn.Conv2d, x: torch.Tensor, bfloat16: bool = False) -> list[torch.Tensor]:
    """The output, and the gradients of input, weight and bias for a loss that weights every output differently."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", enabled=bfloat16):
        y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("kernel", "size"), [(3, (2, 2)), (3, (1, 1)), (3, (2, 5)), (5, (4, 4)), (7, (2, 3)), (7, (6, 6)), ((3, 5), (4, 2))]
)
def test_gradients_equal_those_of_the_convolution(kernel, size, memory, bias, replaced):
    torch.manual_seed(0)
    padding = kernel // 2 if isinstance(kernel, int) else tuple(side // 2 for side in kernel)
    layer = nn.Conv2d(6, 6, kernel, padding=padding, groups=6, bias=bias).to(memory_format=memory)
    x = torch.randn(5, 6, *size).to(memory_format=memory)
    expected = gradients(layer, x)
    assert not replaced
    with MendedConvolutions():
        found = gradients(layer, x)
    assert replaced == [(5, 6, *size)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert ours.is_contiguous(memory_format=memory) or ours.dim() != 4 or 1 in ours.shape


def test_onednn_computes_no_weight_gradient():
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)  # if asked for the bias, it computes the weight too
    with MendedConvolutions(), torch.profiler.profile() as profile:
        gradients(layer, torch.randn(5, 6, 2, 2))
    names = {event.name for event in profile.events()}
    assert "aten::convolution" in names
    assert "aten::convolution_backward" not in names


def test_gradients_under_autocast_equal_those_of_the_rounded_layer(replaced):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 6, 7, padding=3, groups=6), torch.randn(5, 6, 3, 3)
    expected = gradients(layer, x, bfloat16=True)
    with MendedConvolutions():
        found = gradients(layer, x, bfloat16=True)
    assert replaced
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


DEPTHWISE = [
    # oneDNN is slow at the input gradient in bfloat16
    nn.Conv2d(6, 6, 3, padding=1, groups=6, stride=2),
    nn.Conv2d(6, 6, 3, groups=6, stride=(1, 2), bias=False),
    # at the weight gradient
    nn.Conv2d(6, 6, 5, padding=2, groups=6),
    nn.Conv2d(6, 6, 7, padding=(2, 0), groups=6, dilation=2),
    # at both
    nn.Conv2d(6, 6, (5, 3), padding=2, groups=6, stride=2, bias=False),
]


@pytest.mark.parametrize("layer", DEPTHWISE)
@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_depthwise_gradients_under_autocast_are_computed_in_float32(layer, memory):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(layer).to(memory_format=memory), torch.randn(3, 6, 17, 14).to(memory_format=memory)
    expected = gradients(layer, x, bfloat16=True)
    with MendedConvolutions(), torch.profiler.profile(record_shapes=True) as profile:
        found = gradients(layer, x, bfloat16=True)
    (backward,) = (event for event in profile.events() if event.name == "aten::convolution_backward")
    assert backward.input_dtypes[:3] == ["float"] * 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("layer", DEPTHWISE)
def test_depthwise_convolutions_in_float32_are_not_replaced(layer):
    with MendedConvolutions():
        y = layer(torch.randn(3, 6, 17, 14))
    assert y.grad_fn.name() == "ConvolutionBackward0"


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), 3),  # oneDNN is fast
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), 7),  # a large map
        (nn.Conv2d(6, 6, 7, padding=3, groups=3), 4),
        (nn.Conv2d(6, 12, 7, padding=3, groups=6), 4),
        (nn.Conv2d(6, 6, 5, padding=1, groups=6), 4),
        (nn.Conv2d(6, 6, 4, padding=2, groups=6), 4),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6, stride=2), 4),
        (nn.Conv2d(6, 6, 3, padding=1, dilation=2, groups=6), 4),
        (nn.Conv2d(6, 6, 5, padding="same", groups=6), 4),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6, padding_mode="reflect"), 4),
    ],
)
def test_other_convolutions_are_not_replaced(layer, size, replaced):
    x = torch.randn(2, 6, size, size)
    expected = gradients(layer, x)
    with MendedConvolutions():
        found = gradients(layer, x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not replaced


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        # RepVGG's first: torch's own crashes in channels-last memory, or gives a wrong gradient
        (nn.Conv2d(3, 48, 1, stride=2, bias=False), (224, 224)),
        (nn.Conv2d(7, 24, 1, stride=2), (112, 112)),
        (nn.Conv2d(15, 8, 1, stride=(3, 1)), (90, 81)),
    ],
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_strided_pointwise_convolutions_of_few_channels_have_the_right_gradient(layer, size, bfloat16):
    torch.manual_seed(0)
    x = torch.randn(4, layer.in_channels, *size)
    expected = gradients(layer, x, bfloat16)
    layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    with MendedConvolutions():
        found = gradients(layer, x.to(memory_format=torch.channels_last), bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 0.02 if bfloat16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_frozen_weights_and_evaluation_call_the_convolution_itself(replaced):
    layer, x = nn.Conv2d(6, 6, 7, padding=3, groups=6), torch.randn(2, 6, 4, 4)
    with MendedConvolutions(), torch.no_grad():
        assert layer(x).grad_fn is None
    layer.requires_grad_(False)
    x.requires_grad_()
    with MendedConvolutions():
        layer(x).sum().backward()
    assert not replaced


@pytest.mark.parametrize(
    ("layer", "size", "bfloat16"),
    [
        (nn.Conv2d(7, 24, 1, stride=2), 112, False),
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), 4, False),
        (nn.Conv2d(6, 6, 5, padding=2, groups=6, stride=2), 15, True),
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiled_convolutions_have_the_same_gradients(layer, size, bfloat16):
    torch.manual_seed(0)
    x = torch.randn(4, layer.in_channels, size, size)
    expected = gradients(layer, x, bfloat16)
    layer = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, backend="aot_eager")  # traced as by default, without a C++ compiler
    with MendedConvolutions():
        found = gradients(compiled, x.to(memory_format=torch.channels_last), bfloat16)
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = 0.02 if bfloat16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def test_only_cpus_replace_convolutions():
    assert isinstance(mended_convolutions(torch.device("cpu")), MendedConvolutions)
    assert not isinstance(mended_convolutions(torch.device("cuda")), MendedConvolutions)


def test_functional_calls_in_other_forms_are_not_replaced():
    x, weight = torch.randn(2, 6, 4, 4), torch.randn(6, 1, 7, 7, requires_grad=True)
    with MendedConvolutions():
        found = [F.conv2d(x, weight, padding=3, groups=6), F.conv2d(x, weight, None, 1, 3, 1, 6)]
    expected = F.conv2d(x, weight, padding=3, groups=6)
    assert all(torch.equal(y, expected) and y.grad_fn.name() == expected.grad_fn.name() for y in found)
