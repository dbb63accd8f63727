import copy
import importlib.metadata
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from stages.training.loop import _Run, recipe_for, steps_in, train

from stages.common.errors import UserError
from stages.datasets.store import Part
from stages.networks.preprocess import Preprocess
from stages.params.base import Base
from stages.params.pruners import Continued
from stages.training import checkpoint, host, loop, processes
from stages.training.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint

BASE = Base(device="cpu", threads=1)


def run(network, parts, preprocess, recipe, **more):
    return train(network, *parts, preprocess, recipe, base=BASE, seed=3, title="test", **more)


def weights(network) -> bytes:
    return b"".join(t.numpy().tobytes() for t in network.state_dict().values())


def test_training_learns_and_gives_back_the_best_epoch_by_validation(network, parts, preprocess, recipe):
    trained = run(network, parts, preprocess, recipe.model_copy(update={"epochs": 6}))
    assert trained.validation_top1 > 0.9
    assert not trained.network.training
    assert len(trained.curve) == 6
    assert trained.curve[trained.epoch - 1]["validation_top1"] == max(row["validation_top1"] for row in trained.curve)
    assert tuple(trained.curve[0]) == loop.CURVE_COLUMNS


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(network, parts, preprocess, recipe):
    results = [
        weights(train(copy.deepcopy(network), *parts, preprocess, recipe, base=BASE, seed=seed, title="t").network)
        for seed in (3, 3, 4)
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_a_training_killed_after_an_epoch_ends_bit_for_bit_where_the_uninterrupted_one_does(
    network, parts, preprocess, recipe, tmp_path, optimizer
):
    recipe = recipe.model_copy(update={"optimizer": optimizer})
    whole = run(copy.deepcopy(network), parts, preprocess, recipe)

    process = multiprocessing.get_context("spawn").Process(
        target=_train_until_killed, args=(copy.deepcopy(network), parts, preprocess, recipe, tmp_path)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    seen = []
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        assert (folder / "checkpoint.pt").exists()
        resumed = run(
            copy.deepcopy(network), (_Watched(parts[0], seen), parts[1]), preprocess, recipe, checkpoints=folder
        )
    assert len(seen) == 6  # two epochs of three batches: the first was not done again
    assert weights(resumed.network) == weights(whole.network)
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in row.items() if k not in timing} for row in resumed.curve] == [
        {k: v for k, v in row.items() if k not in timing} for row in whole.curve
    ]
    assert weights(_resume_finished(network, parts, preprocess, recipe, tmp_path).network) == weights(whole.network)


@pytest.mark.parametrize("began", [True, False], ids=["bfloat16", "float32"])
def test_a_resumed_training_keeps_the_precision_in_which_it_began(
    network, parts, preprocess, recipe, tmp_path, monkeypatch, began
):
    recipe = recipe.model_copy(update={"optimizer": "muon", "precision": "auto"})

    def phases(folder: Path, faster: bool, stop_in: int | None = None) -> bytes:
        """Two, as of a pruner; each began its own optimizer."""
        monkeypatch.setattr(host, "_measured_faster", lambda: faster)
        trained = copy.deepcopy(network)
        with checkpoint_folder(folder, {"a": 1}) as checkpoints:
            for phase, epochs in enumerate([(0, 2), (2, 3)]):
                (own := checkpoints / str(phase)).mkdir(exist_ok=True)
                part = _Watched(parts[0], [], lambda count, phase=phase: _interrupt(phase == stop_in and count == 2))
                run(trained, (part, parts[1]), preprocess, recipe, checkpoints=own, epochs=epochs, keep="last")
        return weights(trained)

    whole = phases(tmp_path / "whole", began)
    assert phases(tmp_path / "other", not began) != whole
    for phase in range(2):
        with pytest.raises(KeyboardInterrupt):
            phases(tmp_path / str(phase), began, stop_in=phase)
        assert phases(tmp_path / str(phase), not began) == whole


def _interrupt(now: bool) -> None:
    if now:
        raise KeyboardInterrupt


def _resume_finished(network, parts, preprocess, recipe, tmp_path):
    """What happens where the stage ended well but DVC was killed before it took the outputs over."""
    seen: list[int] = []
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        again = run(
            copy.deepcopy(network), (_Watched(parts[0], seen), parts[1]), preprocess, recipe, checkpoints=folder
        )
    assert seen == []
    return again


