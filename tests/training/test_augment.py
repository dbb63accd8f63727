import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from stages.common.errors import UserError
from stages.networks.preprocess import Preprocess
from stages.params.finetune import Finetune
from stages.training.augment import (
    ERASED_AREA,
    ERASED_ASPECT,
    AlternatingFlip,
    Augmentation,
    crop_and_resize,
    draw_rectangles,
    erase,
    flip_and_crop,
    positions_of,
)
from stages.training.trivial_augment import BINS, OPERATIONS, Draws, draw, trivial_augment

BASE = {"epochs": 1, "batch_size": 16, "optimizer": "sgd", "learning_rate": 0.1}
PREPROCESS = Preprocess([0.5] * 3, [0.25] * 3, 8)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (16, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def shifts(padding: int) -> torch.Tensor:
    return torch.randint(-padding, padding + 1, (2, 16, 1), generator=torch.Generator().manual_seed(0))


def augmented(recipe: Finetune, pixels: torch.Tensor, rank: int = 0, world_size: int = 1, seed: int = 5):
    """Images and labels of one process's part of the batch."""
    np.random.seed(seed)
    index, labels, positions = np.arange(16), torch.arange(16) % 4, positions_of(16, rank, world_size)
    return Augmentation(recipe, 16, 4, seed=0)(
        pixels[positions],
        labels[positions],
        PREPROCESS,
        index=index,
        positions=positions,
        epoch=1,
        generator=torch.Generator().manual_seed(seed),
    )


def test_marked_images_are_mirrored_and_no_others(pixels):
    flips = torch.arange(16) % 2 == 0
    out = flip_and_crop(pixels, flips, shifts(0))
    assert torch.equal(out[flips], pixels[flips].flip(2))
    assert torch.equal(out[~flips], pixels[~flips])


def test_crops_are_windows_of_the_reflect_padded_image(pixels):
    padded = torch.nn.functional.pad(pixels.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    moved = shifts(2)
    out = flip_and_crop(pixels, torch.zeros(16, dtype=torch.bool), moved).permute(0, 3, 1, 2)
    for image, source, (down, right) in zip(out, padded, moved[:, :, 0].t().tolist(), strict=True):
        assert torch.equal(source[:, 2 + down : 8 + down, 2 + right : 10 + right], image)
    assert len(set(map(tuple, moved[:, :, 0].t().tolist()))) > 5


def test_two_epochs_show_every_image_both_ways():
    flip, index = AlternatingFlip(1000, True, seed=0), np.arange(1000)
    assert torch.equal(flip(index, 0), ~flip(index, 1))
    assert torch.equal(flip(index, 0), flip(index, 2))
    assert 0.4 < flip(index, 0).float().mean() < 0.6
    assert not AlternatingFlip(1000, False, seed=0)(index, 1).any()


def test_without_augmentation_images_are_only_normalized(pixels):
    x, labels = augmented(Finetune(**BASE, horizontal_flip=False, crop_padding=0), pixels)
    assert torch.equal(x, PREPROCESS.normalize(pixels))
    assert torch.equal(labels, torch.arange(16) % 4)


def test_mixing_gives_soft_targets_that_sum_to_one(pixels):
    _, targets = augmented(Finetune(**BASE, mixup=1.0, cutmix=1.0), pixels)
    assert targets.shape == (16, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))
    assert ((targets > 0.1).sum(1) > 1).any()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mixup": 1.0},
        {"cutmix": 1.0},
        {"random_erasing": 0.7},
        {"trivial_augment": 0.9},
        {"random_resized_crop": 0.3},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_several_processes_see_the_images_of_one(pixels, world_size, settings):
    pixels = pixels[:, :6, :6]
    recipe = Finetune(**BASE, **settings)
    x, labels = augmented(recipe, pixels)
    seen = []
    for rank in range(world_size):
        positions = positions_of(16, rank, world_size)
        assert len(positions) == 16 // world_size
        own, targets = augmented(recipe, pixels, rank, world_size)
        assert torch.equal(own, x[positions])
        torch.testing.assert_close(targets, labels[positions])
        seen += positions.tolist()
    assert sorted(seen) == list(range(16))
    other, _ = augmented(recipe, pixels, seed=6)
    assert not torch.equal(other, x)


def test_a_batch_that_does_not_divide_evenly_is_refused():
    assert positions_of(15, 0, 1).tolist() == list(range(15))
    with pytest.raises(UserError, match=r"finetune\.batch_size: 18 images .* 2 processes: use a multiple of 4"):
        positions_of(18, 1, 2)


def test_erased_rectangles_are_gray_and_of_the_given_size():
    generator = torch.Generator().manual_seed(0)
    rectangles = draw_rectangles(2000, (32, 32), ERASED_AREA, ERASED_ASPECT, generator)
    rectangles[torch.rand(2000, generator=generator) >= 0.6] = 0
    x = torch.rand(2000, 3, 32, 32, generator=generator) + 1
    out = erase(x, rectangles)
    gone = (out == 0).all(1)
    assert torch.equal(out[~gone[:, None].expand_as(out)], x[~gone[:, None].expand_as(x)])
    fraction = gone.float().mean((1, 2))
    assert 0.55 < (fraction > 0).float().mean() < 0.65
    assert 0.015 < fraction[fraction > 0].min() < 0.03
    assert 0.28 < fraction.max() < 0.37
    for mask, (top, left, bottom, right) in zip(gone[:50], rectangles[:50].tolist(), strict=True):
        assert mask[top:bottom, left:right].all()
        assert mask.sum() == max(0, bottom - top) * (right - left)
    hit = gone.float().mean(0)
    assert hit.min() > 0  # corners too
    assert hit.max() < 0.3


def test_a_random_resized_crop_shows_a_part_of_its_own_image_at_the_input_size():
    plain = torch.arange(0, 160, 10, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 20, 24, 3)
    x, _ = augmented(Finetune(**BASE, random_resized_crop=0.25), plain)
    assert x.shape == (16, 3, PREPROCESS.input_size, PREPROCESS.input_size)
    torch.testing.assert_close(x, PREPROCESS.normalize(plain)[:, :, :8, :8])


def test_random_resized_crops_have_the_area_and_the_aspect_of_the_recipe():
    boxes = draw_rectangles(2000, (48, 40), (0.3, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(0)).float()
    height, width = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 48).all()
    assert (boxes[:, 3] <= 40).all()
    area = height * width / (48 * 40)
    assert 0.28 < area.min() < 0.35
    assert area.max() > 0.9
    small = area < 0.5  # no side is limited by the image
    assert 0.7 < (height / width)[small].min() < 0.8
    assert 1.2 < (height / width)[small].max() < 1.4


def test_gray_images_are_flipped_and_shifted_like_each_color(pixels):
    flips = torch.arange(16) % 3 == 0
    color, gray = (flip_and_crop(images, flips, shifts(2)) for images in (pixels, pixels[..., :1]))
    assert torch.equal(gray, color[..., :1])


def test_a_crop_is_scaled_with_antialiasing():
    pixels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cut = crop_and_resize(pixels, torch.tensor([[8, 16, 40, 48]]), 16)
    reference = Image.fromarray(pixels[0, 8:40, 16:48].numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(cut[0].int().numpy() - np.asarray(reference).astype(int)).max() <= 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_equals_torchvisions(name, sign, channels):
    coarse = torch.rand(BINS, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255).to(torch.uint8)
    steps = torch.arange(BINS)
    strength = sign * steps / (BINS - 1)
    magnitudes = {
        "shear_x": 0.99 * strength,
        "shear_y": 0.99 * strength,
        "translate_x": 32 * strength,
        "translate_y": 32 * strength,
        "rotate": 135 * strength,
        "posterize": 8 - (steps / 5).round(),
        "solarize": torch.linspace(255, 0, BINS),
    }.get(name, 0.99 * strength)
    theirs = "AutoContrast" if name == "autocontrast" else name.title().replace("_", "")
    draws = Draws(torch.full((BINS,), OPERATIONS.index(name)), strength)
    found = trivial_augment(images, draws).int()
    wanted = torch.stack(
        [
            _apply_op(image, theirs, float(m), InterpolationMode.NEAREST, None)
            for image, m in zip(images, magnitudes, strict=True)
        ]
    ).int()
    difference = (found - wanted).abs()
    assert difference.max() <= 1  # rounding
    assert (difference > 0).float().mean() < 0.06
    assert name == "identity" or (name, channels) == ("color", 1) or not torch.equal(found, images.int())


def test_every_image_draws_its_own_operation_and_strength():
    draws = draw(4000, 0.8, torch.Generator().manual_seed(0))
    counts = torch.bincount(draws.operation, minlength=len(OPERATIONS)) / 4000
    assert counts[OPERATIONS.index("identity")] == pytest.approx(0.2 + 0.8 / 14, abs=0.03)
    assert counts[:-1].min() > 0.04
    assert len(draws.strength.unique()) == 2 * BINS - 1
    assert draws.strength.abs().max() == 1
