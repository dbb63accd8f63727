"""Every refusal names the key's path in the file, its value and what is allowed, in one line for each problem."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dvc.utils.serialize import modify_yaml
from miniature import PARAMS, committed, committed_params
from safetensors.torch import save_file
from toy_network import UNCOUNTABLE

from stages.common.errors import UserError
from stages.networks import architectures
from stages.networks.build import build_network, spec_of
from stages.params import document
from stages.params.check import check, plan
from stages.params.load import load_params
from stages.params.models import Model
from stages.params.pruners import Importance, Oto
from stages.params.section import Name, Section
from stages.params.whole import Params

TOP = Path(__file__).parents[2]
BUDGET = {"epochs": 2, "learning_rate_factor": 0.5}
OTO = BUDGET | {"method": "oto", "group_sparsity": 0.5}
DHSPG = OTO | {"optimizer": "dhspg"}
DEPGRAPH = OTO | {"method": "depgraph"}
L1 = BUDGET | {"method": "l1_unstructured", "sparsity": 0.8}
SEARCH = {"method": "learned_bits", "average_bits": 4.0}
UNIFORM = {"method": "uniform_bits", "bits": 4}
SOAK = {"variant": "convnext-none-fp32", "minutes": 9}
MISSING = object()


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load(PARAMS)


def written(raw: object, folder: Path) -> Path:
    path = folder / "params.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def put(raw: dict, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw[parent]
    if value is MISSING:
        del raw[last]
    else:
        raw[last] = value


def refusal(raw: object, folder: Path) -> str:
    path = written(raw, folder)
    with pytest.raises(UserError) as error:
        check(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("finetune.epoch", 3, "finetune.epoch = 3: unknown key; did you mean epochs?"),
        ("finetune.epochs", "many", "finetune.epochs = 'many': must be a valid integer"),
        ("finetune.learning_rate", float("nan"), "finetune.learning_rate = nan: must be"),
        ("edge_benchmark.window_seconds", float("inf"), "edge_benchmark.window_seconds = inf: must be"),
        ("finetune", None, "finetune: is empty: its keys are missing"),
        ("models", {}, "models: needs at least 1 entries"),
        ("data.image_size", MISSING, "data.image_size: is required and missing"),
        ("base.threads", MISSING, "base.threads: is required and missing; its usual value is 0"),
        ("report.metric", MISSING, "report.metric: is required and missing; its usual value is top1"),
        ("report.metric", "recall", "report.metric = 'recall': must be 'top1' or 'balanced_accuracy'"),
        ("report.metrik", "top1", "report.metrik = 'top1': unknown key; did you mean metric?"),
        ("base.seed", -1, "base.seed = -1: must be greater than or equal to 0"),
        ("base.seed", 2**32, f"base.seed = {2**32}: must be less than"),
        ("base.threads", 100_000, "base.threads = 100000: must be less than"),
        ("variantz", {"x": "y" * 200}, "variantz = {'x': 'yyyy"),
        ("models.convnext.inputsize", 32, "models.convnext.inputsize = 32: unknown key; did you mean input_size?"),
        ("pruners.none", None, "pruners.none: is empty: its keys are missing"),
        ("pruners.none.epochs", 3, "pruners.none.epochs = 3: unknown key; known: method"),
        ("pruners.l1.sparsty", 0.1, "pruners.l1.sparsty = 0.1: unknown key; did you mean sparsity?"),
        ("pruners.oto50.epochs", MISSING, "pruners.oto50.epochs: is required and missing"),
        ("pruners.oto50.group_sparsity", 1.5, "pruners.oto50.group_sparsity = 1.5: must be less than 1"),
        ("pruners.oto50.method", "otto", "pruners.oto50.method = 'otto': must be one of 'none'"),
        ("pruners.oto50.method", MISSING, "pruners.oto50.method: is required and missing"),
        ("pruners.oto50.divisible_by", 10**20, f"pruners.oto50.divisible_by = {10**20}: must be less"),
        ("pruners.oto50.minimum_width", 10**20, f"pruners.oto50.minimum_width = {10**20}: must be less"),
        (
            "pruners.oto50.importance",
            "magnitude",
            "importance = 'magnitude': must be a mapping with the keys magnitude",
        ),
        ("pruners.oto50.importance", {"magnitud": 1.0}, "importance.magnitud = 1.0: unknown key; did you mean magnitu"),
        ("pruners.oto50.importance", {"magnitude": 0.0}, "importance: at least one weight must be above 0"),
        ("pruners.oto50.macs_reduction", 0.5, "pruners.oto50: give one of group_sparsity, params_reduction and macs"),
        ("pruners.oto50.group_sparsity", MISSING, "and macs_reduction (given: none)"),
        ("pruners.oto50.start_fraction", 0.5, "pruners.oto50: start_fraction must be less than end_fraction"),
        ("pruners.oto50", DHSPG | {"penalty": 300.0}, "pruners.oto50: penalty 300.0 is above penalty_limit 200.0"),
        ("pruners.l1.pattern", "2:4", "pruners.l1: pattern 2:4 zeroes half of every layer"),
        ("pruners.l1", L1 | {"sparsity": 0.5, "pattern": "2:4", "schedule": "gradual"}, "set schedule: one_shot"),
        ("pruners.oto-5", {"method": "none"}, ""),
        ("pruners.oto50.distillation", 0.5, "distillation 0.5 and temperature 2.0: list a pruner of method continued"),
        ("pruners.oto50.epochs", 3, "a pruner trains for 3 epochs at learning_rate_factor 0.5"),
        ("pruners.continued.learning_rate_factor", 1.0, "list a pruner of method continued with the same settings"),
        ("quantizers.int8_dynamic.perchannel", True, "perchannel = True: unknown key; did you mean per_channel?"),
        ("quantizers.mine", SEARCH | {"average_bits": 1.5}, "quantizers.mine.average_bits = 1.5: must be greater"),
        ("quantizers.mine", SEARCH | {"average_bits": 8.0}, "average_bits = 8.0 leaves nothing to choose"),
        (
            "quantizers.mine",
            SEARCH | {"choices": [4, 8], "average_bits": 3.0},
            "under the 4 bits that every layer needs",
        ),
        ("quantizers.mine", SEARCH | {"choices": [4, 4]}, "choices must rise, each once"),
        ("quantizers.mine", SEARCH | {"choices": [4]}, "quantizers.mine.choices"),
        ("quantizers.mine", SEARCH | {"choices": [2, 9]}, "quantizers.mine.choices.1"),
        ("quantizers.mine", SEARCH | {"evaluations": 0}, "quantizers.mine.evaluations = 0"),
        ("quantizers.mine", SEARCH | {"samples": 10, "evaluations": 19}, "set it to 20 or more, or lower samples"),
        ("quantizers.mine", SEARCH | {"learning_rate": -0.1}, "quantizers.mine.learning_rate = -0.1"),
        ("quantizers.mine", SEARCH | {"rounding": "gptq", "epochs": 2}, "rounding: gptq with epochs: 2"),
        ("data.location", "somewhere", "data.location = 'somewhere': does nothing with source: digits"),
        ("data.source", "folder", "data: source: folder needs a location"),
        ("finetune.crop_padding", 32, "finetune.crop_padding = 32: must be less than data.image_size = 32"),
        ("finetune.mixup", 0.2, ""),
        ("base.launcher", "mpirun -n 2", "base.launcher = 'mpirun -n 2': must be python, or torchrun"),
        ("base.launcher", "python -O", "base.launcher = 'python -O': must be python, or torchrun"),
        ("base.launcher", "", "base.launcher = '': must be python, or torchrun"),
        ("base.launcher", 'torchrun "--nproc', "no closing quotation"),
        (
            "pruned.atto-none",
            {"model": "atto", "pruner": "none"},
            "pruned.atto-none.model = 'atto': not listed under mod",
        ),
        (
            "pruned.convnext-l2",
            {"model": "convnext", "pruner": "l2"},
            "convnext-l2.pruner = 'l2': not listed under prun",
        ),
        (
            "variants.best",
            {"pruned": "convnext-none", "quantizer": "fp32"},
            "be its joined parts, 'convnext-none-fp32'",
        ),
        (
            "variants.convnext-none-fp32.quantizer",
            "int4",
            "quantizer = 'int4': not listed under quantizers (fp32, int8",
        ),
        ("variants.convnext-none-fp32.pruned", "convnext none", "pruned = 'convnext none': names hold letters, digits"),
        ("variants.convnext-none-fp32", MISSING, "models.convnext: its baseline is missing"),
        ("quantizers.fp32", {"method": "int8_dynamic"}, "quantizers.fp32.method: 'fp32' names the baseline"),
        ("profile", MISSING, "profile: is required and missing"),
        ("report.claims", "none.yaml", "report.claims = 'none.yaml': no such file"),
        ("edge_benchmark.target", "pi@raspberry", "target = 'pi@raspberry': must be local or ssh://user@host[:port]"),
        ("edge_benchmark.target", "ssh://-oProxyCommand=x", "must be local or ssh://"),
        ("edge_benchmark.target", "ssh://a;touch b", "must be local or ssh://"),
        ("edge_benchmark.target", "ssh://pi@raspberry:70000", "with a port from 1 to 65535"),
        ("edge_benchmark.target", "ssh://[::1]:22", "give an IPv6 address a name"),
        ("edge_benchmark.soak", SOAK | {"minutes": 0.1}, "6 s in windows of 5 s: it needs at least 4"),
        ("edge_benchmark.soak", SOAK | {"images_per_second": 0.1}, "windows of 5 s would be empty"),
        (
            "edge_benchmark.soak",
            SOAK | {"variant": "x"},
            "edge_benchmark.soak.variant = 'x': not listed under variants",
        ),
        ("edge_benchmark.printed", {"variant": "x"}, "edge_benchmark.printed.variant = 'x': not listed"),
        ("edge_benchmark.runtimes", ["openvino"], "runtimes must hold onnxruntime"),
        ("edge_benchmark.runtimes", ["onnxruntime"] * 2, "runtimes: each once"),
        ("edge_benchmark.affinity", [0, 0], "affinity: each core once"),
    ],
)
def test_a_value_that_cannot_be_is_refused(raw, tmp_path, key, value, expected):
    put(raw, key, value)
    if expected:
        assert expected in refusal(raw, tmp_path)
    else:
        check(written(raw, tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"finetune.batch_size": 33, "finetune.mixup": 0.2}, "batch_size = 33: mixup and cutmix pair images"),
        ({"finetune.muon_iterations": 3}, "finetune.muon_iterations = 3: does nothing with optimizer: adamw"),
        ({"edge_benchmark.threads": 2, "edge_benchmark.affinity": [0]}, "affinity names 1 cores for 2 threads"),
        ({"export.batch": 1, "edge_benchmark.batch": 4}, "edge_benchmark.batch = 4: export.batch = 1"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(raw, tmp_path, changes, expected):
    for key, value in changes.items():
        put(raw, key, value)
    assert expected in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("prune", {}, "prune: this section is now called pruners"),
        ("quantize", {}, "quantize: this section is now called quantizers"),
        ("prunings", {}, "prunings: this section is now called pruned"),
        (
            "finetune.average_decay",
            0.9,
            "finetune.average_decay = 0.9: unknown key; it is now called finetune.ema_decay",
        ),
        ("finetune.early_input_size", 24, "it is now called finetune.progressive_resize.input_size"),
        ("pruners.l1.prunings", 3, "it is now called pruners.l1.pruning_periods"),
        ("pruners.continued.method", "none_continued", "method = 'none_continued': is now called continued"),
        ("pruners.oto50.layer_norm", "exact_matmul", "layer_norm = 'exact_matmul': was removed"),
        ("quantizers.mine", SEARCH | {"objective": "loss"}, "objective = 'loss': was removed"),
        ("quantizers.mine", {"method": "searched_bits", "search": "integer_programme"}, "is now called ilp"),
        (
            "variants.convnext-none-fp32",
            {"pruning": "x", "quantizer": "fp32"},
            "now called variants.convnext-none-fp32.pru",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(raw, tmp_path, key, value, expected):
    put(raw, key, value)
    if key in ("prune", "quantize", "prunings"):
        del raw[expected.split()[-1]]
    message = refusal(raw, tmp_path)
    assert expected in message
    assert f"{expected.split()[-1]}: is required" not in message  # one line, not two


def test_each_problem_has_a_line(raw, tmp_path):
    put(raw, "pruners.oto50.epochs", MISSING)
    put(raw, "data.image_size", MISSING)
    assert len(refusal(raw, tmp_path).splitlines()) == 3
    assert max(map(len, refusal(raw | {"variantz": raw["variants"]}, tmp_path).splitlines())) < 200


@pytest.mark.parametrize("late", [{"epochs": 1}, {"end_fraction": 1.0}])
@pytest.mark.parametrize("pruner", [OTO | {"layer_norm": "plain"}, DEPGRAPH | {"importance": "group_lasso"}])
def test_an_inexact_cut_without_an_epoch_to_recover_is_refused(raw, tmp_path, late, pruner):
    raw["pruners"]["oto50"] = {"end_fraction": 0.5} | pruner | late
    assert "leaves no whole epoch to recover" in refusal(raw, tmp_path)
    for exact in (OTO, DEPGRAPH):
        raw["pruners"]["oto50"] = exact | {"epochs": 1}
        assert "to recover" not in refusal(raw, tmp_path)  # only that its control is missing


@pytest.mark.parametrize(
    ("section", "entry", "idle", "beside"),
    [
        ("pruners", OTO, {"penalty": 1.0}, "optimizer: hesso"),
        ("pruners", OTO, {"penalty_limit": 1.0}, "optimizer: hesso"),
        ("pruners", OTO, {"half_space": 0.5}, "optimizer: hesso"),
        ("pruners", DHSPG, {"pruning_periods": 5}, "optimizer: dhspg"),
        ("pruners", OTO | {"method": "small_dense"}, {"layer_norm": "plain"}, "method: small_dense"),
        ("pruners", DEPGRAPH, {"allow_partial": True}, "method: depgraph"),
        ("pruners", DEPGRAPH, {"penalty": 1e-4}, "importance: magnitude"),
        ("pruners", DEPGRAPH, {"start_fraction": 0.1}, "importance: magnitude"),
        ("pruners", DEPGRAPH, {"end_fraction": 0.5}, "importance: magnitude"),
        ("pruners", L1, {"pruning_periods": 3}, "schedule: one_shot"),
        ("pruners", L1, {"start_fraction": 0.1}, "schedule: one_shot"),
        ("pruners", L1, {"end_fraction": 0.5}, "schedule: one_shot"),
        ("pruners", L1, {"distillation_temperature": 2.0}, "distillation: 0"),
        (
            "quantizers",
            {"method": "int8_static", "calibration": "minmax"},
            {"percentile": 99.99},
            "calibration: minmax",
        ),
        ("quantizers", UNIFORM, {"calibration_images": 256}, "rounding: nearest"),
        ("quantizers", UNIFORM, {"distillation": 0.5}, "epochs: 0"),
        ("quantizers", SEARCH, {"learning_rate_factor": 0.1}, "epochs: 0"),
        (
            "quantizers",
            SEARCH | {"epochs": 1, "distillation": 0.0},
            {"distillation_temperature": 2.0},
            "distillation: 0",
        ),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_also_at_its_default(raw, tmp_path, section, entry, idle, beside):
    raw[section]["mine"] = entry | idle
    [(key, value)] = idle.items()
    assert refusal(raw, tmp_path).splitlines()[1:] == [
        f"  {section}.mine.{key} = {value!r}: does nothing with {beside}: leave it out"
    ]
    raw[section]["mine"] = entry
    check(written(raw, tmp_path))


def test_the_images_of_progressive_resize_are_smaller(raw, tmp_path):
    size = raw["models"]["convnext"]["input_size"]
    raw["finetune"]["progressive_resize"] = {"input_size": size}
    expected = f"finetune.progressive_resize.input_size = {size}: must be less than models.convnext.input_size = {size}"
    assert expected in refusal(raw, tmp_path)
    raw["models"]["convnext"]["weights"] = "pretrained"  # is trained at its size from the first step
    check(written(raw, tmp_path))
    raw["pruners"] |= {"small": OTO | {"method": "small_dense"}}  # random weights all the same
    raw["pruned"] |= {"convnext-small": {"model": "convnext", "pruner": "small"}}
    assert expected in refusal(raw, tmp_path)


@pytest.mark.parametrize("name", [None, 1, 1000.0])
def test_a_name_that_yaml_does_not_read_as_text_is_refused(raw, tmp_path, name):
    assert f"the name {name!r} is no text" in refusal(raw | {"pruners": raw["pruners"] | {name: L1}}, tmp_path)


def test_a_name_with_a_dot_is_refused_since_dvc_would_split_it(raw, tmp_path):
    raw["pruners"]["oto.5"] = {"method": "none"}
    assert "pruners.oto.5: names hold letters, digits, _ and - only" in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold sections"),
        ("just words", "must hold sections"),
        ("- 1\n- 2\n", "must hold sections"),
        ("a: [1", "not valid YAML: line 1"),
        ("[" * 3000, "nested too deeply"),
        (PARAMS.replace("  seed: 0\n", "  seed: 0\n  seed: 1\n", 1), "line 3: found duplicate key .seed."),
    ],
)
def test_a_file_that_holds_no_sections_is_refused(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected):
        load_params(Params, written(text, tmp_path))
    with pytest.raises(UserError, match="is missing: run from"):
        load_params(Params, tmp_path / "another.yaml")


def test_numbers_that_dvc_writes_without_a_point_are_numbers(raw, tmp_path):
    text = yaml.safe_dump(raw).replace("learning_rate: 0.002", "learning_rate: 5e-05")
    assert load_params(Params, written(text, tmp_path)).finetune.learning_rate == 0.00005


def test_scores_that_are_not_named_have_no_weight():
    oto = Oto(method="oto", group_sparsity=0.5, epochs=1, learning_rate_factor=1.0)
    assert set(oto.importance.model_dump().values()) == {0.2}
    assert [name for name, weight in Importance(taylor_first_order=1.0) if weight] == ["taylor_first_order"]


@pytest.mark.parametrize("target", ["local", "ssh://raspberry", "ssh://pi@raspberry.local:2222", "ssh://10.0.0.7/"])
def test_a_target_is_this_machine_or_an_address(raw, tmp_path, target):
    put(raw, "edge_benchmark.target", target)
    assert check(written(raw, tmp_path)).edge_benchmark.target == target


def test_a_stage_checks_only_the_sections_that_it_reads(raw, tmp_path):
    class Own(Section):
        models: dict[Name, Model]

    path = written(raw | {"finetune": None, "nonsense": 1}, tmp_path)
    assert list(load_params(Own, path).models) == ["convnext"]
    raw["models"]["convnext"]["library"] = "keras"
    with pytest.raises(
        UserError, match=r"models.convnext.library = 'keras': must be 'timm', 'torchvision' or 'custom'"
    ):
        load_params(Own, written(raw, tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "convnext_ato"}, "models.convnext.architecture = 'convnext_ato'"),
        ({"arguments": {"dephts": [1, 1, 1, 1]}}, "unexpected keyword argument 'dephts'"),
        ({"arguments": {"in_chans": 1}}, "models.convnext.arguments: timm convnext_atto: in_chans = 1: is set from"),
        ({"arguments": {"patch_size": 0}}, "with arguments {'patch_size': 0} takes no RGB images of 32 pixels"),
        ({"arguments": {}, "input_size": 8}, "models.convnext: timm convnext_atto takes no RGB images of 8 pixels"),
        ({"arguments": {}, "architecture": "vit_tiny_patch16_224"}, "takes no RGB images of 32 pixels"),
        ({"arguments": {"features_only": True}, "architecture": "resnet18"}, "does not return logits"),
        ({"arguments": {}, "library": "torchvision", "architecture": "googlenet"}, "googlenet has auxiliary outputs"),
        ({"weights": "weights/atto.pth"}, "models.convnext.weights = 'weights/atto.pth': no such file"),
        ({"weights": "."}, ": the folder holds no model.json"),
        ({"weights": "pretrained", "weights_tag": "foo"}, "models.convnext.weights_tag = 'foo': convnext_atto has d2_"),
        ({"weights_tag": "foo"}, "models.convnext.weights_tag = 'foo': does nothing with weights: none"),
        ({"epochs": 0}, "models.convnext: epochs = 0: weights: none leaves nothing to take as it is"),
        ({"normalization": "foo"}, "'weights', 'dataset' or 'imagenet', or a valid list"),
        ({"normalization": [[0.5], 0.2]}, "models.convnext.normalization: 1 means and 3 standard deviations"),
        ({"normalization": "weights"}, "models.convnext: normalization = 'weights': there are none"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(raw, tmp_path, change, reason):
    raw["models"]["convnext"] |= change
    assert reason in refusal(raw, tmp_path)
    if change.get("weights") == "weights/atto.pth":
        (tmp_path / "weights").mkdir()
        model = Model(**raw["models"]["convnext"])
        torch.save(build_network(spec_of(model, 10)).state_dict(), tmp_path / "weights/atto.pth")
        check(written(raw, tmp_path))
        torch.save({"stem.weight": torch.ones(1)}, tmp_path / "weights/atto.pth")
        assert "is not of this network" in refusal(raw, tmp_path)


def test_the_networks_and_weights_are_checked_with_the_channels_of_the_images(raw, tmp_path):
    raw["data"]["channels"] = 1
    model = Model(**raw["models"]["convnext"])
    for channels in (1, 3):  # the filters for colors are summed
        torch.save(build_network(spec_of(model, 10, channels)).state_dict(), tmp_path / f"atto{channels}.pth")
        raw["models"]["convnext"] |= {"weights": f"atto{channels}.pth", "normalization": [0.5, 0.25]}
        assert ", crop, gray" in plan(check(written(raw, tmp_path)))
    raw["data"]["channels"] = 3
    raw["models"]["convnext"]["weights"] = "atto1.pth"
    assert "has shape" in refusal(raw, tmp_path)


def test_a_batch_of_one_image_is_refused_where_batch_norm_would_see_one_value(raw, tmp_path):
    raw["finetune"]["batch_size"] = 1
    check(written(raw, tmp_path))  # a ConvNeXt has no batch norm
    raw["models"]["convnext"] |= {"architecture": "resnet10t", "arguments": {}, "input_size": 32}
    assert "finetune.batch_size = 1: batch norm (layer4.0.bn1) of models.convnext" in refusal(raw, tmp_path)
    raw["models"]["convnext"]["input_size"] = 64
    check(written(raw, tmp_path))


def test_a_network_whose_products_cannot_be_counted_is_refused_before_any_work(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "CUSTOM", tmp_path)
    (tmp_path / "pairs.py").write_text(UNCOUNTABLE)
    raw["models"]["convnext"] |= {"library": "custom", "architecture": "pairs.py", "arguments": {}}
    assert "models.convnext: custom pairs.py: pairs: Bilinear multiplies in" in refusal(raw, tmp_path)


def test_a_network_that_takes_no_images_of_the_first_size_is_refused(raw, tmp_path):
    raw["finetune"]["progressive_resize"] = {"input_size": 8}
    assert "change finetune.progressive_resize.input_size, or the arguments" in refusal(raw, tmp_path)


def test_the_plan_names_every_variant_and_remarks_on_what_is_missing_or_unused(raw, tmp_path):
    raw["data"] |= {"source": "folder", "location": str(tmp_path / "images")}
    lines = plan(check(written(raw, tmp_path))).splitlines()
    assert all(any(line.startswith(f"variant   {key}:") for line in lines) for key in raw["variants"])
    assert [line.split()[1] for line in lines if line.startswith("remark")] == [
        "pruned.convnext-continued:",
        "data.location:",
    ]


def test_the_command_prints_the_plan_or_one_message(raw, tmp_path):
    path = written(raw, tmp_path)
    command = [sys.executable, "-c", "from stages.cli import main; main()", "check"]
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": str(TOP)}, "cwd": tmp_path}
    here = subprocess.run(command, **options)
    assert here.stdout == plan(check(path)) + "\n"
    raw["base"]["seed"] = -1
    found = subprocess.run([*command, str(written(raw, tmp_path))], **options)
    assert found.returncode == 2
    assert found.stderr.splitlines()[0] == f"error: {path}: 1 problem"
    assert len(found.stderr.splitlines()) == 2


@pytest.mark.parametrize("name", committed_params())
def test_every_params_file_in_the_repository_is_valid(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "stages").symlink_to(TOP / "stages")
    (tmp_path / "studies").symlink_to(TOP / "studies")
    path.write_text(committed(name))
    for model in load_params(Params, path).models.values():  # files of weights are not in git
        if model.weights.endswith(".safetensors"):
            (weights := (path.parent / model.weights).resolve()).parent.mkdir(exist_ok=True)
            save_file(build_network(spec_of(model, 10)).state_dict(), weights)
    check(path)


def test_the_default_is_as_small_as_the_design_promises():
    default = yaml.safe_load(committed("params.yaml"))
    assert (len(default["models"]), len(default["pruned"]), len(default["variants"])) <= (1, 4, 8)


def test_dvc_changes_a_value_of_the_default_and_no_other_line(tmp_path):
    """`dvc exp run -S` writes the whole file anew, and wraps entries wider than 80 columns."""
    path = written(committed("params.yaml"), tmp_path)
    with modify_yaml(str(path)) as data:
        data["base"]["seed"] = 17
    assert path.read_text() == re.sub("(?m)^  seed: 0$", "  seed: 17", committed("params.yaml"), count=1)


def test_the_page_of_parameters_is_that_of_the_sections():
    assert (TOP / document.PAGE).read_text() == document.page(), "run python -m stages.params.document"


@pytest.mark.parametrize("section", ["pruners", "quantizers"])
def test_an_exclude_that_names_nothing_in_the_network_is_refused_with_the_nearest_name(raw, tmp_path, section):
    used = {
        entry[section.removesuffix("s")] for entry in raw["pruned" if section == "pruners" else "variants"].values()
    }
    key = next(name for name in sorted(used) if raw[section][name]["method"] in ("oto", "int8_static", "int8_dynamic"))
    raw[section][key]["exclude"] = ["stem", "stages.0"]
    check(written(raw, tmp_path))
    raw[section][key]["exclude"] = ["stem", "stagse.0"]
    assert f"{section}.{key}.exclude = 'stagse.0': names no module of this network; did you mean stages" in refusal(
        raw, tmp_path
    )
    raw[section][key]["exclude"] = ["stem", "stages.*", "head.*"]
    assert f"{section}.{key}.exclude = ['stem', 'stages.*', 'head.*']: leaves no layer" in refusal(raw, tmp_path)