def _train_until_killed(network, parts, preprocess, recipe, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        seen: list[int] = []

        def kill(count: int) -> None:
            if count == 5:  # in the second epoch
                os.kill(os.getpid(), signal.SIGKILL)

        run(network, (_Watched(parts[0], seen, kill), parts[1]), preprocess, recipe, checkpoints=folder)


class _Watched(Part):
    """A part that counts how many batches were read from it."""

    def __init__(self, part: Part, seen: list[int], on_read=lambda count: None) -> None:
        super().__init__(_WatchedImages(part.images, seen, on_read), part.labels)


class _WatchedImages:
    def __init__(self, images: np.ndarray, seen: list[int], on_read) -> None:
        self.images, self.seen, self.on_read = images, seen, on_read

    def __getitem__(self, index):
        self.seen.append(len(index))
        self.on_read(len(self.seen))
        return self.images[index]


def test_a_loss_that_is_not_finite_ends_with_a_clear_error(network, parts, preprocess, recipe):
    with pytest.raises(UserError, match="the loss became"):
        run(network, parts, preprocess, recipe.model_copy(update={"optimizer": "sgd", "learning_rate": 1e30}))


def test_of_muons_two_learning_rates_both_are_named(network, parts, preprocess, recipe):
    wild = recipe.model_copy(update={"optimizer": "muon", "muon_learning_rate": 1e30})
    with pytest.raises(UserError, match=r"lower finetune\.learning_rate or finetune\.muon_learning_rate"):
        run(network, parts, preprocess, wild)


def test_a_constraint_is_called_around_each_step_and_bounds_the_choice_of_epoch(network, parts, preprocess, recipe):
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def before_step(self, step: int) -> None:
            assert all(p.grad is not None for p in network.parameters())
            self.calls.append(f"before {step}")

        def after_step(self, step: int) -> None:
            self.calls.append(f"after {step}")

        def project(self, copy_of_network) -> None:
            assert copy_of_network is not network
            for parameter in copy_of_network.parameters():
                parameter.data.zero_()

        def met_after(self, step: int) -> bool:
            return step >= 8

        def state_dict(self) -> dict:
            return {}

        def load_state_dict(self, state: dict) -> None:
            raise AssertionError

    recorder = Recorder()
    trained = run(network, parts, preprocess, recipe, constraint=recorder)
    assert recorder.calls == [f"{when} {step}" for step in range(9) for when in ("before", "after")]
    assert trained.epoch == 3
    assert all((p == 0).all() for p in trained.network.parameters())  # the projected average is what is kept


def test_a_target_that_no_epoch_meets_is_a_clear_error(network, parts, preprocess, recipe):
    class Never:
        before_step = after_step = staticmethod(lambda step: None)
        project = staticmethod(lambda network: None)
        met_after = staticmethod(lambda step: False)
        state_dict = staticmethod(dict)

    with pytest.raises(UserError, match="no epoch ended with the pruning target met"):
        run(network, parts, preprocess, recipe.model_copy(update={"epochs": 1}), constraint=Never())


def test_cuda_is_refused_where_there_is_none(network, parts, preprocess, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable CUDA device"):
        train(network, *parts, preprocess, recipe, base=Base(device="cuda"), seed=0, title="t")


def test_two_processes_do_not_train_the_same_thing(tmp_path):
    with checkpoint_folder(tmp_path, {"a": 1}) as first, checkpoint_folder(tmp_path, {"a": 2}) as second:
        assert first != second
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} is still training this"),
            checkpoint_folder(tmp_path, {"a": 1}),
        ):
            pass


@pytest.mark.parametrize("library", ["torch", "timm", "only-train-once", "torch-pruning"])
def test_a_library_of_another_version_does_not_go_on_from_a_checkpoint(tmp_path, monkeypatch, library):
    version = importlib.metadata.version
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        pass
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == library else version(name))
    with checkpoint_folder(tmp_path, {"a": 1}) as other:
        assert other != folder


def test_a_checkpoint_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "b").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"cannot write .*move away the file"),
        checkpoint_folder(tmp_path / "b", {"a": 1}),
    ):
        pass
    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(UserError, match=rf"cannot write {tmp_path}/a/.*: No space left on device"),
        checkpoint_folder(tmp_path / "a", {"a": 1}),
    ):
        pass


