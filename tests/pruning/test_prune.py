"""The prune stage on a tiny data set: from a dense artifact to a pruned one."""

import contextlib
import copy
import csv
import io
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from safetensors.torch import load_file

from stages import prune, quantize
from stages.artifacts.artifact import load_artifact, save_artifact
from stages.artifacts.description import Description, LayerStorage, read_description
from stages.common import paths
from stages.common.errors import UserError
from stages.networks.build import build_network
from stages.networks.norms import FixedDivisorLayerNorm
from stages.networks.spec import NetworkSpec
from stages.pruning import methods, only_train_once_adapter
from stages.pruning.costs import costs_of
from stages.training import session
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
        "two_of_four": {"method": "l1_unstructured", **BUDGET, "sparsity": 0.5, "pattern": "2:4"},
        "taught": {"method": "continued", **BUDGET, "distillation": 0.5},
        "gradual": BUDGET
        | {
            "method": "l1_unstructured",
            "sparsity": 0.8,
            "schedule": "gradual",
            "end_fraction": 0.9,
            "distillation": 0.5,
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
        "geometry": "crop",
        "channels": 3,
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
        geometry="crop",
        input_size=32,
        mean=[0.4] * 3,
        std=[0.2] * 3,
        data=data,
        parameters={"finetune": PARAMS["finetune"]},
        seed=3,
        metrics={"validation_top1": 0.5, "validation_balanced_accuracy": 0.5, "epoch": 1},
    )


@dataclass
class Outcome:
    network: torch.nn.Module
    description: Description
    curve: list[list[str]]
    printed: str
    files: set[str]
    """New files outside `.scratch`."""

    @property
    def metrics(self) -> dict[str, float]:
        return self.description.metrics

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        kinds = torch.nn.Conv2d | torch.nn.Linear
        return {name: m.weight.detach() for name, m in self.network.named_modules() if isinstance(m, kinds)}


def run(pruner: str, changes: dict[str, Any] | None = None, **sections: Any) -> Outcome:
    """Run the stage in the working folder; a change to None removes a key."""
    raw = copy.deepcopy(PARAMS | sections)
    entry = raw["pruners"].get(pruner, {}) | (changes or {})
    raw["pruners"][pruner] = {name: value for name, value in entry.items() if value is not None}
    paths.PARAMS.write_text(yaml.safe_dump(raw))
    key, before, printed = f"toy-{pruner}", files_below(Path()), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["prune", key])
        prune.main()
    with paths.pruned_curve(key).open() as file:
        curve = list(csv.reader(file))
    return Outcome(*load_artifact(paths.pruned(key)), curve, printed.getvalue(), files_below(Path()) - before)


def files_below(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".scratch")}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    description = dense_description(write_images(folder / paths.IMAGES))
    torch.manual_seed(0)
    save_artifact(folder / paths.dense("toy"), build_network(description.network), description)
    return folder


@pytest.fixture(scope="module")
def made(template, tmp_path_factory):
    """The outcome of each pruner with its settings above, made once."""
    folder, found = shutil.copytree(template, tmp_path_factory.mktemp("made"), dirs_exist_ok=True), {}

    def outcome_of(pruner: str) -> Outcome:
        if pruner not in found:
            with contextlib.chdir(folder):
                found[pruner] = run(pruner)
        return found[pruner]

    outcome_of.folder = folder
    return outcome_of


@pytest.fixture
def workspace(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def dense(template):
    return load_artifact(template / paths.dense("toy"))


def test_none_copies_the_dense_tensors(made, dense):
    found, (network, parent) = made("none"), dense
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in found.network.state_dict().items())
    description = found.description
    assert (description.name, description.stage, description.model) == ("toy-none", "prune", "toy")
    assert description.parent["name"] == "toy"
    assert description.tensors == parent.tensors
    assert description.parameters == {"method": "none"}
    assert found.metrics["validation_top1"] == 0.5
    assert found.curve == [list(CURVE_COLUMNS)]


