import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy_training import Recorder, Watched, interrupt_at, rows_of, weights

from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.networks.preprocess import Preprocess
from stages.params.finetune import ProgressiveResize
from stages.training import distributed, host, trainer
from stages.training.checkpoint import checkpoint_folder
from stages.training.distillation import Distillation
from stages.training.trainer import Trainer, TrainingData

CPU = torch.device("cpu")


def test_training_learns_and_returns_the_best_epoch_by_validation(network, fit, recipe):
    trained = fit(network, recipe.model_copy(update={"epochs": 6}))
    assert trained.validation_top1 > 0.9
    assert not trained.network.training
    assert len(trained.curve) == 6
    assert trained.curve[trained.epoch - 1]["validation_top1"] == max(row["validation_top1"] for row in trained.curve)
    assert tuple(trained.curve[0]) == trainer.CURVE_COLUMNS


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(network, fit):
    results = [weights(fit(copy.deepcopy(network), seed=seed).network) for seed in (3, 3, 4)]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_steps_by_hand_equal_fit_also_from_a_state_dict(network, fit, parts, preprocess, recipe):
    recipe = recipe.model_copy(update={"ema_decay": 0.0})
    whole = fit(copy.deepcopy(network), recipe, keep="last")
    data = TrainingData(*parts, preprocess)
    first, second = (Trainer(copy.deepcopy(network), data, recipe, CPU, seed=3) for _ in range(2))
    for epoch in range(3):
        taken = first if epoch < 2 else second
        if epoch == 2:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step, batch in enumerate(taken.batches_of(epoch), epoch * taken.steps_per_epoch):
            loss = taken.step(step, *batch)
    assert loss.shape == ()
    assert weights(second.network.to(memory_format=torch.contiguous_format)) == weights(whole.network)


@pytest.mark.parametrize(
    ("optimizer", "epochs", "keep", "distilled"),
    [("adamw", None, "best", False), ("sgd", (1, 3), "last", False), ("muon", (1, 3), "best", True)],
)
def test_an_interrupted_training_says_what_is_kept_and_resumes_bit_for_bit(
    network, fit, parts, recipe, tmp_path, capsys, optimizer, epochs, keep, distilled
):
    recipe = recipe.model_copy(update={"optimizer": optimizer, "cutmix": 0.5})

    def phase(on_read=lambda count: None, **more):
        distillation = Distillation(copy.deepcopy(network), 0.5, 2.0) if distilled else None
        more |= {"epochs": epochs, "keep": keep, "distillation": distillation}
        return fit(copy.deepcopy(network), recipe, Watched(parts[0], on_read), **more)

    whole, done = phase(), 2 if epochs else 1
    with pytest.raises(KeyboardInterrupt, match=rf"^test: {done} of 3 epochs are finished and kept$"):
        phase(interrupt_at(5), checkpoints=tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["trainer"].keys() == {"constraint", "network", "optimizers", "ema"}  # and no teacher
    capsys.readouterr()
    resumed = phase(checkpoints=tmp_path)
    assert capsys.readouterr().out.startswith(f"test: epoch {done + 1}/3 ")
    for trained in (resumed, phase(interrupt_at(1), checkpoints=tmp_path)):  # the second one reads nothing
        assert weights(trained.network) == weights(whole.network)
        assert rows_of(trained.curve) == rows_of(whole.curve)
        assert trained.epoch == whole.epoch
    with pytest.raises(ValueError, match="each phase needs its own folder"):
        fit(network, recipe, epochs=(0, 2), checkpoints=tmp_path)


def test_a_resumed_training_keeps_its_precision(network, fit, parts, recipe, tmp_path, monkeypatch):
    recipe = recipe.model_copy(update={"optimizer": "muon", "precision": "auto"})

    def phases(folder: Path, faster: bool, stop_in: int | None = None) -> bytes:
        """Train in two phases as a pruner does, each with its own optimizer."""
        monkeypatch.setattr(host, "_measure_faster", lambda: faster)
        trained = copy.deepcopy(network)
        with checkpoint_folder(folder, {"a": 1}) as checkpoints:
            for phase, epochs in enumerate([(0, 2), (2, 3)]):
                (own := checkpoints / str(phase)).mkdir(exist_ok=True)
                part = Watched(parts[0], interrupt_at(2 if phase == stop_in else -1))
                fit(trained, recipe, part, checkpoints=own, epochs=epochs, keep="last")
        return weights(trained)

    whole = phases(tmp_path / "whole", True)
    assert phases(tmp_path / "other", False) != whole
    for phase in range(2):
        with pytest.raises(KeyboardInterrupt):
            phases(tmp_path / str(phase), True, stop_in=phase)
        assert phases(tmp_path / str(phase), False) == whole


def test_only_epochs_in_a_written_checkpoint_count_as_kept(network, fit, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Spacing, "due", lambda self: not (tmp_path / "checkpoint.pt").exists())
    with pytest.raises(KeyboardInterrupt, match=r"^test: 1 of 3 epochs are finished and kept$"):
        fit(network, part=Watched(parts[0], interrupt_at(8)), checkpoints=tmp_path)  # in the third epoch


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "sgd", "learning_rate": 1e30}, r"finetune\.learning_rate; nothing was saved"),
        ({"optimizer": "muon", "muon_learning_rate": 1e30}, r"finetune\.learning_rate or finetune\.muon_learning_rate"),
    ],
)
@pytest.mark.parametrize("distilled", [False, True])
def test_a_loss_that_is_not_finite_names_the_learning_rates(network, fit, recipe, changes, named, distilled):
    distillation = Distillation(copy.deepcopy(network), 0.5, 2.0) if distilled else None
    with pytest.raises(UserError, match=rf"the loss became \w+ in epoch \d: lower .*{named}"):
        fit(network, recipe.model_copy(update=changes), distillation=distillation)


