import numpy as np
import pytest
from torch import nn

from stages.datasets.store import Part
from stages.networks.build import NetworkSpec, build_network
from stages.networks.preprocess import Preprocess
from stages.params.finetune import Finetune


@pytest.fixture
def parts() -> tuple[Part, Part]:
    """96 + 32 images of 8x8 in two classes that differ in brightness: learnable in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(128) % 2
    images = rng.integers(0, 120, (128, 8, 8, 3)) + 130 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return Part(images[:96], labels[:96]), Part(images[96:], labels[96:])


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess([0.5] * 3, [0.25] * 3, input_size=32)


@pytest.fixture
def recipe() -> Finetune:
    return Finetune(
        epochs=3, batch_size=32, optimizer="adamw", learning_rate=0.005, crop_padding=1, precision="float32", mixup=0.2,
        random_erasing=0.3, ema_decay=0.9,
    )  # fmt: skip


def tiny_network() -> nn.Module:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.1, "ls_init_value": None}
    return build_network(NetworkSpec("timm", "convnext_atto", arguments, classes=2))


@pytest.fixture
def network():
    import torch

    torch.manual_seed(0)
    return tiny_network()
