"""The same network from two libraries trains alike: only the random weights can make their accuracies differ."""

import pytest
import torch
from torch import nn

from stages.networks.build import build_network
from stages.networks.spec import NetworkSpec

NETWORKS = {
    "timm": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}),
    "torchvision": ("convnext_tiny", {"block_setting": [[8, 16, 1], [16, 24, 1], [24, 32, 2], [32, None, 1]]}),
}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_convnexts_of_both_libraries_train_alike_from_the_same_weights(fit, recipe, optimizer):
    recipe = recipe.model_copy(update={"optimizer": optimizer, "ema_decay": 0.0, "weight_decay": 0.5})
    torch.manual_seed(0)
    timm, torchvision = (build_network(NetworkSpec(library, *NETWORKS[library], 2)) for library in NETWORKS)
    for (name, theirs), ours in zip(torchvision.named_parameters(), timm.parameters(), strict=True):
        if name.endswith("layer_scale"):
            nn.init.constant_(theirs, 0.5)  # at 1e-6 the blocks would have almost no effect
        ours.data.copy_(theirs.data.view_as(ours))
    timm, torchvision = (fit(network, recipe) for network in (timm, torchvision))
    ends = [trained.network.state_dict() for trained in (timm, torchvision)]
    for (name, ours), theirs in zip(ends[0].items(), ends[1].values(), strict=True):
        assert (ours.flatten() - theirs.flatten()).abs().max() <= 1e-5 * theirs.abs().max(), name
    assert timm.curve[-1]["validation_top1"] == torchvision.curve[-1]["validation_top1"]
