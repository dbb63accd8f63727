"""Two gloo processes on this machine, started by torchrun as users start them."""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from safetensors.torch import load_file
from stages.training.loop import steps_in, train
from test_loop import BASE
from toy_project import PARAMS, pruned_project

import stages
from stages.common import paths
from stages.networks.layer_scale import fold_layer_scale
from stages.params.base import Base
from stages.params.pruners import Oto
from stages.pruning.costs import costs_of
from stages.pruning.dhspg import Dhspg
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import channel_groups
from stages.training import distributed
from stages.training.host import prepare_host

CASES = {"sgd": 1e-3, "adamw": 1e-2, "muon": 1e-2, "hesso": 1e-3, "dhspg": 1e-3}
"""Largest difference as a share of a tensor's largest entry: Adam divides small gradients by themselves. Muon makes a
whole step of the least singular direction, rounding errors too, so that only its losses are compared."""


def trained(case: str, network, parts, preprocess, recipe) -> dict[str, torch.Tensor]:
    """Weights, validation figures and losses of one training without dropout, whose draws are each process's own."""
    optimizer = case if case in ("sgd", "adamw", "muon") else "sgd"
    rate = 0.02 if optimizer == "sgd" else 0.002  # Adam's first steps make a whole step of a rounding error
    settings = {"optimizer": optimizer, "learning_rate": rate, "trivial_augment": 0.3}
    recipe = recipe.model_copy(update=settings)
    constraint = None
    if case in ("hesso", "dhspg"):
        fold_layer_scale(network)
        groups = channel_groups(network, 32)
        more = {"penalty": 1.0} if case == "dhspg" else {"pruning_periods": 2}
        pruner = Oto(
            method="oto",
            optimizer=case,
            epochs=3,
            learning_rate_factor=1.0,
            group_sparsity=0.5,
            end_fraction=0.7,
            **more,
        )
        constraint_of = {"hesso": Hesso, "dhspg": lambda *given: Dhspg(*given, lambda step: rate)}[case]
        steps = steps_in(recipe, len(parts[0]))
        constraint = constraint_of(network, groups, costs_of(network, groups, 32), pruner, steps, "pruners.oto")
    found = train(
        network, *parts, preprocess, recipe, base=BASE, seed=3, title=case, constraint=constraint, keep="last"
    )
    figures = [[row["training_loss"], row["validation_loss"], row["validation_top1"]] for row in found.curve]
    return found.network.state_dict() | {"figures": torch.tensor(figures)}


def _work(rank: int, folder: str, given: dict) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    given = copy.deepcopy(given)  # weights come in memory that both processes share
    torch.save({case: trained(case, **arguments) for case, arguments in given.items()}, f"{folder}/{rank}.pt")
    asked: list[int] = []
    answer = distributed.broadcast(lambda: asked.append(rank) or f"of process {rank}")
    Path(folder, f"{rank}.json").write_text(json.dumps([asked, answer]))
    dist.destroy_process_group()


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    before = torch.get_num_threads()
    try:
        prepare_host(Base(device="cpu", threads=0))
        assert torch.get_num_threads() == 3
        prepare_host(Base(device="cpu", threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def still_network(network):
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return network


def test_two_processes_take_the_steps_of_one(still_network, parts, preprocess, recipe, tmp_path):
    def given() -> dict:
        rest = {"parts": parts, "preprocess": preprocess, "recipe": recipe}
        return {case: {"network": copy.deepcopy(still_network)} | rest for case in CASES}

    alone = {case: trained(case, **arguments) for case, arguments in given().items()}
    torch.multiprocessing.spawn(_work, (str(tmp_path), given()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert answers == [[[0], "of process 0"], [[], "of process 0"]]  # work for the first alone is done once
    for case in CASES:
        for name, tensor in alone[case].items():
            assert torch.equal(first[case][name], second[case][name]), (case, name)
            if case == "muon" and name != "figures":
                continue
            scale = tensor.abs().max()
            assert (first[case][name] - tensor).abs().max() <= CASES[case] * scale, (case, name)
        moved = [alone[case][name] - tensor for name, tensor in still_network.state_dict().items() if ".norm." in name]
        assert max(change.abs().max() for change in moved) > 1e-3


@pytest.fixture
def project(tmp_path: Path) -> Path:
    pruned_project(tmp_path)
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": True, "ls_init_value": 0.5}
    shutil.copytree(tmp_path / paths.pruned("toy-none"), tmp_path / paths.dense("toy"))
    write_params(tmp_path, arguments=arguments)
    return tmp_path


def write_params(folder: Path, arguments=None, **finetune: object) -> None:
    raw = yaml.safe_load((folder / "params.yaml").read_text()) | {
        "base": {"threads": 1, "device": "cpu", "launcher": "torchrun --nproc-per-node 2"},
        "finetune": PARAMS["finetune"] | {"epochs": 2, "batch_size": 4, "precision": "float32"} | finetune,
    }
    budget = {"epochs": 4, "learning_rate_factor": 1.0}
    raw["pruners"] = {
        "none": {"method": "none"},
        "continued": {"method": "continued"} | budget,
        "oto": {"method": "oto", "group_sparsity": 0.5, "pruning_periods": 1} | budget,
    }
    raw["pruned"] = {f"toy-{name}": {"model": "toy", "pruner": name} for name in raw["pruners"]}
    searched = {"method": "searched_bits", "search": "random", "average_bits": 4.0, "evaluations": 5}
    raw["quantizers"] = {"fp32": {"method": "fp32"}, "recovered": searched | {"calibration_images": 4, "epochs": 3}}
    raw["variants"] = {f"toy-none-{name}": {"pruned": "toy-none", "quantizer": name} for name in raw["quantizers"]}
    if arguments is not None:
        raw["models"]["toy"]["arguments"] = arguments
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))


def start(folder: Path, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(stages.__file__).parents[1])},
    )


