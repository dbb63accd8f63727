"""Two gloo processes on this machine, started by torchrun as users start them.

Three interpreters that import torch and timm take seconds: errors are tried with a stage that imports little.
"""

import copy
import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from safetensors.torch import load_file
from torch import nn
from toy_project import PARAMS, pruned_project

import stages
from stages import prune, quantize
from stages.common import paths
from stages.common.errors import UserError
from stages.networks.reparameterize import fold_layer_scale
from stages.params.base import Base
from stages.params.pruners import Oto
from stages.pruning.costs import costs_of
from stages.pruning.dhspg import Dhspg
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import channel_groups
from stages.training import distributed
from stages.training.batches import steps_per_epoch
from stages.training.trainer import Trainer, TrainingData

LAUNCHER = "torchrun --nproc-per-node 2"
CASES = {"sgd": 1e-3, "adamw": 1e-2, "muon": 1e-2, "hesso": 1e-3, "dhspg": 1e-3}
"""Largest difference as a fraction of a tensor's largest entry: Adam divides small gradients by themselves. Muon takes
a full step along rounding errors too, so that only its losses are compared."""


def trained(case: str, network: nn.Module, parts, preprocess, recipe) -> dict[str, torch.Tensor]:
    """Weights, validation figures and losses of one training without dropout, which differs between processes."""
    optimizer = case if case in ("sgd", "adamw", "muon") else "sgd"
    rate = 0.02 if optimizer == "sgd" else 0.002  # Adam's first steps take a full step along rounding errors
    settings = {"optimizer": optimizer, "learning_rate": rate, "trivial_augment": 0.3}
    recipe = recipe.model_copy(update=settings)
    constraint = None
    if case in ("hesso", "dhspg"):
        fold_layer_scale(network)
        groups = channel_groups(network, 32)
        more = {"penalty": 1.0} if case == "dhspg" else {"pruning_periods": 2}
        budget = {"epochs": 3, "learning_rate_factor": 1.0, "group_sparsity": 0.5, "end_fraction": 0.7}
        pruner = Oto(method="oto", optimizer=case, **budget, **more)
        constraint_of = {"hesso": Hesso, "dhspg": lambda *given: Dhspg(*given, lambda step: rate)}[case]
        steps = recipe.epochs * steps_per_epoch(recipe, len(parts[0]))
        constraint = constraint_of(network, groups, costs_of(network, groups, 32), pruner, steps, "pruners.oto")
    data, settings = TrainingData(*parts, preprocess), {"seed": 3, "title": case, "constraint": constraint}
    found = Trainer(network, data, recipe, torch.device("cpu"), **settings).fit(keep="last")
    figures = [[row["training_loss"], row["validation_loss"], row["validation_top1"]] for row in found.curve]
    return found.network.state_dict() | {"figures": torch.tensor(figures)}


def _work(rank: int, folder: str, given: dict) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    given = copy.deepcopy(given)  # the weights come in memory that both processes share
    torch.save({case: trained(case, **arguments) for case, arguments in given.items()}, f"{folder}/{rank}.pt")
    computed: list[int] = []
    value = distributed.broadcast(lambda: computed.append(rank) or f"of process {rank}")
    Path(folder, f"{rank}.json").write_text(json.dumps([computed, value]))
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one(network, parts, preprocess, recipe, tmp_path):
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0

    def given() -> dict:
        rest = {"parts": parts, "preprocess": preprocess, "recipe": recipe}
        return {case: {"network": copy.deepcopy(network)} | rest for case in CASES}

    alone = {case: trained(case, **arguments) for case, arguments in given().items()}
    torch.multiprocessing.spawn(_work, (str(tmp_path), given()), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert values == [[[0], "of process 0"], [[], "of process 0"]]
    for case in CASES:
        for name, tensor in alone[case].items():
            assert torch.equal(first[case][name], second[case][name]), (case, name)
            if case == "muon" and name != "figures":
                continue
            scale = tensor.abs().max()
            assert (first[case][name] - tensor).abs().max() <= CASES[case] * scale, (case, name)
        moved = [alone[case][name] - tensor for name, tensor in network.state_dict().items() if ".norm." in name]
        assert max(change.abs().max() for change in moved) > 1e-3


@pytest.fixture
def project(tmp_path: Path) -> Path:
    pruned_project(tmp_path)
    shutil.copytree(tmp_path / paths.pruned("toy-none"), tmp_path / paths.dense("toy"))
    write_params(tmp_path)
    return tmp_path


def write_params(folder: Path, launcher: str = LAUNCHER, **finetune: object) -> None:
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "conv_mlp": True, "ls_init_value": 0.5}
    budget = {"epochs": 4, "learning_rate_factor": 1.0}
    pruners = {
        "none": {"method": "none"},
        "continued": {"method": "continued"} | budget,
        "oto": {"method": "oto", "group_sparsity": 0.5, "pruning_periods": 1} | budget,
    }
    searched = {"method": "searched_bits", "search": "random", "average_bits": 4.0, "evaluations": 5}
    quantizers = {"fp32": {"method": "fp32"}, "recovered": searched | {"calibration_images": 4, "epochs": 3}}
    raw = PARAMS | {
        "base": {"threads": 1, "device": "cpu", "launcher": launcher},
        "finetune": PARAMS["finetune"] | {"epochs": 2, "batch_size": 4, "precision": "float32"} | finetune,
        "models": {"toy": PARAMS["models"]["toy"] | {"arguments": arguments}},
        "pruners": pruners,
        "pruned": {f"toy-{name}": {"model": "toy", "pruner": name} for name in pruners},
        "quantizers": quantizers,
        "variants": {f"toy-none-{name}": {"pruned": "toy-none", "quantizer": name} for name in quantizers},
    }
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


