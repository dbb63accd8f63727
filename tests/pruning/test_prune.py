"""The prune stage on a tiny data set: from a dense artifact to a pruned one."""

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages import prune
from stages.artifacts.artifact import Description, LayerStorage, load_artifact, read_description, save_artifact
from stages.common import paths
from stages.common.errors import UserError
from stages.networks.build import NetworkSpec, build_network
from stages.networks.layer_norm import CountingLayerNorm
from stages.pruning.costs import costs_of, output_positions
from stages.training.loop import CURVE_COLUMNS

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20], "ls_init_value": 0.1, "drop_path_rate": 0.2}
PARAMS = {
    "base": {"seed": 3, "device": "cpu", "threads": 1},
    "data": {"name": "toy", "source": "digits", "image_size": 16, "validation_fraction": 0.2},
    "finetune": {
        "epochs": 1,
        "batch_size": 8,
        "optimizer": "adamw",
        "learning_rate": 0.02,
        "crop_padding": 1,
        "precision": "float32",
        "average_decay": 0.5,
    },
    "models": {"toy": {"library": "timm", "architecture": "convnext_atto", "arguments": ARGUMENTS, "input_size": 32}},
    "prune": {
        "none": {"method": "none"},
        "none_continued": {"method": "none_continued", "epochs": 2, "learning_rate_factor": 0.5},
        "oto": {"method": "oto", "epochs": 2, "learning_rate_factor": 0.5, "group_sparsity": 0.5},
        "dhspg": {
            "method": "oto",
            "optimizer": "dhspg",
            "epochs": 2,
            "learning_rate_factor": 0.5,
            "macs_reduction": 0.6,
            "divisible_by": 4,
        },
        "l1": {"method": "l1_unstructured", "epochs": 2, "learning_rate_factor": 0.5, "sparsity": 0.8},
        "random": {"method": "random_unstructured", "epochs": 2, "learning_rate_factor": 0.5, "sparsity": 0.8},
    },
    "quantize": {"fp32": {"method": "fp32"}},
}
PARAMS["prunings"] = {f"toy-{pruner}": {"model": "toy", "pruner": pruner} for pruner in PARAMS["prune"]}
PARAMS["variants"] = {"toy-none-fp32": {"pruning": "toy-none", "quantizer": "fp32"}}


