"""The prune stage on a tiny data set: from a dense artifact to a pruned one."""

import copy
import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from safetensors.torch import load_file

from stages import prune
from stages.artifacts.artifact import load_artifact, save_artifact
from stages.artifacts.description import Description, LayerStorage, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.networks.build import NetworkSpec, build_network
from stages.networks.norms import FixedDivisorLayerNorm
from stages.params.load import load_params
from stages.params.quantizers import Fp32, Int8Dynamic
from stages.params.variants import Variant
from stages.params.whole import Params
from stages.pruning import methods, session
from stages.pruning.costs import costs_of
from stages.quantize import compress
from stages.training.trainer import CURVE_COLUMNS, Trainer

ARGUMENTS = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20], "ls_init_value": 0.1, "drop_path_rate": 0.2}
BUDGET = {"epochs": 2, "learning_rate_factor": 0.5}
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
        "ema_decay": 0.5,
    },
    "models": {"toy": {"library": "timm", "architecture": "convnext_atto", "arguments": ARGUMENTS, "input_size": 32}},
    "pruners": {
        "none": {"method": "none"},
        "continued": {"method": "continued", **BUDGET},
        "oto": {"method": "oto", **BUDGET, "group_sparsity": 0.5},
        "l1": {"method": "l1_unstructured", **BUDGET, "sparsity": 0.8},
        "random": {"method": "random_unstructured", **BUDGET, "sparsity": 0.8},
        "two_of_four": {
            "method": "l1_unstructured",
            "epochs": 2,
            "learning_rate_factor": 0.5,
            "sparsity": 0.5,
            "pattern": "2:4",
        },
        "taught": {"method": "continued", **BUDGET, "distillation": 0.5},
        "gradual": {
            "method": "l1_unstructured",
            "epochs": 2,
            "learning_rate_factor": 0.5,
            "distillation": 0.5,
            "sparsity": 0.8,
            "schedule": "gradual",
            "end_fraction": 0.9,
        },
        "plain": BUDGET | {"method": "oto", "group_sparsity": 0.8, "layer_norm": "plain"},
        "dhspg": BUDGET | {"method": "oto", "optimizer": "dhspg", "macs_reduction": 0.5, "divisible_by": 4},
        "cut_at_random": BUDGET | {"method": "random_structured", "macs_reduction": 0.5},
        "narrow": BUDGET | {"method": "small_dense", "macs_reduction": 0.5},
        "magnitude": BUDGET | {"method": "depgraph", "macs_reduction": 0.5},
        "lasso": BUDGET | {"method": "depgraph", "importance": "group_lasso", "macs_reduction": 0.5},
    },
    "quantizers": {"fp32": {"method": "fp32"}},
}
PARAMS["pruned"] = {f"toy-{pruner}": {"model": "toy", "pruner": pruner} for pruner in PARAMS["pruners"]}
PARAMS["variants"] = {"toy-none-fp32": {"pruned": "toy-none", "quantizer": "fp32"}}


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
    folder = tmp_path_factory.mktemp("pruners")
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
    monkeypatch.setattr(sys, "argv", ["pruners", key])
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
    assert (description.name, description.stage, description.model) == ("toy-none", "pruners", "toy")
    assert description.parent["name"] == "toy"
    assert description.tensors == parent.tensors
    assert description.metrics["validation_top1"] == 0.5
    assert description.parameters == {"method": "none"}
    assert curve_of("toy-none") == [list(CURVE_COLUMNS)]