def test_a_failed_training_keeps_its_checkpoint(tmp_path):
    with pytest.raises(RuntimeError), checkpoint_folder(tmp_path, {"a": 1}) as folder:
        (folder / "checkpoint.pt").touch()
        raise RuntimeError
    assert (folder / "checkpoint.pt").exists()


def test_a_checkpoint_that_cannot_be_written_is_a_clear_error_and_the_last_one_stays(tmp_path, monkeypatch):
    state = {"epochs": [0, 2], "curve": [], "chosen": {}, "run": {}}
    save_checkpoint(tmp_path, state)

    def full(state, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(tmp_path, state | {"epochs": [0, 4]})
    assert load_checkpoint(tmp_path) == state


def test_checkpoints_that_take_long_are_written_less_often(monkeypatch):
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now)
    spacing = checkpoint.Spacing()
    for seconds, pause in ((0.2, 0.0), (2.0, 40.0)):
        assert spacing.due()
        with spacing.measured():
            now += seconds
        if pause:
            now += pause - 0.1
            assert not spacing.due()
            now += 0.2
    assert spacing.due()


def test_only_the_epochs_in_a_checkpoint_are_told_as_kept(network, parts, preprocess, recipe, tmp_path, monkeypatch):
    written: list[bool] = []

    def slow(folder: Path, state: dict) -> None:
        written.append(True)
        monkeypatch.setattr(loop.Spacing, "due", lambda self: False)

    monkeypatch.setattr(loop, "save_checkpoint", slow)
    seen: list[int] = []

    def interrupt(count: int) -> None:
        if count == 8:  # of 3 steps an epoch: in the third
            signal.raise_signal(signal.SIGINT)

    watched = _Watched(parts[0], seen, interrupt), parts[1]
    with pytest.raises(KeyboardInterrupt, match=r"^test: 1 of 3 epochs are finished and kept$"):
        run(network, watched, preprocess, recipe, checkpoints=tmp_path)
    assert len(written) == 1


def test_an_interruption_tells_how_many_epochs_are_kept(network, parts, preprocess, recipe, tmp_path):
    seen: list[int] = []

    def interrupt(count: int) -> None:
        if count == 5:  # of 3 steps an epoch
            signal.raise_signal(signal.SIGINT)

    watched = _Watched(parts[0], seen, interrupt), parts[1]
    with (
        pytest.raises(KeyboardInterrupt, match=r"^test: 1 of 3 epochs are finished and kept$"),
        checkpoint_folder(tmp_path, {"a": 1}) as folder,
    ):
        run(network, watched, preprocess, recipe, checkpoints=folder)
    assert (folder / "checkpoint.pt").exists()


def test_a_pruner_trains_by_finetunes_recipe_with_its_own_budget(recipe):
    own = recipe_for(recipe, Continued(method="continued", epochs=7, learning_rate_factor=0.5))
    assert own == recipe.model_copy(update={"epochs": 7, "learning_rate": 0.0025, "muon_learning_rate": 0.01})
    assert steps_in(own, 100) == 21


def test_a_finished_training_is_kept_until_another_of_the_same_entry_begins(tmp_path):
    with checkpoint_folder(tmp_path, {"a": 1}) as first:
        pass
    with pytest.raises(RuntimeError), checkpoint_folder(tmp_path, {"a": 2}) as killed:
        raise RuntimeError
    assert not first.exists()
    with checkpoint_folder(tmp_path, {"a": 3}):
        pass
    assert killed.exists()  # unfinished work is never thrown away


def test_a_broken_checkpoint_is_named_and_training_starts_again(network, parts, preprocess, recipe, tmp_path, capsys):
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        (folder / "checkpoint.pt").write_bytes(b"half a checkpoint")
        trained = run(network, parts, preprocess, recipe, checkpoints=folder)
    assert len(trained.curve) == recipe.epochs
    assert "checkpoint.pt is broken" in capsys.readouterr().out


def test_a_checkpoint_of_something_else_is_named_and_training_starts_again(
    network, parts, preprocess, recipe, tmp_path, capsys
):
    with checkpoint_folder(tmp_path, {"a": 1}) as folder:
        torch.save({"epochs": [0, 2]}, folder / "checkpoint.pt")
        trained = run(network, parts, preprocess, recipe, checkpoints=folder)
    assert len(trained.curve) == recipe.epochs
    assert "checkpoint.pt is broken (it holds no chosen, curve, run): starting again" in capsys.readouterr().out


