import pytest
import torch
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from stages.networks.norms import FixedDivisorLayerNorm, narrowed

KEPT, GONE = torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 5, 7])
NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(8, eps=1e-3), -1),
    "timm's LayerNorm2d": (lambda: TimmLayerNorm2d(8, eps=1e-3), 1),
    "torchvision's LayerNorm2d": (lambda: TorchvisionLayerNorm2d(8, eps=1e-3), 1),
    "GRN": (lambda: GlobalResponseNorm(8, eps=1e-3, channels_last=False), 1),
    "GRN, channels last": (lambda: GlobalResponseNorm(8, eps=1e-3, channels_last=True), 3),
}


def zeroed(name: str) -> tuple[nn.Module, int, torch.Tensor]:
    """A norm and an input, both with zeros in the channels that pruning removes, and the axis of the channels."""
    torch.manual_seed(0)
    make, axis = NORMS[name]
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
        parameter.data[GONE] = 0
    return norm, axis, (torch.randn(2, 8, 8, 8) + 1).index_fill(axis, GONE, 0)


def cut(norm: nn.Module, form: str = "exact") -> nn.Module:
    narrow = narrowed(norm, len(KEPT), form)
    narrow.load_state_dict({name: tensor[KEPT] for name, tensor in norm.state_dict().items()})
    return narrow


@pytest.mark.parametrize("name", NORMS)
def test_the_exact_form_gives_the_output_and_gradients_of_the_norm_with_zeros(name):
    norm, axis, x = zeroed(name)
    x.requires_grad_()
    small = x.detach().index_select(axis, KEPT).requires_grad_()
    expected, found = norm(x).index_select(axis, KEPT), cut(norm)(small)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    target = torch.randn_like(expected)
    (expected * target).sum().backward()
    (found * target).sum().backward()
    torch.testing.assert_close(small.grad, x.grad.index_select(axis, KEPT), atol=1e-6, rtol=1e-4)


def test_the_output_follows_the_documented_equation():
    torch.manual_seed(0)
    norm = FixedDivisorLayerNorm(4, 8, 1e-3, channels_first=False)
    x = torch.randn(5, 4)
    mean = x.sum(1, keepdim=True) / 8
    variance = (((x - mean) ** 2).sum(1, keepdim=True) + 4 * mean**2) / 8
    torch.testing.assert_close(norm(x), (x - mean) / torch.sqrt(variance + 1e-3))


@pytest.mark.parametrize("name", list(NORMS)[:3])
def test_the_plain_form_is_the_same_class_at_the_cut_width_and_differs(name):
    norm, axis, x = zeroed(name)
    plain = cut(norm, "plain")
    assert (type(plain), plain.normalized_shape, plain.eps) == (type(norm), (4,), 1e-3)
    assert norm.normalized_shape == (8,)
    difference = plain(x.index_select(axis, KEPT)) - norm(x).index_select(axis, KEPT)
    assert difference.abs().max() > 0.1


def test_a_global_response_norm_is_exact_in_the_plain_form_too():
    norm, axis, x = zeroed("GRN")
    small = x.index_select(axis, KEPT)
    assert torch.equal(cut(norm, "plain")(small), cut(norm)(small))
    dividing_by_four = GlobalResponseNorm(4, eps=1e-3, channels_last=False)
    dividing_by_four.load_state_dict(cut(norm).state_dict())
    assert (dividing_by_four(small) - cut(norm)(small)).abs().max() > 0.1


@pytest.mark.parametrize("form", ["exact", "plain"])
def test_a_norm_without_bias_stays_without(form):
    narrow = narrowed(nn.LayerNorm(8, bias=False), 3, form)
    assert list(narrow.state_dict()) == ["weight"]
    assert narrow(torch.randn(2, 3)).shape == (2, 3)
