import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup

from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.training.class_weights import balanced_weights, refuse_empty_classes, weighted

LABELS = np.array([0] * 90 + [1] * 9 + [2])


def test_weights_are_those_of_scikit_learn():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert balanced_weights(LABELS, 3).numpy() == pytest.approx(expected)


def test_an_empty_class_is_refused_with_its_name():
    refuse_empty_classes(LABELS, ["ok", "scratch", "dent"])
    with pytest.raises(
        UserError, match=r"finetune\.class_weights = 'balanced': the training part has no image of hole:"
    ):
        refuse_empty_classes(LABELS, ["ok", "scratch", "dent", "hole"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_weight_multiplies_the_whole_loss_of_an_image(smoothing: float):
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(8, 3), torch.arange(8) % 3, balanced_weights(LABELS, 3)
    losses = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    assert F.cross_entropy(logits, weighted(labels, weights, smoothing)) == pytest.approx(
        (weights[labels] * losses).mean().item(), rel=1e-5
    )


def test_a_mixed_image_has_the_loss_of_each_label_in_proportion():
    torch.manual_seed(0)
    np.random.seed(0)
    logits, labels, weights = torch.randn(4, 3), torch.tensor([0, 0, 1, 2]), balanced_weights(LABELS, 3)
    _, mixed = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=3)(torch.zeros(4, 1, 2, 2), labels)
    share = (mixed[0, 0] - 0.1 / 3) / 0.9  # of an image's own label; the pair is the last image
    assert 0.01 < share < 0.99

    def loss(label: torch.Tensor) -> torch.Tensor:
        return weights[label] * F.cross_entropy(logits, label, label_smoothing=0.1, reduction="none")

    expected = (share * loss(labels) + (1 - share) * loss(labels.flip(0))).mean()
    assert F.cross_entropy(logits, weighted(mixed, weights, 0.1)) == pytest.approx(expected.item(), rel=1e-5)


def test_unweighted_targets_are_the_labels():
    labels = torch.tensor([2, 0])
    assert torch.equal(weighted(labels, torch.ones(3), 0.0), F.one_hot(labels, 3).float())


def imbalanced(count: int, seed: int) -> Part:
    """Images of any brightness of which one in a hundred, a defect, is brighter by less than two deviations: seldom so
    bright that it is likelier a defect than one of the many other images."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % 100 == 0).astype(np.int64)
    brightness = random.normal(110 + 20 * labels, 12)
    images = random.normal(brightness[:, None, None, None], 10, (count, 8, 8, 3))
    return Part(images.clip(0, 255).astype(np.uint8), labels)


def test_few_defects_among_many_parts_are_found_by_metric_and_class_weights(fit, network, recipe, parts):
    """A constant answer has top-1 99 %; the metric and the weights together choose a network that finds defects."""
    changes = {"mixup": 0.0, "ema_decay": 0.0, "random_erasing": 0.0, "crop_padding": 0}
    parts[1:] = [imbalanced(400, 1)]
    trained = fit(network, recipe.model_copy(update=changes | {"epochs": 2}), imbalanced(800, 0))
    assert trained.accuracy.metrics == {"validation_top1": 0.99, "validation_balanced_accuracy": 0.5}
    assert trained.accuracy.warnings(["ok", "defect"]) == ["every validation image is classified as ok"]
    assert trained.curve[-1]["validation_balanced_accuracy"] == 0.5
    balanced = recipe.model_copy(update=changes | {"class_weights": "balanced", "epochs": 4})
    trained = fit(network, balanced, imbalanced(800, 0), metric="balanced_accuracy")
    assert min(trained.accuracy.right) > 0
    assert trained.accuracy.balanced_accuracy > 0.65
    assert trained.accuracy.warnings(["ok", "defect"]) == []
    chosen = trained.curve[trained.epoch - 1]["validation_balanced_accuracy"]
    assert chosen == max(row["validation_balanced_accuracy"] for row in trained.curve)
