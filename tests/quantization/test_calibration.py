import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.params.quantizers import Int8Static
from stages.quantization import calibration
from stages.quantization.calibration import activation_ranges, calibration_images, hessians


class Pixels(nn.Module):
    """Images as they are, through two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(pixels.permute(0, 3, 1, 2).float() / 255)).mean((2, 3)))


IMAGES = np.random.default_rng(0).integers(0, 256, (150, 6, 6, 3), dtype=np.uint8)


def ranges_by(method: str, **settings) -> dict:
    network = Pixels().eval()
    layers = {"first": network.first, "second": network.second}
    quantizer = Int8Static(method="int8_static", calibration=method, **settings)
    return activation_ranges(network, layers, dict.fromkeys(layers, ("input", "output")), IMAGES, quantizer)


def part_of(count: int) -> Part:
    return Part(np.arange(count * 3).reshape(count, 1, 1, 3).astype(np.uint8), np.arange(count))


def test_minmax_sees_the_extremes_of_all_batches():
    network = Pixels().eval()
    with torch.no_grad():
        first = network.first(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255)
    found = ranges_by("minmax")
    assert found["first"]["input"] == (IMAGES.min() / 255, 1.0)
    assert found["first"]["output"] == pytest.approx((first.min().item(), first.max().item()))


def test_a_percentile_leaves_out_the_tails():
    whole, most = ranges_by("minmax")["first"]["output"], ranges_by("percentile", percentile=95.0)["first"]["output"]
    network = Pixels().eval()
    with torch.no_grad():
        first = network.first(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255)
    low, high = torch.quantile(first.flatten(), torch.tensor([0.025, 0.975])).tolist()
    assert whole[0] < most[0] < most[1] < whole[1]
    assert most == pytest.approx((low, high), abs=0.02)


def test_entropy_stays_within_the_extremes():
    whole, chosen = ranges_by("minmax"), ranges_by("entropy")
    for name in ("first", "second"):
        low, high = chosen[name]["input"]
        assert whole[name]["input"][0] - 1e-3 <= low < high <= whole[name]["input"][1] + 1e-3


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_what_works_in_place_after_a_layer_is_not_taken_for_its_output(method):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    x = torch.randn(10, 3, 6, 6)
    with torch.no_grad():
        low = network[0](x).min().item()
    quantizer = Int8Static(method="int8_static", calibration=method)
    found = activation_ranges(network, {"0": network[0]}, {"0": ("output",)}, x.numpy(), quantizer)
    assert low < -0.5
    assert found["0"]["output"][0] == pytest.approx(low, rel=0.1)


def test_hessians_are_sums_over_all_inputs_of_an_output():
    network = Pixels().eval()
    found = hessians(network, {"first": network.first, "second": network.second}, IMAGES)
    x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255
    columns = F.unfold(x, 3, padding=1).permute(1, 0, 2).flatten(1)
    assert torch.allclose(found["first"][0], columns @ columns.T, rtol=1e-4)
    assert found["second"].shape == (1, 4, 4)


def test_grouped_convolutions_have_a_hessian_for_each_group():
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=3, padding_mode="reflect")
    network = nn.Sequential(layer)
    x = torch.randn(4, 6, 5, 5).numpy()
    found = hessians(network, {"0": layer}, x)["0"]
    assert found.shape == (3, 18, 18)
    padded = F.pad(torch.from_numpy(x)[:, 2:4], (1, 1, 1, 1), "reflect")
    columns = F.unfold(padded, 3).permute(1, 0, 2).flatten(1)
    assert torch.allclose(found[1], columns @ columns.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [0, 1, 10])  # one image is unfolded even if its windows are too large
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)])
def test_few_windows_at_once_give_the_same_hessian(layer, at_once, monkeypatch):
    x = torch.randn(70, layer.in_channels, 8, 8).numpy()
    whole = hessians(nn.Sequential(layer), {"0": layer}, x)["0"]
    windows = 9 * layer.in_channels * (4 * 4 if layer.stride == (2, 2) else 8 * 8) * 4  # bytes of one image's
    sizes, unfold = [], F.unfold

    def noted(*arguments):
        found = unfold(*arguments)
        sizes.append(2 * found.nbytes)  # it is copied once more, by groups
        return found

    monkeypatch.setattr(calibration, "LARGEST_WINDOWS", 2 * at_once * windows + 1)
    monkeypatch.setattr(F, "unfold", noted)
    parts = hessians(nn.Sequential(layer), {"0": layer}, x)["0"]
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-3)
    assert max(sizes) == 2 * max(at_once, 1) * windows


def test_calibration_images_are_drawn_by_their_seed_and_keep_their_labels():
    settings = {"method": "int8_static", "calibration_images": 20}
    images, labels = calibration_images(part_of(50), Int8Static(**settings), "quantizers.int8_static")
    assert len(set(labels.tolist())) == 20
    assert np.array_equal(images[:, 0, 0, 0], labels * 3)
    again = calibration_images(part_of(50), Int8Static(**settings), "quantizers.int8_static")[1]
    other = calibration_images(part_of(50), Int8Static(**settings, calibration_seed=1), "quantizers.int8_static")[1]
    assert np.array_equal(labels, again)
    assert not np.array_equal(labels, other)


def test_more_calibration_images_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"quantizers\.q\.calibration_images = 256: the training part has 50"):
        calibration_images(part_of(50), Int8Static(method="int8_static"), "quantizers.q")
