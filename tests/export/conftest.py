from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stages.export.onnx_file import export_onnx
from stages.networks.build import build_network
from stages.networks.preprocess import Classifier, Preprocess
from stages.networks.spec import NetworkSpec


@pytest.fixture(scope="session")
def tiny_network() -> Callable[[bool], nn.Module]:
    """A ConvNeXt of 26 thousand parameters; the MLP is Linear or 1x1 convolutions."""

    def build(conv_mlp: bool) -> nn.Module:
        torch.manual_seed(0)
        arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": conv_mlp, "ls_init_value": 0.5}
        network = build_network(NetworkSpec("timm", "convnext_atto", arguments, 10)).eval()
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.normal_(module.bias, std=0.1)
        return network

    return build


@pytest.fixture(scope="session")
def classify() -> Callable[[nn.Module], Classifier]:
    return lambda network: Classifier(Preprocess([0.5, 0.4, 0.3], [0.2, 0.25, 0.3], 32), network).eval()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 24, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def float_export(tiny_network, classify, tmp_path_factory) -> tuple[Classifier, Path, dict]:
    """A float classifier (Linear MLP), its file for 24 px images, and what the exporter returned."""
    classifier, path = classify(tiny_network(False)), tmp_path_factory.mktemp("float") / "model.onnx"
    return classifier, path, export_onnx(classifier, 24, path)
