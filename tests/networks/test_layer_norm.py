import pytest
import torch
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from torch import nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from stages.networks.layer_norm import counting

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


@pytest.mark.parametrize(("kind", "axis"), [(nn.LayerNorm, -1), (TimmLayerNorm2d, 1), (TorchvisionLayerNorm2d, 1)])
def test_counting_norm_of_the_kept_channels_equals_the_norm_over_all_with_zeros(kind, axis):
    torch.manual_seed(0)
    norm = zeroed_norm(kind)
    narrow = counting(norm, len(KEPT))
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
