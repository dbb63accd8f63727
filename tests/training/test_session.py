from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stages.artifacts.description import Description
from stages.datasets.store import Part
from stages.params.base import Base
from stages.params.finetune import Finetune, Pretrained, ProgressiveResize
from stages.params.pruners import Continued, NonePruner
from stages.training.session import Session

FINETUNE = Finetune(epochs=9, batch_size=4, optimizer="adamw", learning_rate=0.1, warmup_fraction=0.0)
CONTINUED = Continued(method="continued", epochs=3, learning_rate_factor=0.5)


@pytest.fixture
def session() -> Session:
    parent = Description(
        name="toy", stage="finetune", model="toy", network=None, classes=["zero", "one"], image_size=8, geometry="crop",
        input_size=8,        mean=[0.5] * 3, std=[0.2] * 3, data={"sha256": "1"}, parameters={}, seed=7,
    )  # fmt: skip
    part = Part(np.zeros((10, 8, 8, 3), np.uint8), np.zeros(10, np.int64))
    return Session("prune", "toy-c", nn.Identity(), parent, CONTINUED, "pruners.c", Base(), FINETUNE, part, part)


def test_the_recipe_is_that_of_finetune_with_the_budget_of_the_settings(session):
    session.finetune = FINETUNE.model_copy(update={"progressive_resize": ProgressiveResize(input_size=8)})
    changes = {"epochs": 3, "learning_rate": 0.05, "muon_learning_rate": 0.01}
    assert session.recipe == FINETUNE.model_copy(update=changes)
    assert session.steps == 3 * 2
    assert session.learning_rate(0) == pytest.approx(0.05)
    assert [session.epochs_until(step) for step in (0, 1, 2, 3, 6)] == [0, 1, 1, 2, 3]
    session.settings = NonePruner(method="none")
    del session.recipe
    with pytest.raises(AssertionError, match=r"pruners\.c does not train"):
        _ = session.recipe


@pytest.mark.parametrize(
    "change",
    [
        {"settings": CONTINUED.model_copy(update={"epochs": 4})},
        {"finetune": FINETUNE.model_copy(update={"batch_size": 2})},
        {"base": Base(seed=1)},
        {"metric": "balanced_accuracy"},
        {"parent": {"seed": 8}},
        {"parent": {"data": {"sha256": "2"}}},
        {"parent": {"tensors": {"sha256": "3"}}},
    ],
)
def test_all_that_determines_the_result_is_in_the_identity(session, change):
    if isinstance(change.get("parent"), dict):
        change = {"parent": replace(session.parent, **change["parent"])}
    assert replace(session, **change).identity() != session.identity()


@pytest.mark.parametrize(
    ("weights", "mode", "frozen"),
    [({"fresh": []}, "frozen", True), ({"fresh": []}, "train", False), (None, "frozen", False)],
)
def test_batch_norm_keeps_the_statistics_of_initial_weights_unless_it_shall_train(session, weights, mode, frozen):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    session.parent = replace(session.parent, weights=weights)
    session.finetune = FINETUNE.model_copy(update={"pretrained": Pretrained(batch_norm=mode)})
    found = session.train(network).network.state_dict()
    kept = {name for name in found if torch.equal(found[name], before[name])}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert kept & statistics == (statistics if frozen else set())
    assert "4.bias" not in kept


def test_a_network_that_starts_afresh_trains_its_batch_norm(session):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    session.parent = replace(session.parent, weights={"fresh": []})
    assert session.train(network, recipe=session.recipe).network[1].num_batches_tracked > 0
