import copy

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from stages.artifacts.description import LayerStorage
from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.dynamic_int8 import unpack_layer
from stages.networks.norms import FixedDivisorLayerNorm
from stages.networks.spec import NetworkSpec
from stages.profiling.counts import count_layers, macs_visible, params_visible, totals
from stages.quantization.int8 import int8_dynamic

TINY = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
NETWORKS = {
    "convnext, linear mlp": NetworkSpec("timm", "convnext_atto", TINY | {"conv_mlp": False}, 10),
    "convnext, convolutional mlp": NetworkSpec("timm", "convnext_atto", TINY | {"conv_mlp": True}, 10),
    "convnext v2": NetworkSpec("timm", "convnextv2_atto", TINY, 10),
    "torchvision convnext": NetworkSpec("torchvision", "convnext_tiny", {"block_setting": [[192, None, 2]]}, 10),
    "mobilenet with squeeze and excitation": NetworkSpec("torchvision", "mobilenet_v3_small", {}, 10),
    "transformer": NetworkSpec(
        "timm", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48}, 10
    ),
}


def built(name):
    torch.manual_seed(0)
    return build_network(NETWORKS[name]).eval()


def counted(network, layers=None, size=32):
    return totals(count_layers(network, size, layers or {}))


def test_every_layer_kind_is_counted_as_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 x 8 outputs of 3 x 9 products
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),  # 16 x 16 x 8 outputs of 25 products
        nn.Hardswish(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 1),  # 8 x 8 x 6 outputs of 8 products
        FixedDivisorLayerNorm(6, 9, 1e-6, channels_first=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.LayerNorm(6),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(6, 4),  # 24
    ).eval()
    rows = {row.name: row for row in count_layers(network, 32, {})}
    assert {name: (row.params, row.macs) for name, row in rows.items()} == {
        "0": (3 * 8 * 9 + 8, 16 * 16 * 8 * 27),
        "1": (16, 0),
        "2": (8 * 25, 16 * 16 * 8 * 25),
        "5": (8 * 6 + 6, 8 * 8 * 6 * 8),
        "6": (12, 0),
        "9": (12, 0),
        "12": (28, 24),
    }
    total = totals(list(rows.values()))
    assert total["macs"] == 16 * 16 * 8 * 52 + 8 * 8 * 48 + 24
    assert total["bops"] == total["macs"] * 1024