def test_a_constraint_is_called_around_each_step_and_limits_the_choice_of_the_epoch(network, fit):
    class Zeroes(Recorder):
        def project(self, copy_of_network: nn.Module) -> None:
            assert copy_of_network is not network
            for parameter in copy_of_network.parameters():
                parameter.data.zero_()

    constraint = Zeroes(network, met_from=8)
    trained = fit(network, constraint=constraint)
    assert constraint.calls == [f"{when} {step}" for step in range(9) for when in ("before", "after")]
    assert trained.epoch == 3
    assert all((p == 0).all() for p in trained.network.parameters())  # the projected EMA is kept


@pytest.mark.parametrize("settings", [{}, {"epochs": (0, 2), "keep": "last"}])
def test_a_target_that_no_epoch_meets_is_a_clear_error(network, fit, settings):
    with pytest.raises(UserError, match="no epoch ended with the pruning target met"):
        fit(network, constraint=Recorder(network, met_from=6 if settings else 9), **settings)


class StatelessSgd:
    """Plain gradient steps, which carry no state from one step to the next."""

    def __init__(self, network: nn.Module, recipe, fresh: None) -> None:
        self.parameters, self.peak, self.rate = list(network.parameters()), recipe.learning_rate, 0.0

    def set_factor(self, factor: float) -> None:
        self.rate = self.peak * factor

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            parameter -= self.rate * parameter.grad


def test_two_phases_take_the_steps_of_one_training(network, fit, parts, recipe, monkeypatch):
    monkeypatch.setattr(trainer, "Optimizers", StatelessSgd)  # only the optimizer's state begins anew in a phase
    recipe = recipe.model_copy(update={"epochs": 4, "ema_decay": 0.0, "learning_rate": 0.3})

    def phase(network, epochs):
        part = Watched(parts[0])
        return fit(network, recipe, part, epochs=epochs, keep="last"), part.reads

    whole, order = phase(copy.deepcopy(network), None)
    first, first_order = phase(copy.deepcopy(network), (0, 1))
    assert (first.epoch, len(first.curve)) == (1, 1)
    second, second_order = phase(copy.deepcopy(first.network), (1, 4))
    assert second.epoch == whole.epoch == 4
    assert first_order + second_order == order
    assert len(set(order)) == len(order) == 12
    assert rows_of(first.curve + second.curve) == rows_of(whole.curve)
    assert [row["epoch"] for row in whole.curve] == [1, 2, 3, 4]
    assert weights(second.network) == weights(whole.network) != weights(first.network)


def test_keep_last_returns_the_weights_and_keep_best_the_ema_of_the_phase(network, fit, recipe):
    whole, later = copy.deepcopy(network), copy.deepcopy(network)
    uninterrupted, phase = Recorder(whole), Recorder(later)
    fit(whole, constraint=uninterrupted)
    last = fit(network, epochs=(0, 2), keep="last")
    assert last.epoch == 2
    assert all(torch.equal(last.network.state_dict()[name], tensor) for name, tensor in uninterrupted.taken[5].items())
    best = fit(later, constraint=phase, epochs=(2, 3))
    assert sorted(phase.taken) == [6, 7, 8]
    average = phase.taken[6]
    for updates, step in [(1, 7), (2, 8)]:
        decay = min(recipe.ema_decay, (1 + updates) / (10 + updates))
        average = {name: decay * average[name] + (1 - decay) * new for name, new in phase.taken[step].items()}
    assert all(torch.allclose(best.network.state_dict()[name], tensor, atol=1e-6) for name, tensor in average.items())


@pytest.mark.parametrize("epochs", [(0, 4), (2, 2), (-1, 2)])
def test_epochs_outside_the_recipe_are_refused(network, fit, epochs):
    with pytest.raises(ValueError, match="do not lie within the recipe's 3"):
        fit(network, epochs=epochs)