def test_a_stage_is_run_by_torchrun_and_writes_its_artifact_once(project: Path):
    process = start(project, "stages.finetune", "toy")
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert told.count("epoch 1/2") == 1
    assert load_file(project / paths.dense("toy") / "model.safetensors")
    process = start(project, "stages.prune", "toy-oto")
    told, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert told.count("epoch 4/4") == 1
    description = json.loads((project / paths.pruned("toy-oto") / "model.json").read_text())
    assert description["metrics"]["group_sparsity"] == pytest.approx(0.5, abs=0.05)


def test_a_quantizer_searches_in_one_process_and_recovers_in_all(project: Path):
    curves = []
    for launcher in ("torchrun --nproc-per-node 2", "python"):
        write_params(project, optimizer="sgd", learning_rate=0.01)
        raw = yaml.safe_load((project / "params.yaml").read_text())
        raw["base"]["launcher"] = launcher
        (project / "params.yaml").write_text(yaml.safe_dump(raw))
        process = start(project, "stages.quantize", "toy-none-recovered")
        told, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert told.count("random search") == told.count("epoch 3/3") == told.count("model.onnx") == 1
        description = json.loads((project / paths.compressed("toy-none-recovered") / "model.json").read_text())
        rows = list(csv.DictReader((project / paths.compressed_curve("toy-none-recovered")).open()))
        curves.append(([float(row["training_loss"]) for row in rows], description["search"], description["layers"]))
    (together, *found), (alone, *found_alone) = curves
    assert together == pytest.approx(alone, rel=1e-3)
    assert len(set(alone)) == 3
    assert found == found_alone


def test_what_is_wrong_in_all_processes_is_told_in_one_line(project: Path):
    write_params(project, batch_size=2)
    process = start(project, "stages.finetune", "toy")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors == (
        "error: finetune.batch_size: 2 images are not to be shared out evenly over 2 processes: make it a multiple of"
        " 4 (images are shared out by pairs, as mixing needs them)\n"
    )


def test_an_error_of_one_process_is_told_in_one_line(project: Path):
    write_params(project, epochs=2000)
    first = start(project, "stages.finetune", "toy")
    assert first.stdout.readline().startswith("finetune toy: epoch 1/2000")
    second = start(project, "stages.finetune", "toy")  # only its first process finds the folder locked
    _, errors = second.communicate(timeout=120)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert second.returncode == 2
    assert errors.startswith("error: ")
    assert "is still training this" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--nproc-per-node 0", "torchrun refuses it"),
        ("--nproc-per-node abc", "torchrun refuses it"),
        ("--nope 2", "torchrun refuses it: unrecognized arguments: --nope"),
        ("--nproc-per-node", "torchrun refuses it: argument --nproc"),
        ("--nproc-per-node 2 other.py", "other.py is not an option"),
    ],
)
def test_options_that_torchrun_does_not_take_are_told_in_one_line(project: Path, options: str, told: str):
    write_params(project)
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("torchrun --nproc-per-node 2", f"torchrun {options}"))
    process = start(project, "stages.finetune", "toy")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith(f"error: base.launcher = 'torchrun {options}': ")
    assert told in errors
    assert errors.count("\n") == 1


def test_a_process_that_is_killed_ends_the_stage_in_one_line_and_the_next_run_goes_on(project: Path):
    write_params(project, epochs=2000)
    process = start(project, "stages.finetune", "toy")
    assert process.stdout.readline().startswith("finetune toy: epoch 1/2000")
    os.kill(max(_workers(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: process ")
    assert "'torchrun --nproc-per-node 2': Signal 9 (SIGKILL) received by PID" in errors.splitlines()[-1]
    assert list((project / ".scratch/finetune/toy").glob("*/checkpoint.pt"))
    process = start(project, "stages.finetune", "toy")
    assert not process.stdout.readline().startswith("finetune toy: epoch 1/2000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.count("epochs are finished and kept") == 1


def _workers(launcher: int) -> list[int]:
    children = psutil.Process(launcher).children(recursive=True)
    return [child.pid for child in children if "stages.finetune" in child.cmdline()]


def test_a_pruner_that_trains_nothing_starts_no_processes(project: Path):
    process = start(project, "stages.prune", "toy-none")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (project / paths.pruned("toy-none") / "model.json").exists()


def test_alone_a_process_is_the_first_and_only_one(network):
    assert distributed.is_main_process()
    assert distributed.world_size() == 1
    assert distributed.data_parallel(network, torch.device("cpu")) is network
    assert distributed.all_reduce(torch.ones(2)).tolist() == [1, 1]