def test_a_linear_layer_over_a_map_counts_each_position_and_a_reused_one_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.grn, self.linear = GlobalResponseNorm(3, channels_last=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(self.linear(self.grn(x.permute(0, 2, 3, 1))))

    rows = {row.kind: row for row in count_layers(Twice().eval(), 4, {})}
    assert (rows["Linear"].params, rows["Linear"].macs) == (12, 2 * 16 * 9)
    assert (rows["GlobalResponseNorm"].params, rows["GlobalResponseNorm"].macs) == (6, 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_totals_are_those_of_torch(name):
    network = built(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    total = counted(network)
    assert total["macs"] == counter.get_total_flops() / 2
    assert total["params"] == sum(p.numel() for p in network.parameters())


def test_matrix_products_between_activations_have_a_row_of_their_own():
    last = count_layers(built("transformer"), 32, {})[-1]
    assert (last.kind, last.params) == ("matrix products between activations", 0)
    assert last.macs == 2 * 17 * 17 * 48  # 16 patches and the class token, queries by keys and weights by values
    assert not any("between" in row.kind for row in count_layers(built("convnext v2"), 32, {}))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ["convnext, linear mlp", "convnext, convolutional mlp", "transformer"])
def test_quantization_changes_neither_params_nor_macs(name, per_channel):
    network = built(name)
    packed, layers = int8_dynamic(network, per_channel)
    before, after = counted(network), counted(packed, layers)
    assert (after["params"], after["macs"]) == (before["params"], before["macs"])
    assert after["bops"] < before["bops"]
    rows = {row.name: row for row in count_layers(packed, 32, layers)}
    assert after["bops"] == sum(row.macs * (64 if key in layers else 1024) for key, row in rows.items())


@pytest.mark.parametrize("name", ["convnext, linear mlp", "convnext, convolutional mlp"])
def test_visible_counts_are_the_true_ones_without_the_packed_layers(name):
    network = built(name)
    packed, layers = int8_dynamic(network, True)
    rows = count_layers(packed, 32, layers)
    assert params_visible(network) == counted(network)["params"]
    assert params_visible(packed) == sum(row.params for row in rows if row.name not in layers)
    if name == "convnext, linear mlp":  # thop counts more than MACs, but no packed layer
        linear = sum(row.macs for row in rows if row.name in layers)
        assert macs_visible(network, 32) - macs_visible(packed, 32) == linear > 0


def test_unstructured_pruning_changes_only_the_parameters_that_are_not_zero():
    network = built("convnext, linear mlp")
    pruned = copy.deepcopy(network)
    layer = pruned.stages[3].blocks[0].mlp.fc1
    prune.remove(prune.l1_unstructured(layer, "weight", amount=0.5), "weight")
    before, after = counted(network), counted(pruned)
    assert (after["params"], after["macs"], after["bops"]) == (before["params"], before["macs"], before["bops"])
    assert before["params_nonzero"] - after["params_nonzero"] == layer.weight.numel() // 2


def test_zeros_are_found_in_packed_layers():
    network = built("convnext, linear mlp")
    with torch.no_grad():
        network.head.fc.weight[:, ::2] = 0
        network.head.fc.bias.fill_(1.0)
    packed, layers = int8_dynamic(network, True)
    row = next(row for row in count_layers(packed, 32, layers) if row.name == "head.fc")
    kept = int(torch.count_nonzero(unpack_layer(packed.head.fc)["weight"]))
    assert kept <= network.head.fc.weight.numel() // 2
    assert (row.params, row.params_nonzero) == (32 * 10 + 10, kept + 10)
    assert (row.weight_bits, row.activation_bits) == (8, 8)


def test_counting_never_changes_the_network():
    packed, layers = int8_dynamic(built("convnext, convolutional mlp"), True)
    packed.train()
    before = {name: type(module) for name, module in packed.named_modules()}
    state = set(packed.state_dict())
    count_layers(packed, 32, layers)
    macs_visible(packed, 32)
    assert {name: type(module) for name, module in packed.named_modules()} == before
    assert set(packed.state_dict()) == state
    assert packed.training
    assert not any(module._forward_hooks for module in packed.modules())


class Net(nn.Module):
    """A convolution and a user's layer that takes its 4 channels at each of 4 positions `[N, 4, 4]`."""

    def __init__(self, layer, *parameters):
        super().__init__()
        self.conv, self.layer, self.table = nn.Conv2d(3, 4, 1, bias=False), layer, nn.ParameterList(parameters)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.layer(x, *self.table)


CONV = 3 * 4 * 4
TABLE = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("network", "layer_macs", "table_macs"),
    [
        (Net(lambda x, table: x + table, TABLE), 0, 0),  # positions
        (Net(lambda x, table: x * table, TABLE), 0, 0),  # a scale for each element
        (Net(lambda x, table: torch.cat([x, table[None]], 1), TABLE), 0, 0),  # tokens
        (Net(lambda x, table: x + table[torch.tensor([0, 1, 1, 0])], TABLE), 0, 0),  # an indexed table
        (Net(lambda x, table: nn.functional.layer_norm(x, (4, 4), table), TABLE), 0, 0),
        (Net(lambda x, table: x @ table, TABLE), 0, 64),  # a module's own weight, in a function
        (Net(lambda x, table: torch.einsum("npc,cd->npd", x, table), TABLE), 0, 64),
        (Net(lambda x, table: nn.functional.linear(x, nn.functional.normalize(table)), TABLE), 0, 64),  # standardized
        (Net(lambda x, table: x @ table[0], TABLE), 0, 16),  # a vector
        (Net(lambda x, table: torch.baddbmm(table, x, x), TABLE), 64, 0),  # added, not multiplied
        (Net(lambda x, table: nn.functional.scaled_dot_product_attention(x, x, x, table), TABLE), 128, 0),
        (Net(lambda x: x @ torch.ones(4, 4)), 64, 0),  # a fixed filter
        (Net(lambda x: x[:, :1] @ x), 16, 0),
    ],
)
def test_products_are_found_wherever_a_module_computes_them(network, layer_macs, table_macs):
    rows = {row.name: row for row in count_layers(network.eval(), 2, {})}
    assert (rows["conv"].params, rows["conv"].macs) == (12, CONV)
    assert ("table" in rows) == bool(len(network.table))
    if "table" in rows:
        assert (rows["table"].params, rows["table"].macs) == (16, table_macs)
    assert sum(row.macs for row in rows.values()) == CONV + table_macs + layer_macs
    assert ("" in rows) == bool(layer_macs)


def test_recurrent_layers_and_multi_head_attention_are_counted_by_their_own_weights():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attention = nn.LSTM(3, 5), nn.MultiheadAttention(5, 1, batch_first=True)

        def forward(self, x):
            x = self.lstm(x[0].permute(1, 2, 0))[0]
            return self.attention(x, x, x)[0]

    rows = {row.name: row for row in count_layers(Rows().eval(), 4, {})}
    assert rows["lstm"].macs == 16 * 4 * 5 * (3 + 5)  # four gates at 16 positions
    assert rows["attention"].macs == 16 * 3 * 5 * 5
    assert rows["attention.out_proj"].macs == 16 * 5 * 5
    assert rows[""].macs == 2 * 4 * 4 * 4 * 5


def test_weights_in_an_operator_of_unknown_cost_are_refused_by_the_name_of_their_module():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(4, 4, 2)

        def forward(self, x):
            return self.bilinear(x[..., 0], x[..., 0])

    with pytest.raises(UserError, match="bilinear: Bilinear"):
        count_layers(Pairs().eval(), 4, {})


def test_a_description_that_does_not_name_the_packed_layers_is_refused():
    network = built("convnext, linear mlp")
    packed, layers = int8_dynamic(network, True)
    layers.pop("head.fc")
    with pytest.raises(UserError, match=r"head\.fc: packed in the network or listed"):
        count_layers(packed, 32, layers)
    with pytest.raises(UserError, match="but not both"):
        count_layers(network, 32, {"head.fc": LayerStorage(8, 8, "symmetric_per_channel")})


def test_dynamic_quantization_removes_nine_tenths_of_the_visible_counts_and_none_of_the_true_ones():
    network = built("torchvision convnext")
    packed, layers = int8_dynamic(network, True)
    assert params_visible(packed) / params_visible(network) < 0.1
    assert macs_visible(packed, 32) / macs_visible(network, 32) < 0.1
    assert counted(packed, layers)["params"] == counted(network)["params"]
