from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.pixel_stem import PIXEL_MEAN, PIXEL_STD, on_pixels, pixel_stem, take_pixels
from stages.networks.preprocess import Classifier, Preprocess
from stages.networks.spec import NetworkSpec

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": False}
SIZE = 32


def classifier(network: nn.Module, input_size: int = SIZE) -> Classifier:
    return Classifier(Preprocess([0.5, 0.4, 0.3], [0.2, 0.25, 0.3], input_size), network).eval()


def pixels(image_size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, image_size, image_size, 3), np.uint8))


class Convolution(nn.Module):
    """One convolution and a head that sees every position of its output."""

    def __init__(self, convolution: nn.Module, places: int) -> None:
        super().__init__()
        self.stem, self.head = convolution, nn.Linear(convolution.out_channels * places**2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).flatten(1))


def test_the_preprocessing_of_a_pixel_stem_does_not_change_pixels():
    preprocess = Preprocess([PIXEL_MEAN] * 3, [PIXEL_STD] * 3, 6)
    assert torch.equal(preprocess(pixels(6)), pixels(6).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize(
    ("image_size", "kernel", "stride", "stored_kernel", "stored_stride"),
    [(32, 4, 4, 4, 4), (16, 4, 4, 4, 2), (8, 4, 4, 3, 1), (16, 2, 2, 3, 1), (16, 3, 4, 3, 2), (16, 7, 4, 5, 2)],
)
def test_the_stem_on_stored_pixels_gives_the_same_logits(image_size, kernel, stride, stored_kernel, stored_stride):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 6, kernel, stride)
    scaled = classifier(Convolution(convolution, (SIZE - kernel) // stride + 1))
    assert pixel_stem(scaled, image_size) == ("stem", SIZE // image_size)
    twin = on_pixels(scaled, image_size, "stem", SIZE // image_size)
    stem = twin.network.stem
    assert (stem.kernel_size, stem.stride) == ((stored_kernel,) * 2, (stored_stride,) * 2)
    with torch.no_grad():
        torch.testing.assert_close(twin(pixels(image_size)), scaled(pixels(image_size)), rtol=1e-4, atol=1e-4)
    assert scaled.network.stem is convolution  # left as it is


@pytest.mark.parametrize("image_size", [16, 32])
@torch.no_grad()
def test_a_convnext_takes_stored_pixels_and_is_built_again_with_its_stem(image_size):
    torch.manual_seed(0)
    spec = NetworkSpec("timm", "convnext_atto", ARGUMENTS, 10)
    scaled = classifier(build_network(spec))
    found = pixel_stem(scaled, image_size)
    assert found == ("stem.0", SIZE // image_size)
    twin = on_pixels(scaled, image_size, *found)
    torch.testing.assert_close(twin(pixels(image_size)), scaled(pixels(image_size)), rtol=1e-4, atol=1e-4)
    built = build_network(replace(spec, pixel_stem=dict([found])))
    built.load_state_dict(twin.network.state_dict())
    assert torch.equal(Classifier(twin.preprocess, built).eval()(pixels(image_size)), twin(pixels(image_size)))


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 6, 4, 4, padding=1),  # padding with zeros is no padding with pixels
        nn.Conv2d(3, 6, 4, 4, groups=3),
        nn.Conv2d(3, 6, 2, 4, dilation=2),
        nn.Conv2d(3, 6, 4, 3),
        nn.Conv2d(3, 6, (4, 2), 4),
        nn.Conv2d(3, 6, 1, 4),
    ],
)
def test_convolutions_of_other_forms_take_scaled_images(convolution):
    with torch.no_grad():
        places = convolution(torch.zeros(1, 3, SIZE, SIZE)).shape[-2:]
    network = nn.Sequential(convolution, nn.Flatten(1), nn.Linear(6 * places.numel(), 4))
    assert pixel_stem(classifier(network), 16) is None


def test_images_are_scaled_before_where_no_whole_factor_does_it_or_no_convolution_takes_them():
    assert pixel_stem(classifier(Convolution(nn.Conv2d(3, 6, 4, 4), 8)), 24) is None
    assert pixel_stem(classifier(nn.Sequential(nn.Flatten(1), nn.Linear(3 * SIZE**2, 4))), 32) is None
    assert pixel_stem(classifier(nn.Sequential(nn.ReLU(), Convolution(nn.Conv2d(3, 6, 4, 4), 8))), 32) is None


class SeesImagesTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.beside = Convolution(nn.Conv2d(3, 6, 4, 4), 8), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x) + self.beside(x.mean((2, 3)))


def test_a_network_that_uses_the_images_elsewhere_too_keeps_its_preprocessing():
    scaled = classifier(SeesImagesTwice())
    name, factor = pixel_stem(scaled, 32)
    assert name == "stem.stem"
    assert on_pixels(scaled, 32, name, factor) is None


def test_zeros_of_single_pruned_weights_are_not_mixed_with_their_neighbours():
    convolution = nn.Conv2d(3, 6, 4, 4)
    with torch.no_grad():
        convolution.weight[torch.rand_like(convolution.weight) < 0.8] = 0
    scaled = classifier(Convolution(convolution, 8))
    assert on_pixels(scaled, 16, "stem", 2) is None
    stem = on_pixels(scaled, 32, "stem", 1).network.stem
    assert torch.equal(stem.weight == 0, convolution.weight == 0)


@pytest.mark.parametrize(("name", "factor"), [("head", 2), ("stem", 3), ("gone", 1)])
def test_a_name_without_such_a_convolution_is_refused(name, factor):
    with pytest.raises(UserError, match=f"{name}: not a convolution"):
        take_pixels(Convolution(nn.Conv2d(3, 6, 4, 4), 8), name, factor)