def test_a_full_disk_under_a_checkpoint_is_told_with_its_path(tmp_path, monkeypatch):
    def full(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1038464 vs 1038352")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}/checkpoint.pt: .*make room, then run again$"):
        save_checkpoint(tmp_path, {})
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(UserError, match="make room, then run again; the checkpoint before it is kept"):
        save_checkpoint(tmp_path, {})


def test_an_input_size_that_the_network_does_not_take_is_a_clear_error(network, parts, recipe):
    with pytest.raises(UserError, match="does not take input_size 8"):
        run(network, parts, Preprocess([0.5] * 3, [0.25] * 3, 8), recipe)


def test_a_network_with_a_three_dimensional_convolution_trains(parts, preprocess, recipe):
    class Volume(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.volume = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(1, 2, 3)
            self.head = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.volume(self.first(x).unsqueeze(1)).mean((2, 3, 4)))

    assert run(Volume(), parts, preprocess, recipe.model_copy(update={"epochs": 1})).epoch == 1


def test_the_first_part_of_a_training_sees_other_sizes_and_validation_does_not(network, parts, preprocess, recipe):
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, inputs[0].shape[2])))
    early = recipe.model_copy(update={"epochs": 3, "early_input_size": 48, "early_fraction": 0.5})
    run(network, parts, preprocess, early)
    steps = steps_in(early, len(parts[0]))
    assert [size for training, size in seen if training] == [48] * -(-steps // 2) + [32] * (steps // 2)
    assert {size for training, size in seen[2:] if not training} == {32}  # after a look at either size
    budget = Continued(method="continued", epochs=1, learning_rate_factor=1)
    assert recipe_for(early, budget).early_input_size is None


def test_an_early_input_size_that_the_network_does_not_take_is_a_clear_error(network, parts, preprocess, recipe):
    with pytest.raises(UserError, match=r"does not take finetune\.early_input_size 8"):
        run(network, parts, preprocess, recipe.model_copy(update={"early_input_size": 8}))


def test_running_out_of_memory_is_a_clear_error(network, parts, preprocess, recipe, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(loop, "Augmentation", lambda *_: no_memory)
    with pytest.raises(UserError, match="batch_size 32 does not fit into memory"):
        run(network, parts, preprocess, recipe)


def test_finding_the_number_of_classes_leaves_running_statistics_alone(parts, preprocess):
    from torch import nn

    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert loop._classes(network, 8, "t") == 2
    assert network.training
    assert torch.equal(network[1].running_mean, torch.zeros(4))


class StatelessSgd:
    """Plain gradient steps: nothing is carried from one step to the next but the weights."""

    def __init__(self, network, recipe) -> None:
        self.parameters, self.peak, self.rate = list(network.parameters()), recipe.learning_rate, 0.0

    def set_factor(self, factor: float) -> None:
        self.rate = self.peak * factor

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters:
            parameter -= self.rate * parameter.grad

    def state_dict(self) -> list:
        return []

    def load_state_dict(self, states: list) -> None:
        assert states == []


class _Indices:
    """Images that remember which of them were asked for, batch by batch."""

    def __init__(self, images: np.ndarray, seen: list) -> None:
        self.images, self.seen = images, seen

    def __getitem__(self, index):
        self.seen.append(tuple(index))
        return self.images[index]


def rows_of(curve: list[dict]) -> list[dict]:
    timing = ("seconds", "images_per_second")
    return [{name: value for name, value in row.items() if name not in timing} for row in curve]


def test_two_phases_take_the_very_steps_of_one_training(network, parts, preprocess, recipe, monkeypatch):
    monkeypatch.setattr(loop, "Optimizers", StatelessSgd)  # an optimizer's state is the one thing that begins afresh
    recipe = recipe.model_copy(update={"epochs": 4, "ema_decay": 0.0, "learning_rate": 0.3})

    def phase(network, epochs):
        seen: list[tuple] = []
        watched = Part(_Indices(parts[0].images, seen), parts[0].labels)
        trained = run(network, (watched, parts[1]), preprocess, recipe, epochs=epochs, keep="last")
        return trained, seen

    whole, order = phase(copy.deepcopy(network), None)
    first, first_order = phase(copy.deepcopy(network), (0, 1))
    assert (first.epoch, len(first.curve)) == (1, 1)
    second, second_order = phase(copy.deepcopy(first.network), (1, 4))
    assert second.epoch == whole.epoch == 4
    assert first_order + second_order == order
    assert len(set(order)) == len(order) == 12
    assert rows_of(first.curve + second.curve) == rows_of(whole.curve)
    assert [row["epoch"] for row in first.curve + second.curve] == [1, 2, 3, 4]
    assert weights(second.network) == weights(whole.network) != weights(first.network)


class Snapshots:
    """A constraint that only looks on: the network's weights after each step."""

    def __init__(self, network) -> None:
        self.network, self.taken = network, {}

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int) -> None:
        self.taken[step] = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def project(self, network) -> None: ...

    def met_after(self, step: int) -> bool:
        return True

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


def test_the_last_weights_are_those_from_which_training_would_go_on(network, parts, preprocess, recipe):
    whole = copy.deepcopy(network)
    snapshots = Snapshots(whole)
    run(whole, parts, preprocess, recipe, constraint=snapshots)
    first = run(network, parts, preprocess, recipe, epochs=(0, 2), keep="last")
    assert first.epoch == 2
    assert all(torch.equal(first.network.state_dict()[name], tensor) for name, tensor in snapshots.taken[5].items())


def test_the_average_of_a_later_phase_begins_at_the_given_network(network, parts, preprocess, recipe):
    snapshots = Snapshots(network)
    trained = run(network, parts, preprocess, recipe, constraint=snapshots, epochs=(2, 3))
    assert sorted(snapshots.taken) == [6, 7, 8]
    average = snapshots.taken[6]
    for seen, step in [(1, 7), (2, 8)]:
        decay = min(recipe.ema_decay, (1 + seen) / (10 + seen))
        average = {name: decay * average[name] + (1 - decay) * new for name, new in snapshots.taken[step].items()}
    found = trained.network.state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in average.items())