def test_continued_trains_the_whole_network(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-continued")
    dense, parent = load_artifact(paths.dense("toy"))
    assert description.network == replace(parent.network, layer_scale_folded=True)
    assert not torch.equal(network.head.fc.weight, dense.head.fc.weight)
    assert description.metrics["validation_top1"] > 0.9
    folded = sum(ARGUMENTS["dims"])  # one block of each width: its layer scale is in the layer before it now
    assert description.metrics["params"] == description.metrics["params_dense"] - folded
    assert len(curve_of("toy-continued")) == 3


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
    counting = {name for name, module in network.named_modules() if isinstance(module, FixedDivisorLayerNorm)}
    assert counting == set(description.network.layer_norm_widths)
    assert description.parameters["group_sparsity"] == 0.5
    made = files_below(workspace) - before
    assert {file for file in made if not file.startswith(".scratch")} == outputs_of("toy-oto")


def test_dhspg_keeps_widths_that_hardware_likes(workspace, monkeypatch):
    _, description = run(monkeypatch, "toy-dhspg")
    assert description.network.widths
    assert all(value % 4 == 0 for size in description.network.widths.values() for value in size.values() if value > 3)
    assert description.parameters["optimizer"] == "dhspg"


@pytest.mark.parametrize(("penalty", "half_space"), [(1e-3, 0.0), (50.0, 0.9)])
def test_dhspg_tells_how_many_channels_its_projection_took_and_what_to_raise(
    workspace, monkeypatch, capsys, penalty, half_space
):
    raw = copy.deepcopy(PARAMS)
    raw["pruners"]["dhspg"] |= {"penalty": penalty, "half_space": half_space}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    _, description = run(monkeypatch, "toy-dhspg")
    projected = description.metrics["channels_projected"]
    redundant = description.metrics["channels_dense"] - description.metrics["channels"]
    advice = f"projection took {projected} of {redundant} redundant channels"
    assert (projected < redundant / 2) == (penalty < 1) == (advice in capsys.readouterr().out)
    assert 0 <= projected <= redundant


def test_the_cut_of_oto_changes_nothing_and_training_goes_on_behind_it(workspace, monkeypatch):
    _, description = run(monkeypatch, "toy-oto")
    metrics = description.metrics
    assert metrics["validation_top1_cut"] == metrics["validation_top1_uncut"]
    assert metrics["cut_difference"] < 1e-4
    assert metrics["epoch"] == 2  # the second epoch is the cut network's
    assert [row[0] for row in curve_of("toy-oto")[1:]] == ["1", "2"]


def test_plain_layer_norm_tells_the_jump_that_it_causes(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-plain")
    assert description.metrics["cut_difference"] > 1e-3
    assert description.network.layer_norm == "plain"
    assert not any(isinstance(module, FixedDivisorLayerNorm) for module in network.modules())
    assert description.metrics["validation_top1"] > 0.8


@pytest.mark.parametrize("pruner", ["oto", "lasso"])
def test_pruning_to_the_last_epoch_is_refused_where_the_cut_needs_recovery(workspace, monkeypatch, pruner):
    raw = copy.deepcopy(PARAMS)
    raw["pruners"][pruner] |= {"end_fraction": 0.9, "layer_norm": "plain"}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match=rf"pruners\.{pruner}\.end_fraction = 0.9: pruning takes all 2 epochs"):
        run(monkeypatch, f"toy-{pruner}")


def test_oto_may_prune_to_the_last_epoch(workspace, monkeypatch):
    raw = copy.deepcopy(PARAMS)
    raw["pruners"]["oto"]["end_fraction"] = 1.0
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    _, description = run(monkeypatch, "toy-oto")
    assert description.metrics["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert description.metrics["epoch"] == 2
    assert len(curve_of("toy-oto")) == 3


@pytest.mark.parametrize("pruner", ["dhspg", "cut_at_random", "magnitude", "lasso", "narrow"])
def test_every_structured_pruner_meets_its_target_in_macs(workspace, monkeypatch, pruner):
    network, description = run(monkeypatch, f"toy-{pruner}")
    dense, _ = load_artifact(paths.dense("toy"))
    left = costs_of(network, [], 32).macs_dense / costs_of(dense, [], 32).macs_dense
    assert 0.3 < left <= 0.5
    assert description.metrics["validation_top1"] > 0.7
    assert description.network.layer_norm == ("exact" if pruner in ("dhspg", "cut_at_random") else "plain")


def test_removal_at_random_is_exact_and_leaves_the_whole_budget_to_training(workspace, monkeypatch):
    _, description = run(monkeypatch, "toy-cut_at_random")
    assert description.metrics["cut_difference"] < 1e-4
    assert len(curve_of("toy-cut_at_random")) == 3


def test_removal_at_random_takes_other_channels_under_another_seed(workspace, monkeypatch):
    first, _ = run(monkeypatch, "toy-cut_at_random")
    paths.PARAMS.write_text(yaml.safe_dump(PARAMS | {"base": PARAMS["base"] | {"seed": 4}}))
    second, _ = run(monkeypatch, "toy-cut_at_random")
    assert [t.shape for t in first.state_dict().values()] != [t.shape for t in second.state_dict().values()]


def test_small_dense_is_narrower_everywhere_and_trains_for_both_budgets(workspace, monkeypatch):
    network, description = run(monkeypatch, "toy-narrow")
    dense, _ = load_artifact(paths.dense("toy"))
    shares = [
        len(narrow.weight) / len(wide.weight)
        for (name, narrow), wide in zip(network.named_modules(), dense.modules(), strict=True)
        if isinstance(narrow, torch.nn.Conv2d | torch.nn.Linear) and name != "head.fc"
    ]
    assert max(shares) - min(shares) < 0.15
    assert len(curve_of("toy-narrow")) - 1 == PARAMS["finetune"]["epochs"] + 2
    assert "cut_difference" not in description.metrics


def test_a_target_that_cannot_be_met_names_the_nearest_that_can(workspace, monkeypatch):
    raw = copy.deepcopy(PARAMS)
    for pruner in ("dhspg", "cut_at_random", "magnitude", "narrow"):
        raw["pruners"][pruner]["macs_reduction"] = 0.9999
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    for pruner in ("dhspg", "cut_at_random", "magnitude", "narrow"):
        with pytest.raises(UserError, match=rf"pruners\.{pruner}\.macs_reduction = 0.9999: at most 0\.[6-9]"):
            run(monkeypatch, f"toy-{pruner}")


def test_a_target_under_one_unit_of_channels_is_told_to_remove_nothing(workspace, monkeypatch, capsys):
    raw = copy.deepcopy(PARAMS)
    del raw["pruners"]["cut_at_random"]["macs_reduction"]
    raw["pruners"]["cut_at_random"] |= {"group_sparsity": 0.001}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    run(monkeypatch, "toy-cut_at_random")
    told = "nothing was removed: prune.cut_at_random.group_sparsity = 0.001 is less than one unit of channels"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("pruner", ["oto", "magnitude", "lasso"])
def test_a_target_of_zero_removes_nothing_and_is_the_control(workspace, monkeypatch, pruner):
    raw = copy.deepcopy(PARAMS)
    raw["pruners"][pruner] |= {"macs_reduction": 0.0}
    raw["pruners"][pruner].pop("group_sparsity", None)
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    _, description = run(monkeypatch, f"toy-{pruner}")
    _, control = run(monkeypatch, "toy-continued")
    assert description.tensors == control.tensors
    assert description.network.widths == {}
    assert description.metrics["group_sparsity"] == 0


def test_the_lassos_target_is_refused_before_any_training(workspace, monkeypatch):
    raw = copy.deepcopy(PARAMS)
    raw["pruners"]["lasso"]["macs_reduction"] = 0.9999
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(session, "train", lambda *_, **__: pytest.fail("it trained first"))
    with pytest.raises(UserError, match=r"prune\.lasso\.macs_reduction = 0\.9999: at most 0\.9"):
        run(monkeypatch, "toy-lasso")


def test_depgraph_tells_its_channels(workspace, monkeypatch):
    _, description = run(monkeypatch, "toy-magnitude")
    metrics = description.metrics
    assert metrics["channels_dense"] > metrics["channels"] > 0
    assert metrics["group_sparsity"] == pytest.approx(1 - metrics["channels"] / metrics["channels_dense"])


def test_distillation_changes_what_is_learned(workspace, monkeypatch):
    plain, _ = run(monkeypatch, "toy-continued")
    taught, description = run(monkeypatch, "toy-taught")
    assert not torch.equal(plain.head.fc.weight, taught.head.fc.weight)
    assert description.parameters["distillation"] == 0.5


def test_the_teacher_is_the_dense_parent_as_it_came(workspace, monkeypatch):
    teachers = []

    def watched(network, *args, distillation, **more):
        teachers.append((distillation.teacher, {k: v.clone() for k, v in distillation.teacher.state_dict().items()}))
        return train(network, *args, distillation=distillation, **more)

    train = session.train
    monkeypatch.setattr(session, "train", watched)
    run(monkeypatch, "toy-gradual")
    [(teacher, before)], (dense, _) = teachers, load_artifact(paths.dense("toy"))
    assert before.keys() == teacher.state_dict().keys() == dense.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(before[name], tensor)
        assert torch.equal(teacher.state_dict()[name], tensor)


@pytest.mark.parametrize("pruner", ["l1", "random", "gradual"])
def test_unstructured_zeros_reach_the_artifact(workspace, monkeypatch, pruner):
    network, description = run(monkeypatch, f"toy-{pruner}")
    weights = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == sum(round(0.8 * w.numel()) for w in weights)
    assert description.metrics["sparsity"] == zeros / total
    dense = read_description(paths.dense("toy")).network
    assert description.network == replace(dense, layer_scale_folded=True)


def test_zeros_reach_the_artifact_with_one_sign_also_without_averaging(workspace, monkeypatch):
    raw = PARAMS | {"finetune": PARAMS["finetune"] | {"ema_decay": 0.0}}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    network, _ = run(monkeypatch, "toy-l1")
    weights = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert sum(int((w == 0).sum()) for w in weights) == sum(round(0.8 * w.numel()) for w in weights)
    assert not any((torch.signbit(w) & (w == 0)).any() for w in weights)


def test_two_of_four_leaves_what_it_does_not_fit_dense_and_says_so(workspace, monkeypatch, capsys):
    network, description = run(monkeypatch, "toy-two_of_four")
    weights = {n: m.weight for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    dense = [name for name, weight in weights.items() if not (weight == 0).any()]
    assert dense == ["stem.0", *(f"stages.{stage}.blocks.0.conv_dw" for stage in range(4))]
    assert all(2 * int((weight == 0).sum()) == weight.numel() for n, weight in weights.items() if n not in dense)
    assert description.metrics["layers_unpruned"] == 5
    zeros, total = sum(int((w == 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())
    assert description.metrics["sparsity"] == zeros / total < 0.5
    assert "toy-two_of_four: dense, since 4 does not divide their inputs: stem.0, " in capsys.readouterr().out


@pytest.mark.parametrize("quantizer", [Fp32(method="fp32"), Int8Dynamic(method="int8_dynamic")], ids=["fp32", "int8"])
def test_zeros_survive_quantization_and_export(workspace, monkeypatch, quantizer):
    pruned, description = run(monkeypatch, "toy-l1")
    folder, variant = paths.compressed("toy-l1-small"), Variant(pruned="toy-l1", quantizer="small")
    params = load_params(Params).model_copy(
        update={"quantizers": {"small": quantizer}, "variants": {"toy-l1-small": variant}}
    )
    compress(params, "toy-l1-small", paths.pruned("toy-l1"), folder, paths.IMAGES, 1)
    stored = {
        name.replace(".linear.", "."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith(".weight") and tensor.dim() > 1
    }
    zeros = 0
    for name, module in pruned.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            held = (module.weight == 0).view(stored[f"{name}.weight"].shape)
            assert (stored[f"{name}.weight"][held] == 0).all()
            zeros += int(held.sum())
    assert zeros == round(description.metrics["sparsity"] * sum(t.numel() for t in stored.values())) > 1000
    zeros_stored = sum(int((tensor == 0).sum()) for tensor in stored.values())
    assert zeros_stored == zeros if quantizer.method == "fp32" else zeros_stored >= zeros  # small ones round to 0
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    matrices = [array for array in arrays if array.ndim > 1 and array.size > 3]  # not the preprocessing's scale
    assert sum(array.size for array in matrices) == sum(tensor.numel() for tensor in stored.values())
    assert sum(int((array == 0).sum()) for array in matrices) == zeros_stored


@pytest.mark.parametrize("form", ["exact", "plain"])
def test_layer_norm_says_how_the_saved_network_counts(workspace, monkeypatch, form):
    oto = PARAMS["pruners"]["oto"] | {"layer_norm": form, "group_sparsity": 0.8}  # so that LayerNorms are cut
    changed = PARAMS | {"pruners": PARAMS["pruners"] | {"oto": oto}}
    (workspace / "params.yaml").write_text(yaml.safe_dump(changed))
    network, description = run(monkeypatch, "toy-oto")
    assert description.network.layer_norm == form
    cut = [network.get_submodule(name) for name in description.network.layer_norm_widths]
    assert cut
    if form == "plain":
        assert not any(isinstance(module, FixedDivisorLayerNorm) for module in network.modules())
        assert all(isinstance(module, torch.nn.LayerNorm) for module in cut)
    else:
        assert all(isinstance(module, FixedDivisorLayerNorm) for module in cut)


@pytest.mark.parametrize("allowed", [True, False])
def test_what_cannot_be_cut_is_told_where_that_is_allowed_and_refused_elsewhere(
    workspace, monkeypatch, capsys, allowed
):
    from stages.pruning import only_train_once_adapter as adapter

    group = "stages.1.downsample.1"
    monkeypatch.setattr(adapter, "_concatenated", lambda graph, cuttable: [next(
        group_id for group_id in cuttable
        if any(f"{group}.weight" in node.param_names for node in graph.node_groups[group_id].nodes.values())
    )])  # fmt: skip
    changed = PARAMS | {"pruners": PARAMS["pruners"] | {"oto": PARAMS["pruners"]["oto"] | {"allow_partial": allowed}}}
    (workspace / "params.yaml").write_text(yaml.safe_dump(changed))
    if not allowed:
        expected = (
            rf"^pruners\.oto \(method oto\): {group}: its channels pass a concatenation.*`allow_partial: true` leaves"
        )
        with pytest.raises(UserError, match=expected):
            run(monkeypatch, "toy-oto")
        return
    network, description = run(monkeypatch, "toy-oto")
    assert f"toy-oto: left whole, since they cannot be cut exactly: {group}\n" in capsys.readouterr().out
    assert description.metrics["groups_left_whole"] == 1
    assert network.get_submodule(group).weight.shape[0] == 12


@pytest.mark.parametrize("killed_at", [15, 27, 40])  # 12 steps an epoch; `oto` cuts after two of four epochs
@pytest.mark.parametrize("key", ["toy-oto", "toy-gradual"])
def test_training_killed_on_the_way_goes_on_to_the_same_artifact(workspace, monkeypatch, key, killed_at):
    raw = copy.deepcopy(PARAMS)
    for entry in raw["pruners"].values():
        entry |= {"epochs": 4} if "epochs" in entry else {}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    _, whole = run(monkeypatch, key)
    shutil.rmtree(paths.pruned(key))
    shutil.rmtree(paths.SCRATCH)  # which keeps the finished training
    one_step = Trainer.step

    def killed(self, step, *batch):
        if step == killed_at:
            raise KeyboardInterrupt
        return one_step(self, step, *batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, key)
    assert not paths.pruned(key).exists()
    monkeypatch.setattr(Trainer, "step", one_step)
    _, resumed = run(monkeypatch, key)
    assert resumed.tensors == whole.tensors
    assert resumed.metrics == whole.metrics


@pytest.mark.parametrize("pruner", ["oto", "l1"])
def test_a_network_that_insists_on_its_version_is_trained_pruned_and_stored(workspace, monkeypatch, pruner):
    raw = copy.deepcopy(PARAMS)
    raw["models"]["toy"] |= {"library": "torchvision", "architecture": "mnasnet0_5", "arguments": {}}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    parent = replace(read_description(paths.dense("toy")), network=NetworkSpec("torchvision", "mnasnet0_5", {}, 2))
    save_artifact(paths.dense("toy"), build_network(parent.network), parent)
    network, description = run(monkeypatch, f"toy-{pruner}")
    assert len(curve_of(f"toy-{pruner}")) == 3
    assert bool(description.network.widths) == (pruner == "oto")
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("key", "rate"), [("l1", "pruners.l1.learning_rate_factor"), ("narrow", "finetune.learning_rate")]
)
def test_a_loss_that_is_not_finite_names_the_learning_rate_to_lower(workspace, monkeypatch, key, rate):
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda *batch: torch.inf * loss(*batch))
    with pytest.raises(UserError, match=rf"^prune toy-{key}: the loss became \S+ in epoch 1: lower {rate}; nothing"):
        run(monkeypatch, f"toy-{key}")


@pytest.mark.parametrize("method", ["oto", "narrow"])
def test_a_network_that_cannot_be_partitioned_is_refused_for_the_method_that_was_asked_for(
    workspace, monkeypatch, method
):
    raw = copy.deepcopy(PARAMS)
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    raw["models"]["toy"] |= {"architecture": "vit_tiny_patch16_224", "arguments": arguments}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    spec = NetworkSpec("timm", "vit_tiny_patch16_224", arguments, 2)
    parent = replace(read_description(paths.dense("toy")), network=spec)
    save_artifact(paths.dense("toy"), build_network(spec), parent)
    with pytest.raises(UserError) as refusal:
        run(monkeypatch, f"toy-{method}")
    asked = raw["pruners"][method]["method"]
    assert str(refusal.value) == (
        f"prune.{method} (method {asked}): VisionTransformer: only_train_once cannot tell which of its channels belong"
        " together (the package cannot follow aten::scaled_dot_product_attention): only l1_unstructured and"
        " random_unstructured can prune it"
    )


def test_cut_that_changes_the_output_is_not_saved(workspace, monkeypatch):
    cut = methods.cut_channels

    def wrong(network, spec, groups, pruned):
        subnet, spec = cut(network, spec, groups, pruned)
        subnet.head.fc.bias.data += 1
        return subnet, spec

    monkeypatch.setattr(methods, "cut_channels", wrong)
    with pytest.raises(UserError, match=r"toy-oto: after cutting \(layer_norm: exact\), the logits differ by"):
        run(monkeypatch, "toy-oto")
    assert not paths.pruned("toy-oto").exists()


@pytest.mark.parametrize("fault", ["quantized", "pruned", "other images", "unknown key"])
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
        case "other images":
            description.data = {"name": "toy", "sha256": "1" * 64}
    monkeypatch.setattr(prune, "load_artifact", lambda _: (network, description))
    message = {
        "quantized": "is quantized already",
        "pruned": "is pruned already",
        "other images": "was made from other images",
        "unknown key": "'toy-nothing': give one entry of pruned: toy-",
    }[fault]
    with pytest.raises(UserError, match=message):
        run(monkeypatch, "toy-nothing" if fault == "unknown key" else "toy-none")
    assert paths.pruned("toy-none").joinpath("model.json").read_bytes() == previous
