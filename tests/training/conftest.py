import numpy as np
import pytest
import torch
from torch import nn
from toy_training import BASE, tiny_network

from stages.datasets.store import Part
from stages.networks.preprocess import Preprocess
from stages.params.finetune import Finetune
from stages.training.host import prepare_host
from stages.training.trainer import Trained, Trainer, TrainingData


@pytest.fixture
def parts() -> list[Part]:
    """96 + 32 images of 8x8 in two classes that differ in brightness: learnable in a few steps."""
    rng = np.random.default_rng(0)
    labels = np.arange(128) % 2
    images = rng.integers(0, 120, (128, 8, 8, 3)) + 130 * labels[:, None, None, None]
    images = images.astype(np.uint8)
    return [Part(images[:96], labels[:96]), Part(images[96:], labels[96:])]


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess([0.5] * 3, [0.25] * 3, input_size=32)


@pytest.fixture
def recipe() -> Finetune:
    """Three epochs of three steps."""
    return Finetune(
        epochs=3, batch_size=32, optimizer="adamw", learning_rate=0.005, crop_padding=1, precision="float32", mixup=0.2,
        random_erasing=0.3, ema_decay=0.9,
    )  # fmt: skip


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny_network()


@pytest.fixture
def fit(parts, preprocess, recipe):
    """A training on the CPU with the other fixtures, but for what a test passes."""

    def fit(
        network: nn.Module,
        recipe: Finetune = recipe,
        part: Part | None = None,
        *,
        preprocess: Preprocess = preprocess,
        epochs=None,
        keep="best",
        checkpoints=None,
        **more,
    ) -> Trained:
        data = TrainingData(part or parts[0], parts[1], preprocess)
        trainer = Trainer(network, data, recipe, prepare_host(BASE), **{"seed": 3, "title": "test"} | more)
        return trainer.fit(epochs, keep, checkpoints)

    return fit