@pytest.mark.parametrize("keep", ["best", "last"])
def test_an_interrupted_phase_goes_on_in_its_own_folder(
    network, parts, preprocess, recipe, tmp_path, monkeypatch, capsys, keep
):
    def phase(**more):
        return run(copy.deepcopy(network), parts, preprocess, recipe, epochs=(1, 3), keep=keep, **more)

    whole, save = phase(), loop.save_checkpoint

    def killed(folder, state):
        save(folder, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        phase(checkpoints=tmp_path)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    capsys.readouterr()
    resumed = phase(checkpoints=tmp_path)
    assert capsys.readouterr().out.startswith("test: epoch 3/3 ")
    again = phase(checkpoints=tmp_path)
    for trained in (resumed, again):
        assert weights(trained.network) == weights(whole.network)
        assert rows_of(trained.curve) == rows_of(whole.curve)
        assert trained.epoch == whole.epoch
    with pytest.raises(ValueError, match=r"belongs to epochs \[1, 3\]"):
        run(network, parts, preprocess, recipe, checkpoints=tmp_path)


def test_the_last_epoch_of_a_phase_must_end_on_the_constraint(network, parts, preprocess, recipe):
    class Later(Snapshots):
        def met_after(self, step: int) -> bool:
            return step >= 6

    with pytest.raises(UserError, match="no epoch ended with the pruning target met"):
        run(network, parts, preprocess, recipe, constraint=Later(network), epochs=(0, 2), keep="last")


@pytest.mark.parametrize("epochs", [(0, 4), (2, 2), (-1, 2)])
def test_epochs_outside_the_recipe_are_refused(network, parts, preprocess, recipe, epochs):
    with pytest.raises(ValueError, match="do not lie within the recipe's 3"):
        run(network, parts, preprocess, recipe, epochs=epochs)


def test_a_process_without_validation_images_leaves_them_to_the_others(network, parts, preprocess, recipe, monkeypatch):
    few = Part(parts[1].images[:1], parts[1].labels[:1])
    settings = (network, parts[0], preprocess, recipe, torch.device("cpu"), 0, "toy", None, None, "learning_rate")
    run = _Run(*settings)
    alone = run.predict(network, few, autocast=False)
    monkeypatch.setattr(processes, "count", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(run.predict(network, few, autocast=False))
    assert not shares[0].any()
    np.testing.assert_array_equal(shares[0] + shares[1], alone)