def finish(folder: Path, *command: str) -> str:
    """The standard output of a stage that succeeds."""
    process = start(folder, *command)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def error_of(process: subprocess.Popen) -> str:
    """The one line on standard error of a stage that fails."""
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


def test_a_killed_training_names_the_process_and_resumes_to_an_artifact_written_once(project: Path):
    write_params(project, epochs=60)
    first = start(project, "stages.finetune", "toy")
    assert any(line.startswith("finetune toy: epoch 1/60") for line in first.stdout)
    workers = psutil.Process(first.pid).children(recursive=True)
    os.kill(min(child.pid for child in workers if "stages.finetune" in child.cmdline()), signal.SIGKILL)  # rank 0
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 2
    assert errors.splitlines()[-1].startswith("error: process ")
    assert f"{LAUNCHER!r}: Signal 9 (SIGKILL) received by PID" in errors.splitlines()[-1]
    out = finish(project, "stages.finetune", "toy")
    assert out.count("epoch 60/60") == 1
    assert "epoch 1/60" not in out
    assert load_file(project / paths.dense("toy") / "model.safetensors")


def test_a_pruner_under_torchrun_prints_and_writes_its_artifact_once(project: Path):
    assert finish(project, "stages.prune", "toy-oto").count("epoch 4/4") == 1
    description = json.loads((project / paths.pruned("toy-oto") / "model.json").read_text())
    assert description["metrics"]["group_sparsity"] == pytest.approx(0.5, abs=0.05)


def test_a_quantizer_searches_in_one_process_and_recovers_in_all(project: Path, monkeypatch, capsys):
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["quantize", "toy-none-recovered"])

    def result() -> tuple[list[float], dict, dict]:
        description = json.loads((paths.compressed("toy-none-recovered") / "model.json").read_text())
        rows = list(csv.DictReader(paths.compressed_curve("toy-none-recovered").open()))
        return [float(row["training_loss"]) for row in rows], description["search"], description["layers"]

    settings = {"optimizer": "sgd", "learning_rate": 0.01}
    write_params(project, **settings)
    out = finish(project, "stages.quantize", "toy-none-recovered")
    assert out.count("random search") == out.count("epoch 3/3") == out.count("model.onnx") == 1
    together, *found = result()
    write_params(project, launcher="python", **settings)
    quantize.main()
    alone, *found_alone = result()
    assert together == pytest.approx(alone, rel=1e-3)
    assert len(set(alone)) == 3
    assert found == found_alone


STAGE = """
import sys, time
from pathlib import Path
import torch
from stages.common.errors import UserError, run_stage
from stages.params.base import Base
from stages.training.checkpoint import checkpoint_folder
from stages.training.distributed import launch, process_group

def main():
    launch(Base(launcher="torchrun --nproc-per-node 2"))
    with process_group(torch.device("cpu")):
        if sys.argv[1] == "fail":
            raise UserError("wrong in every process")
        if sys.argv[1] == "crash":
            raise ValueError("unexpected")
        with checkpoint_folder(Path("scratch"), {}):
            print("working", flush=True)
            try:
                time.sleep(100)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("an epoch is kept") from None

if __name__ == "__main__":
    run_stage(main)
"""


def test_an_error_of_one_process_or_of_all_is_one_line_and_an_interruption_too(tmp_path: Path):
    (tmp_path / "stage.py").write_text(STAGE)
    assert error_of(start(tmp_path, "stage", "fail")) == "error: wrong in every process\n"
    crashed = start(tmp_path, "stage", "crash")
    _, errors = crashed.communicate(timeout=120)
    assert crashed.returncode == 1
    assert "ValueError: unexpected" in errors.splitlines()[-1]
    first = start(tmp_path, "stage", "work")
    assert first.stdout.readline() == "working\n"
    second = start(tmp_path, "stage", "work")  # only its main process finds the folder locked
    assert "is still training this" in error_of(second)
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=120)
    assert (first.returncode, out) == (130, "")
    assert errors.startswith("interrupted: an epoch is kept; ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--nproc-per-node 0", ""),
        ("--nproc-per-node abc", ""),
        ("--nope 2", "unrecognized arguments: --nope"),
        ("--nproc-per-node", "argument --nproc"),
        ("--nproc-per-node 2 other.py", "other.py is not an option"),
    ],
)
def test_options_that_torchrun_refuses_are_named(monkeypatch, options: str, reason: str):
    stage = types.ModuleType("__main__")
    stage.__spec__ = types.SimpleNamespace(name="stages.finetune")
    monkeypatch.setitem(sys.modules, "__main__", stage)
    monkeypatch.setattr(sys, "argv", ["finetune", "toy"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        with pytest.raises(UserError) as refusal:
            distributed.launch(Base(launcher=f"torchrun {options}"))
    finally:
        logging.disable(logging.NOTSET)
    assert str(refusal.value).startswith(f"base.launcher = 'torchrun {options}': torchrun refuses it: {reason}")
    assert "\n" not in str(refusal.value)


def test_a_pruner_that_trains_nothing_starts_no_processes(project: Path, monkeypatch):
    def launch(base: Base) -> None:
        raise AssertionError

    monkeypatch.chdir(project)
    monkeypatch.setattr(prune, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["prune", "toy-none"])
    prune.main()
    monkeypatch.setattr(sys, "argv", ["prune", "toy-oto"])
    with pytest.raises(AssertionError):
        prune.main()


def test_a_single_process_is_the_main_process(network):
    assert distributed.is_main_process()
    assert distributed.world_size() == 1
    assert distributed.data_parallel(network, torch.device("cpu")) is network
    assert distributed.all_reduce(torch.ones(2)).tolist() == [1, 1]