def test_continued_trains_the_whole_network(made, dense):
    found, (network, parent) = made("continued"), dense
    assert found.description.network == replace(parent.network, layer_scale_folded=True)
    assert not torch.equal(found.network.head.fc.weight, network.head.fc.weight)
    assert found.metrics["validation_top1"] > 0.9
    folded = sum(ARGUMENTS["dims"])  # one block of each width: its layer scale is in the layer before it now
    assert found.metrics["params"] == found.metrics["params_dense"] - folded
    assert len(found.curve) == 3


def test_oto_leaves_a_physically_smaller_network_and_no_stray_file(made):
    found = made("oto")
    metrics, spec = found.metrics, found.description.network
    assert metrics["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert metrics["channels"] == metrics["channels_dense"] - round(0.5 * metrics["channels_dense"])
    assert metrics["params"] == sum(p.numel() for p in found.network.parameters()) < 0.8 * metrics["params_dense"]
    assert metrics["validation_top1"] > 0.8
    assert spec.layer_scale_folded
    assert spec.widths
    fixed = {name for name, module in found.network.named_modules() if isinstance(module, FixedDivisorLayerNorm)}
    assert fixed == set(spec.layer_norm_widths)
    assert found.description.parameters["group_sparsity"] == 0.5
    artifact = paths.pruned("toy-oto")
    outputs = {artifact / "model.json", artifact / "model.safetensors", paths.pruned_curve("toy-oto")}
    assert found.files - {"params.yaml"} == {str(path) for path in outputs}


def test_the_cut_of_oto_changes_nothing_and_training_goes_on_behind_it(made):
    found = made("oto")
    assert found.metrics["validation_top1_cut"] == found.metrics["validation_top1_uncut"]
    assert found.metrics["cut_difference"] < 1e-4
    assert found.metrics["epoch"] == 2  # the second epoch is the cut network's
    assert [row[0] for row in found.curve[1:]] == ["1", "2"]


def test_plain_layer_norm_reports_the_jump_that_it_causes(made):
    found = made("plain")
    assert found.metrics["cut_difference"] > 1e-3
    assert found.description.network.layer_norm == "plain"
    assert found.description.network.layer_norm_widths
    assert not any(isinstance(module, FixedDivisorLayerNorm) for module in found.network.modules())
    assert found.metrics["validation_top1"] > 0.8


@pytest.mark.parametrize(("penalty", "half_space"), [(1e-3, 0.0), (50.0, 0.9)])
def test_dhspg_keeps_its_multiple_and_reports_what_its_projection_took(workspace, penalty, half_space):
    found = run("dhspg", {"penalty": penalty, "half_space": half_space})
    widths = found.description.network.widths.values()
    assert widths
    assert all(value % 4 == 0 for size in widths for value in size.values() if value > 3)
    projected = found.metrics["channels_projected"]
    redundant = found.metrics["channels_dense"] - found.metrics["channels"]
    advice = f"projection took {projected} of {redundant} redundant channels"
    assert (projected < redundant / 2) == (penalty < 1) == (advice in found.printed)
    assert 0 <= projected <= redundant


@pytest.mark.parametrize("pruner", ["oto", "lasso"])
def test_pruning_to_the_last_epoch_is_refused_where_the_cut_needs_recovery(workspace, pruner):
    with pytest.raises(UserError, match=rf"pruners\.{pruner}\.end_fraction = 0.9: pruning takes all 2 epochs"):
        run(pruner, {"end_fraction": 0.9, "layer_norm": "plain"})


def test_oto_may_prune_to_the_last_epoch(workspace):
    found = run("oto", {"end_fraction": 1.0})
    assert found.metrics["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert found.metrics["epoch"] == 2
    assert len(found.curve) == 3


@pytest.mark.parametrize("pruner", ["dhspg", "cut_at_random", "magnitude", "lasso", "narrow"])
def test_every_structured_pruner_meets_its_target_in_macs(made, dense, pruner):
    found = made(pruner)
    left = costs_of(found.network, [], 32).macs_dense / costs_of(dense[0], [], 32).macs_dense
    assert 0.3 < left <= 0.5
    metrics = found.metrics
    assert metrics["validation_top1"] > 0.7
    assert metrics["channels_dense"] > metrics["channels"] > 0
    assert metrics["group_sparsity"] == pytest.approx(1 - metrics["channels"] / metrics["channels_dense"])
    exact = pruner in ("dhspg", "cut_at_random")
    assert found.description.network.layer_norm == ("exact" if exact else "plain")
    if exact:
        assert metrics["cut_difference"] < 1e-4
    assert len(found.curve) - 1 == 2 + (pruner == "narrow")  # which trains for the epochs of finetune too


def test_removal_at_random_takes_other_channels_under_another_seed(made, dense, workspace):
    network, description = dense
    save_artifact(paths.dense("toy"), network, replace(description, seed=4))
    shapes = [
        [t.shape for t in found.network.state_dict().values()]
        for found in (made("cut_at_random"), run("cut_at_random"))
    ]
    assert shapes[0] != shapes[1]


def test_small_dense_is_narrower_everywhere(made, dense):
    found = made("narrow")
    fractions = [
        len(narrow.weight) / len(wide.weight)
        for (name, narrow), wide in zip(found.network.named_modules(), dense[0].modules(), strict=True)
        if isinstance(narrow, torch.nn.Conv2d | torch.nn.Linear) and name != "head.fc"
    ]
    assert max(fractions) - min(fractions) < 0.15
    assert "cut_difference" not in found.metrics


@pytest.mark.parametrize("pruner", ["dhspg", "cut_at_random", "magnitude", "lasso", "narrow"])
def test_a_target_that_cannot_be_met_is_refused_before_training(workspace, monkeypatch, pruner):
    monkeypatch.setattr(session, "Trainer", lambda *_, **__: pytest.fail("it trained first"))
    with pytest.raises(UserError, match=rf"pruners\.{pruner}\.macs_reduction = 0.9999: at most 0\.[6-9]"):
        run(pruner, {"macs_reduction": 0.9999})


def test_a_target_under_one_unit_of_channels_removes_nothing_and_says_so(workspace):
    found = run("cut_at_random", {"macs_reduction": None, "group_sparsity": 0.001})
    assert "nothing was removed: pruners.cut_at_random.group_sparsity = 0.001 is less than one unit" in found.printed


@pytest.mark.parametrize("pruner", ["oto", "magnitude", "lasso"])
def test_a_target_of_zero_removes_nothing_and_is_the_control(made, workspace, pruner):
    found = run(pruner, {"group_sparsity": None, "macs_reduction": 0.0})
    assert found.description.tensors == made("continued").description.tensors
    assert found.description.network.widths == {}
    assert found.metrics["group_sparsity"] == 0


def test_the_teacher_is_the_dense_parent_and_changes_what_is_learned(made, workspace, monkeypatch, dense):
    teachers, plain = [], made("continued")

    def watched(*args, distillation, **more):
        teachers.append((distillation.teacher, {k: v.clone() for k, v in distillation.teacher.state_dict().items()}))
        return Trainer(*args, distillation=distillation, **more)

    monkeypatch.setattr(session, "Trainer", watched)
    taught = run("taught")
    assert not torch.equal(plain.network.head.fc.weight, taught.network.head.fc.weight)
    [(teacher, before)] = teachers
    assert before.keys() == teacher.state_dict().keys() == dense[0].state_dict().keys()
    for name, tensor in dense[0].state_dict().items():
        assert torch.equal(before[name], tensor)
        assert torch.equal(teacher.state_dict()[name], tensor)


@pytest.mark.parametrize("pruner", ["l1", "random", "gradual"])
def test_unstructured_zeros_reach_the_artifact(made, dense, pruner):
    found = made(pruner)
    zeros, total = (sum(map(count, found.weights.values())) for count in (zeros_in, torch.numel))
    assert zeros == sum(round(0.8 * weight.numel()) for weight in found.weights.values())
    assert found.metrics["sparsity"] == zeros / total
    assert found.description.network == replace(dense[1].network, layer_scale_folded=True)


def zeros_in(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


def test_zeros_reach_the_artifact_with_one_sign_also_without_averaging(workspace):
    weights = run("l1", finetune=PARAMS["finetune"] | {"ema_decay": 0.0}).weights.values()
    assert sum(map(zeros_in, weights)) == sum(round(0.8 * w.numel()) for w in weights)
    assert not any((torch.signbit(w) & (w == 0)).any() for w in weights)


def test_two_of_four_leaves_what_it_does_not_fit_dense_and_says_so(made):
    found = made("two_of_four")
    dense = [name for name, weight in found.weights.items() if not zeros_in(weight)]
    assert dense == ["stem.0", *(f"stages.{stage}.blocks.0.conv_dw" for stage in range(4))]
    assert all(2 * zeros_in(weight) == weight.numel() for name, weight in found.weights.items() if name not in dense)
    assert found.metrics["layers_unpruned"] == 5
    zeros, total = (sum(map(count, found.weights.values())) for count in (zeros_in, torch.numel))
    assert found.metrics["sparsity"] == zeros / total < 0.5
    assert "toy-two_of_four: dense, since 4 does not divide their inputs: stem.0, " in found.printed


@pytest.mark.parametrize("method", ["fp32", "int8_dynamic"])
def test_zeros_survive_quantization_and_export(made, monkeypatch, method):
    found = made("l1")
    monkeypatch.chdir(made.folder)
    variant = {"toy-l1-small": {"pruned": "toy-l1", "quantizer": "small"}}
    sections = {"quantizers": {"small": {"method": method}}, "variants": variant}
    params = quantize.Params(base=PARAMS["base"], finetune=PARAMS["finetune"], **sections)
    folder = paths.compressed("toy-l1-small")
    quantize.compress(params, "toy-l1-small", paths.pruned("toy-l1"), folder, paths.IMAGES, 1)
    stored = {
        name.replace(".linear.", "."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if name.endswith(".weight") and tensor.dim() > 1
    }
    zeros = 0
    for name, weight in found.weights.items():
        held = (weight == 0).view(stored[f"{name}.weight"].shape)
        assert (stored[f"{name}.weight"][held] == 0).all()
        zeros += int(held.sum())
    assert zeros == round(found.metrics["sparsity"] * sum(t.numel() for t in stored.values())) > 1000
    zeros_stored = sum(map(zeros_in, stored.values()))
    assert zeros_stored == zeros if method == "fp32" else zeros_stored >= zeros  # small ones round to 0
    arrays = [numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer]
    matrices = [array for array in arrays if array.ndim > 1 and array.size > 3]  # not the preprocessing's scale
    assert sum(array.size for array in matrices) == sum(tensor.numel() for tensor in stored.values())
    assert sum(int((array == 0).sum()) for array in matrices) == zeros_stored


def test_excludes_of_pruner_and_quantizer_hold_through_both_stages(workspace, dense):
    outcome = run("oto", {"exclude": ["stages.3"], "group_sparsity": 0.5})
    variant = {"toy-oto-static": {"pruned": "toy-oto", "quantizer": "static"}}
    static = {"method": "int8_static", "calibration_images": 8, "exclude": ["stem", "stages.1"]}
    sections = {"quantizers": {"static": static}, "variants": variant}
    params = quantize.Params(base=PARAMS["base"], finetune=PARAMS["finetune"], **sections)
    folder = paths.compressed("toy-oto-static")
    quantize.compress(params, "toy-oto-static", paths.pruned("toy-oto"), folder, paths.IMAGES, 1)

    whole, widths = layer_widths(dense[0]), layer_widths(outcome.network)
    assert {name for name in whole if name.startswith("stages.3.blocks")} <= {n for n in whole if whole[n] == widths[n]}
    assert any(widths[name] < whole[name] for name in whole if name.startswith("stages.1"))
    description = read_description(folder)
    stored = {name for name in widths if name not in description.layers}
    assert {"stem.0", *(name for name in widths if name.startswith("stages.1"))} <= stored
    assert any(name.startswith("stages.3") for name in description.layers)
    assert description.parameters["exclude"] == ["stem", "stages.1"]


@pytest.mark.parametrize("allowed", [True, False])
def test_what_cannot_be_cut_is_named_where_that_is_allowed_and_refused_elsewhere(workspace, monkeypatch, allowed):
    layer = "stages.1.downsample.1"

    def concatenated(graph, cuttable):
        groups = {
            key: [name for node in graph.node_groups[key].nodes.values() for name in node.param_names]
            for key in cuttable
        }
        return [key for key, names in groups.items() if f"{layer}.weight" in names]

    monkeypatch.setattr(only_train_once_adapter, "_concatenated", concatenated)
    if not allowed:
        message = (
            rf"^pruners\.oto \(method oto\): {layer}: its channels pass a concatenation.*`allow_partial: true` leaves"
        )
        with pytest.raises(UserError, match=message):
            run("oto")
        return
    found = run("oto", {"allow_partial": True})
    assert f"toy-oto: left whole, since they cannot be cut exactly: {layer}\n" in found.printed
    assert found.metrics["groups_left_whole"] == 1
    assert len(found.weights[layer]) == 12


@pytest.fixture(scope="module")
def uninterrupted(template, tmp_path_factory):
    """Trainings of four epochs, 12 steps each; `oto` cuts after two."""
    found = {}
    for pruner in ("oto", "gradual"):
        with contextlib.chdir(shutil.copytree(template, tmp_path_factory.mktemp(pruner), dirs_exist_ok=True)):
            found[pruner] = run(pruner, {"epochs": 4}).description
    return found


@pytest.mark.parametrize(
    ("pruner", "killed_at"), [("oto", 15), ("oto", 27), ("oto", 40), ("gradual", 15), ("gradual", 40)]
)
def test_training_killed_on_the_way_goes_on_to_the_same_artifact(workspace, uninterrupted, pruner, killed_at):
    one_step = Trainer.step

    def killed(self, step, *batch):
        if step == killed_at:
            raise KeyboardInterrupt
        return one_step(self, step, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        run(pruner, {"epochs": 4})
    assert not paths.pruned(f"toy-{pruner}").exists()
    resumed = run(pruner, {"epochs": 4}).description
    assert resumed.tensors == uninterrupted[pruner].tensors
    assert resumed.metrics == uninterrupted[pruner].metrics


def replace_dense(library: str, architecture: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Put another network in place of the dense one; returns the section `models` that describes it."""
    spec = NetworkSpec(library, architecture, arguments, 2)
    save_artifact(paths.dense("toy"), build_network(spec), replace(read_description(paths.dense("toy")), network=spec))
    entry = {"library": library, "architecture": architecture, "arguments": arguments}
    return {"toy": PARAMS["models"]["toy"] | entry}


@pytest.mark.parametrize("pruner", ["oto", "l1"])
def test_a_network_that_insists_on_its_version_is_trained_pruned_and_stored(workspace, pruner):
    found = run(pruner, models=replace_dense("torchvision", "mnasnet0_5", {}))
    assert len(found.curve) == 3
    assert bool(found.description.network.widths) == (pruner == "oto")
    assert found.network(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(
    ("pruner", "rate"), [("l1", "pruners.l1.learning_rate_factor"), ("narrow", "finetune.learning_rate")]
)
def test_a_loss_that_is_not_finite_names_the_learning_rate_to_lower(workspace, monkeypatch, pruner, rate):
    loss = Trainer.loss
    monkeypatch.setattr(Trainer, "loss", lambda *batch: torch.inf * loss(*batch))
    with pytest.raises(UserError, match=rf"^prune toy-{pruner}: the loss became \S+ in epoch 1: lower {rate}; nothing"):
        run(pruner)


@pytest.mark.parametrize(("pruner", "method"), [("oto", "oto"), ("narrow", "small_dense")])
def test_a_network_that_cannot_be_partitioned_is_refused_with_the_methods_that_can_prune_it(workspace, pruner, method):
    arguments = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    models = replace_dense("timm", "vit_tiny_patch16_224", arguments)
    with pytest.raises(
        UserError, match=rf"^pruners\.{pruner} \(method {method}\): .*scaled_dot_product.* only l1_unstr"
    ):
        run(pruner, models=models)


def test_a_cut_that_changes_the_output_is_not_saved(workspace, monkeypatch):
    cut = methods.cut_channels

    def wrong(network, spec, groups, pruned):
        subnet, spec = cut(network, spec, groups, pruned)
        subnet.head.fc.bias.data += 1
        return subnet, spec

    monkeypatch.setattr(methods, "cut_channels", wrong)
    with pytest.raises(UserError, match=r"toy-oto: after cutting, the logits differ by"):
        run("oto")
    assert not paths.pruned("toy-oto").exists()


@pytest.mark.parametrize(
    "fault", ["is quantized already", "is pruned already", "was made from other images", "give one"]
)
def test_unfit_parent_is_refused_and_the_previous_artifact_kept(workspace, monkeypatch, fault):
    run("none")
    previous = paths.pruned("toy-none").joinpath("model.json").read_bytes()
    network, description = load_artifact(paths.dense("toy"))
    match fault:
        case "is quantized already":
            description.layers = {"head.fc": LayerStorage(8, 8, "symmetric_per_channel")}
        case "is pruned already":
            description.network.widths["head.fc"] = {"in_features": 20, "out_features": 2}
        case "was made from other images":
            description.data = {"name": "toy", "sha256": "1" * 64}
    monkeypatch.setattr(prune, "load_artifact", lambda _: (network, description))
    with pytest.raises(UserError, match=fault):
        run("nothing" if fault == "give one" else "none", {"method": "none"})
    assert paths.pruned("toy-none").joinpath("model.json").read_bytes() == previous


def layer_widths(network: torch.nn.Module) -> dict[str, int]:
    kinds = torch.nn.Conv2d | torch.nn.Linear
    return {name: len(m.weight) for name, m in network.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("pruner", ["oto", "cut_at_random", "narrow", "magnitude", "lasso"])
def test_excluded_modules_keep_their_width_and_others_meet_the_target(workspace, dense, pruner):
    changes = {"exclude": ["stem", "stages.2.*.fc1"], "macs_reduction": 0.3, "group_sparsity": None}
    outcome, whole = run(pruner, changes), layer_widths(dense[0])
    cut = {name for name, width in layer_widths(outcome.network).items() if width < whole[name]}
    assert cut
    assert not {
        name for name in cut if name.startswith(("stem", "stages.0.blocks.0.conv_dw", "stages.0.blocks.0.mlp.fc2"))
    }
    assert "stages.2.blocks.0.mlp.fc1" not in cut
    before, after = (costs_of(network, [], 32).macs_dense for network in (dense[0], outcome.network))
    assert after <= 0.7 * before


@pytest.mark.parametrize("pruner", ["oto", "cut_at_random", "narrow", "magnitude", "lasso"])
@pytest.mark.parametrize(
    ("exclude", "target", "reason"),
    [
        (["stm"], 0.3, r"pruners.\w+.exclude = 'stm': .*stem"),
        (["stages.0.blocks.0.drop_path"], 0.3, r"pruners.\w+.exclude = .* has no weights"),
        (["stages.*", "stem"], 0.3, "exclude"),
        (["stages.[123]", "stem"], 0.7, r"macs_reduction = 0.7: at most .*exclude"),
    ],
)
def test_an_exclude_is_checked_before_training(workspace, monkeypatch, pruner, exclude, target, reason):
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=reason):
        run(pruner, {"exclude": exclude, "macs_reduction": target, "group_sparsity": None})
