import numpy as np
import pytest
import torch

from stages.common.params import Finetune
from stages.training.augment import AlternatingFlip, BatchMixing, flip_and_crop


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (16, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_without_padding_and_flips_the_pixels_stay(pixels):
    same = flip_and_crop(pixels, torch.zeros(16, dtype=torch.bool), 0, torch.Generator())
    assert torch.equal(same, pixels)


def test_marked_images_are_mirrored_and_no_others(pixels):
    flips = torch.arange(16) % 2 == 0
    out = flip_and_crop(pixels, flips, 0, torch.Generator())
    assert torch.equal(out[flips], pixels[flips].flip(2))
    assert torch.equal(out[~flips], pixels[~flips])


def test_crops_are_windows_of_the_reflect_padded_image(pixels):
    padded = torch.nn.functional.pad(pixels.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    out = flip_and_crop(pixels, torch.zeros(16, dtype=torch.bool), 2, torch.Generator().manual_seed(0)).permute(
        0, 3, 1, 2
    )
    found = []
    for image, source in zip(out, padded, strict=True):
        windows = [(y, x) for y in range(5) for x in range(5) if torch.equal(source[:, y : y + 6, x : x + 8], image)]
        assert windows
        found.append(windows[0])
    assert len(set(found)) > 5  # each image has its own shift


def test_every_image_is_seen_both_ways_in_two_epochs():
    flip, index = AlternatingFlip(1000, True, seed=0), np.arange(1000)
    assert torch.equal(flip(index, 0), ~flip(index, 1))
    assert torch.equal(flip(index, 0), flip(index, 2))
    assert 0.4 < flip(index, 0).float().mean() < 0.6
    assert not AlternatingFlip(1000, False, seed=0)(index, 1).any()


def test_mixing_gives_soft_targets_that_sum_to_one_and_erasing_alone_keeps_the_labels():
    x, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    base = {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1}
    mixed, targets = BatchMixing(Finetune(**base, mixup=1.0, cutmix=1.0), 4, torch.device("cpu"))(x.clone(), labels)
    assert targets.shape == (8, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    assert not torch.equal(mixed, x)
    erased, same = BatchMixing(Finetune(**base, random_erasing=0.9), 4, torch.device("cpu"))(x.clone(), labels)
    assert torch.equal(same, labels)
    assert 0 < (erased != x).float().mean() < 0.5
