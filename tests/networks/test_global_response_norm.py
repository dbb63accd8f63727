import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from stages.networks.global_response_norm import counting_grn

KEPT = torch.tensor([0, 2, 3, 6])


@pytest.mark.parametrize("channels_last", [True, False])
def test_counting_grn_of_the_kept_channels_equals_the_grn_over_all_with_zeros(channels_last):
    torch.manual_seed(0)
    axis = 3 if channels_last else 1
    grn = GlobalResponseNorm(8, eps=1e-3, channels_last=channels_last)
    nn.init.normal_(grn.weight)
    nn.init.normal_(grn.bias)
    gone = torch.tensor([c for c in range(8) if c not in KEPT.tolist()])
    grn.weight.data[gone] = 0
    grn.bias.data[gone] = 0
    x = torch.randn(2, 8, 8, 8).index_fill(axis, gone, 0)
    narrow = counting_grn(grn, len(KEPT))
    narrow.load_state_dict({"weight": grn.weight[KEPT], "bias": grn.bias[KEPT]})
    torch.testing.assert_close(narrow(x.index_select(axis, KEPT)), grn(x).index_select(axis, KEPT))

    plain = GlobalResponseNorm(len(KEPT), eps=1e-3, channels_last=channels_last)
    plain.load_state_dict(narrow.state_dict())
    difference = plain(x.index_select(axis, KEPT)) - grn(x).index_select(axis, KEPT)
    assert difference.abs().max() > 0.1  # it would not do without counting
