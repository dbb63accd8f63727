from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy_network
from torch import nn

from stages.export.onnx_file import export_onnx
from stages.networks.preprocess import Classifier, Preprocess


@pytest.fixture(scope="session")
def tiny_network() -> Callable[[bool], nn.Module]:
    return lambda conv_mlp: toy_network.tiny_network(toy_network.tiny_spec(conv_mlp=conv_mlp), bias_std=0.1)


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