def test_progressive_resize_changes_the_size_of_the_first_training_steps_only(network, fit, recipe):
    sizes = []
    network.register_forward_pre_hook(lambda module, inputs: sizes.append((module.training, inputs[0].shape[2])))
    recipe = recipe.model_copy(update={"progressive_resize": ProgressiveResize(input_size=48, fraction=0.5)})
    fit(network, recipe)
    assert [size for training, size in sizes if training] == [48] * 5 + [32] * 4
    assert {size for training, size in sizes[2:] if not training} == {32}  # after one pass of each size


@pytest.mark.parametrize("small", [8, None])
def test_an_input_size_that_the_network_does_not_take_is_a_clear_error(network, fit, recipe, small):
    if small:
        recipe = recipe.model_copy(update={"progressive_resize": ProgressiveResize(input_size=small)})
        with pytest.raises(UserError, match=r"does not take finetune\.progressive_resize\.input_size 8"):
            fit(network, recipe)
    else:
        with pytest.raises(UserError, match="does not take input_size 8"):
            fit(network, preprocess=Preprocess([0.5] * 3, [0.25] * 3, 8))


def test_a_batch_of_one_image_is_refused_where_batch_norm_would_see_one_value(fit, recipe):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    recipe = recipe.model_copy(update={"batch_size": 1, "epochs": 1, "mixup": 0.0})
    with pytest.raises(UserError, match=r"finetune\.batch_size = 1: batch norm \(1\) sees one value"):
        fit(network, recipe)
    fit(network, recipe, frozen_batch_norm=True)


def test_a_network_with_a_three_dimensional_convolution_trains(fit, recipe):
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.volume, self.head = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.volume(self.first(x).unsqueeze(1)).mean((2, 3, 4)))

    assert fit(Volume(), recipe.model_copy(update={"epochs": 1})).epoch == 1


def test_running_out_of_memory_is_a_clear_error(network, fit, monkeypatch):
    def no_memory(*_, **__) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(trainer, "Augmentation", lambda *_: no_memory)
    with pytest.raises(UserError, match="batch_size 32 does not fit into memory"):
        fit(network)


def test_constructing_a_trainer_leaves_running_statistics_alone(parts, preprocess, recipe):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    network = nn.Sequential(*layers)
    assert Trainer(network, TrainingData(*parts, preprocess), recipe, CPU).classes == 2
    assert network.training
    assert torch.equal(network[1].running_mean, torch.zeros(4))


def test_a_process_without_validation_images_leaves_them_to_the_others(network, parts, preprocess, recipe, monkeypatch):
    few = Part(parts[1].images[:1], parts[1].labels[:1])
    trainer = Trainer(network, TrainingData(*parts, preprocess), recipe, CPU)
    alone = trainer.predict(network, few)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    logits = []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        logits.append(trainer.predict(network, few))
    assert not logits[0].any()
    np.testing.assert_array_equal(logits[0] + logits[1], alone)


def test_compiled_training_equals_the_plain_one(fit, recipe, monkeypatch):
    recipe, calls = recipe.model_copy(update={"optimizer": "sgd", "epochs": 1}), []
    network = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain = fit(copy.deepcopy(network), recipe)

    def traced(module: nn.Module, **settings: object) -> nn.Module:
        calls.append(settings)
        return compile_module(module, backend="aot_eager", dynamic=False)  # needs no C++ compiler

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    compiled = fit(network, recipe.model_copy(update={"compile": True}))
    assert calls == [{"dynamic": False, "mode": "default"}]
    for name, tensor in plain.network.state_dict().items():
        torch.testing.assert_close(compiled.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_graphs_take_the_steps_of_plain_calls(network, parts, preprocess, recipe, precision):
    settings = {"optimizer": "sgd", "precision": precision, "learning_rate": 0.01}
    settings["progressive_resize"] = ProgressiveResize(input_size=48)  # two shapes, hence two graphs
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # compiled code draws other random numbers
    losses = {}
    for compiled in (False, True):
        own = recipe.model_copy(update=settings | {"compile": compiled})
        trainer = Trainer(copy.deepcopy(network), TrainingData(*parts, preprocess), own, torch.device("cuda", 0))
        losses[compiled] = [
            trainer.step(epoch * 3 + batch, *data).item()
            for epoch in range(3)
            for batch, data in enumerate(trainer.batches_of(epoch))
        ]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3 if precision == "float32" else 0.05)


def test_a_network_that_does_not_compile_is_a_clear_error(network, fit, recipe, monkeypatch):
    def without_compiler(module: nn.Module, **_: object) -> None:
        from torch._dynamo.exc import TorchDynamoException

        raise TorchDynamoException("No working C++ compiler found\nand so on")

    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(UserError, match=r"finetune\.compile = true does not work here \(No working C\+\+ compiler"):
        fit(network, recipe.model_copy(update={"compile": True}))
