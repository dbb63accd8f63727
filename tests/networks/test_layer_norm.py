import pytest
import torch
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from stages.common.errors import UserError
from stages.networks.layer_norm import FixedDivisorLayerNorm, counting, narrowed

KEPT = torch.tensor([0, 2, 3, 6])


def zeroed_norm(kind: type[nn.LayerNorm]) -> nn.LayerNorm:
    norm = kind(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    gone = torch.ones(8, dtype=torch.bool)
    gone[KEPT] = False
    norm.weight.data[gone] = 0
    norm.bias.data[gone] = 0
    return norm


@pytest.mark.parametrize("form", ["exact", "exact_matmul"])
@pytest.mark.parametrize(("kind", "axis"), [(nn.LayerNorm, -1), (TimmLayerNorm2d, 1), (TorchvisionLayerNorm2d, 1)])
def test_counting_norm_of_the_kept_channels_equals_the_norm_over_all_with_zeros(kind, axis, form):
    torch.manual_seed(0)
    norm = zeroed_norm(kind)
    narrow = narrowed(norm, len(KEPT), form).eval()
    narrow.load_state_dict({"weight": norm.weight[KEPT], "bias": norm.bias[KEPT]})
    shape = [2, 5, 5, 5]
    shape[axis] = 8
    x = torch.randn(shape) + 1
    gone = [c for c in range(8) if c not in KEPT.tolist()]
    x.index_fill_(axis, torch.tensor(gone), 0)
    expected = norm(x).index_select(axis, KEPT)
    torch.testing.assert_close(narrow(x.index_select(axis, KEPT)), expected, atol=1e-6, rtol=1e-5)


def test_plain_norm_of_the_kept_channels_would_differ():
    torch.manual_seed(0)
    norm = zeroed_norm(nn.LayerNorm)
    plain = nn.LayerNorm(len(KEPT), eps=1e-3)
    plain.load_state_dict({"weight": norm.weight[KEPT], "bias": norm.bias[KEPT]})
    x = torch.zeros(2, 8)
    x[:, KEPT] = torch.randn(2, 4) + 1
    assert (plain(x[:, KEPT]) - norm(x)[:, KEPT]).abs().max() > 0.1


def test_counting_norm_passes_gradients_like_the_norm_over_all_with_zeros():
    torch.manual_seed(0)
    norm = zeroed_norm(nn.LayerNorm)
    narrow = counting(norm, len(KEPT))
    narrow.load_state_dict({"weight": norm.weight[KEPT], "bias": norm.bias[KEPT]})
    x = torch.zeros(3, 8)
    x[:, KEPT] = torch.randn(3, 4)
    x.requires_grad_(True)
    small = x.detach()[:, KEPT].requires_grad_(True)
    target = torch.randn(3, 4)
    (norm(x)[:, KEPT] * target).sum().backward()
    (narrow(small) * target).sum().backward()
    torch.testing.assert_close(small.grad, x.grad[:, KEPT])
    torch.testing.assert_close(narrow.weight.grad, norm.weight.grad[KEPT])


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0, 300.0])
def test_sums_by_matrix_products_equal_padding_in_float32(channels_first, offset):
    torch.manual_seed(0)
    padded = FixedDivisorLayerNorm(96, 384, 1e-6, channels_first).eval()
    products = FixedDivisorLayerNorm(96, 384, 1e-6, channels_first, as_matmul=True).eval()
    nn.init.normal_(padded.weight)
    nn.init.normal_(padded.bias)
    products.load_state_dict(padded.state_dict())
    x = torch.randn(2, 96, 7, 7) + offset
    x = x if channels_first else x.permute(0, 2, 3, 1)
    reference = padded.double()(x.double())
    padded.float()
    assert (products(x) - padded(x)).abs().max() <= 1e-5 * reference.abs().max()
    assert (products(x) - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_matrix_products_are_used_in_evaluation_only_and_never_under_autocast():
    torch.manual_seed(0)
    products, padded = (FixedDivisorLayerNorm(40, 90, 1e-6, False, as_matmul=as_matmul) for as_matmul in (True, False))
    x = torch.randn(3, 40)
    assert torch.equal(products(x), padded(x))
    products.eval()
    assert not torch.equal(products(x), padded(x))  # another order of sums
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products(x), padded(x))


@pytest.mark.parametrize("kind", [nn.LayerNorm, TimmLayerNorm2d, TorchvisionLayerNorm2d])
def test_the_plain_form_is_the_same_class_at_the_cut_width(kind):
    norm = zeroed_norm(kind)
    plain = narrowed(norm, 4, "plain")
    assert type(plain) is kind
    assert (plain.normalized_shape, plain.eps, norm.normalized_shape) == ((4,), 1e-3, (8,))
    x = torch.randn(2, 4, 4, 4)  # both axes are 4 long
    same = kind(4, eps=1e-3)
    torch.testing.assert_close(plain(x), same(x))


@pytest.mark.parametrize("form", ["exact", "exact_matmul", "plain"])
def test_a_norm_without_bias_stays_without(form):
    narrow = narrowed(nn.LayerNorm(8, bias=False), 3, form).eval()
    assert list(narrow.state_dict()) == ["weight"]
    assert narrow(torch.randn(2, 3)).shape == (2, 3)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match="layer_norm = 'exactly': no such form of a cut LayerNorm; one of exact,"):
        narrowed(nn.LayerNorm(8), 3, "exactly")
