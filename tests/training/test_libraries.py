"""One network in two libraries: what differs between their accuracies can then only be the draw of the weights."""

import pytest
import torch
from stages.training.loop import train
from torch import nn

from stages.networks.build import NetworkSpec, build_network
from stages.params.base import Base

CLASSES = 2
NETWORKS = {
    "timm": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}),
    "torchvision": ("convnext_tiny", {"block_setting": [[8, 16, 1], [16, 24, 1], [24, 32, 2], [32, None, 1]]}),
}


def convnext(library: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network(NetworkSpec(library, *NETWORKS[library], CLASSES))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_convnexts_of_both_libraries_train_alike_from_the_same_weights(parts, preprocess, recipe, optimizer):
    recipe = recipe.model_copy(update={"optimizer": optimizer, "ema_decay": 0.0, "weight_decay": 0.5})
    networks = {library: convnext(library) for library in NETWORKS}
    for network in networks.values():
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "layer_scale")):
                nn.init.constant_(parameter, 0.5)  # at 1e-6 the blocks would do next to nothing
    pairs = zip(networks["timm"].parameters(), networks["torchvision"].parameters(), strict=True)
    for ours, theirs in pairs:
        ours.data.copy_(theirs.data.view_as(ours))
    trained = {
        library: train(network, *parts, preprocess, recipe, base=Base(device="cpu", threads=1), seed=3, title=library)
        for library, network in networks.items()
    }
    ends = [found.network.state_dict() for found in trained.values()]
    for (name, ours), theirs in zip(ends[0].items(), ends[1].values(), strict=True):
        assert (ours.flatten() - theirs.flatten()).abs().max() <= 1e-5 * theirs.abs().max(), name
    assert trained["timm"].curve[-1]["validation_top1"] == trained["torchvision"].curve[-1]["validation_top1"]