def write_images(folder: Path) -> dict[str, str]:
    """Two classes, bright at the top or at the bottom; no test part: pruning never opens it."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    counts = {"train": 96, "validation": 24, "test": 0}
    for part in ("train", "validation"):
        labels = np.arange(counts[part]) % 2
        images = generator.integers(0, 120, (counts[part], 16, 16, 3))
        for image, label in zip(images, labels, strict=True):
            image[8 * label : 8 * label + 8] += 100
        np.save(folder / f"{part}_images.npy", images.astype(np.uint8))
        np.save(folder / f"{part}_labels.npy", labels.astype(np.int64))
    info = {
        "name": "toy",
        "source": "made up",
        "licence": "none",
        "image_size": 16,
        "classes": ["top", "bottom"],
        "counts": counts,
        "mean": [0.4] * 3,
        "std": [0.2] * 3,
        "files": {},
        "sha256": "0" * 64,
        "unreadable": [],
    }
    (folder / "images.json").write_text(json.dumps(info))
    return {"name": "toy", "sha256": "0" * 64}


def dense_description(data: dict[str, str]) -> Description:
    return Description(
        name="toy",
        stage="finetune",
        model="toy",
        network=NetworkSpec("timm", "convnext_atto", ARGUMENTS, 2),
        classes=["top", "bottom"],
        image_size=16,
        input_size=32,
        mean=[0.4] * 3,
        std=[0.2] * 3,
        data=data,
        parameters={},
        seed=3,
        metrics={"validation_top1": 0.5, "epoch": 1},
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prune")
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    description = dense_description(write_images(folder / paths.IMAGES))
    torch.manual_seed(0)
    save_artifact(folder / paths.dense("toy"), build_network(description.network), description)
    return folder


@pytest.fixture
def workspace(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, key: str) -> tuple[torch.nn.Module, Description]:
    monkeypatch.setattr(sys, "argv", ["prune", key])
    prune.main()
    return load_artifact(paths.pruned(key))


def curve_of(key: str) -> list[list[str]]:
    with paths.pruned_curve(key).open() as file:
        return list(csv.reader(file))


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def outputs_of(key: str) -> set[str]:
    artifact = paths.pruned(key)
    return {str(artifact / "model.json"), str(artifact / "model.safetensors"), str(paths.pruned_curve(key))}


def test_none_copies_the_dense_tensors(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-none")
    dense, parent = load_artifact(paths.dense("toy"))
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert (description.name, description.stage, description.model) == ("toy-none", "prune", "toy")
    assert description.parent["name"] == "toy"
    assert description.tensors == parent.tensors
    assert description.metrics["validation_top1"] == 0.5
    assert description.parameters == {"method": "none"}
    assert curve_of("toy-none") == [list(CURVE_COLUMNS)]


def test_none_continued_trains_the_whole_network(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-none_continued")
    dense, parent = load_artifact(paths.dense("toy"))
    assert description.network == replace(parent.network, layer_scale_folded=True)
    assert not torch.equal(network.head.fc.weight, dense.head.fc.weight)
    assert description.metrics["validation_top1"] > 0.9
    folded = sum(ARGUMENTS["dims"])  # one block of each width: its layer scale is in the layer before it now
    assert description.metrics["params"] == description.metrics["params_dense"] - folded
    assert len(curve_of("toy-none_continued")) == 3


def test_oto_leaves_a_physically_smaller_network_and_no_stray_file(workspace, monkeypatch):
    before = files_below(workspace)
    network, description = run(monkeypatch, "toy-oto")
    metrics = description.metrics
    assert metrics["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert metrics["channels"] == metrics["channels_dense"] - round(0.5 * metrics["channels_dense"])
    assert metrics["params"] == sum(p.numel() for p in network.parameters()) < 0.8 * metrics["params_dense"]
    assert metrics["validation_top1"] > 0.8
    assert description.network.layer_scale_folded
    assert description.network.widths
    counting = {name for name, module in network.named_modules() if isinstance(module, CountingLayerNorm)}
    assert counting == set(description.network.layer_norm_widths)
    assert description.parameters["group_sparsity"] == 0.5
    made = files_below(workspace) - before
    assert {file for file in made if not file.startswith(".scratch")} == outputs_of("toy-oto")


def test_dhspg_leaves_a_network_of_the_macs_asked_for(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-dhspg")
    positions = output_positions(network, 32)
    macs = sum(network.get_parameter(name).numel() * times for name, times in positions.items())
    dense, _ = load_artifact(paths.dense("toy"))
    dense_macs = costs_of(dense, [], 32).macs_dense
    assert 0.2 * dense_macs < macs <= 0.4 * dense_macs
    assert description.metrics["validation_top1"] > 0.8
    assert description.network.widths
    assert all(value % 4 == 0 for size in description.network.widths.values() for value in size.values() if value > 3)
    assert description.parameters["optimizer"] == "dhspg"


@pytest.mark.parametrize("pruner", ["l1", "random"])
def test_unstructured_zeros_reach_the_artifact(workspace, monkeypatch, pruner):
    network, description = run(monkeypatch, f"toy-{pruner}")
    weights = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == sum(round(0.8 * w.numel()) for w in weights)
    assert description.metrics["sparsity"] == zeros / total
    dense = read_description(paths.dense("toy")).network
    assert description.network == replace(dense, layer_scale_folded=True)


def test_training_killed_on_the_way_goes_on_to_the_same_artifact(workspace, monkeypatch):
    _, whole = run(monkeypatch, "toy-oto")
    shutil.rmtree(paths.pruned("toy-oto"))
    shutil.rmtree(paths.SCRATCH)  # which keeps the finished training
    from stages.pruning.hesso import Hesso

    forget = Hesso.after_step

    def killed(self, step):
        if step == 15:
            raise KeyboardInterrupt
        forget(self, step)

    monkeypatch.setattr(Hesso, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "toy-oto")
    assert not paths.pruned("toy-oto").exists()
    monkeypatch.setattr(Hesso, "after_step", forget)
    _, resumed = run(monkeypatch, "toy-oto")
    assert resumed.tensors == whole.tensors
    assert resumed.metrics == whole.metrics


def test_cut_that_changes_the_output_is_not_saved(workspace, monkeypatch):
    cut = prune.cut_channels

    def wrong(network, spec, groups, pruned):
        subnet, spec = cut(network, spec, groups, pruned)
        subnet.head.fc.bias.data += 1
        return subnet, spec

    monkeypatch.setattr(prune, "cut_channels", wrong)
    with pytest.raises(UserError, match="toy-oto: after cutting, the logits on random inputs differ by"):
        run(monkeypatch, "toy-oto")
    assert not paths.pruned("toy-oto").exists()


@pytest.mark.parametrize("fault", ["quantized", "pruned", "NaN", "other images", "unknown key"])
def test_unfit_parent_is_refused_and_the_previous_artifact_kept(workspace, monkeypatch, fault):
    run(monkeypatch, "toy-none")
    previous = paths.pruned("toy-none").joinpath("model.json").read_bytes()
    folder = paths.dense("toy")
    network, description = load_artifact(folder)
    match fault:
        case "quantized":
            description.layers = {"head.fc": LayerStorage(8, 8, "symmetric_per_channel")}
        case "pruned":
            description.network.widths["head.fc"] = {"in_features": 20, "out_features": 2}
        case "NaN":
            network.head.fc.weight.data[0, 0] = torch.nan
        case "other images":
            description.data = {"name": "toy", "sha256": "1" * 64}
    monkeypatch.setattr(prune, "load_artifact", lambda _: (network, description))
    message = {
        "quantized": "is quantized already",
        "pruned": "is pruned already",
        "NaN": r"head\.fc\.weight holds NaN",
        "other images": "was made from other images",
        "unknown key": "'toy-nothing': give one entry of prunings: toy-",
    }[fault]
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "toy-nothing" if fault == "unknown key" else "toy-none")
    assert paths.pruned("toy-none").joinpath("model.json").read_bytes() == previous
