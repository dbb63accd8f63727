import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from miniature import PARAMS, committed, committed_params

from stages.common.errors import UserError
from stages.params.check import plan
from stages.params.load import load_params
from stages.params.pruners import Importance, Oto
from stages.params.quantizers import LearnedBits
from stages.params.whole import Params

TOP = Path(__file__).parents[2]


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load(PARAMS)


def refusal(raw: dict, folder: Path) -> str:
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as error:
        check_models(load_params(Params, path), path)
    return str(error.value)


@pytest.mark.parametrize("name", committed_params())
def test_every_params_file_in_the_repository_is_valid(name, tmp_path):
    (tmp_path / "stages").symlink_to(TOP / "stages")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(committed(name))
    params = load_params(Params, path)
    check_for_dvc(params, path)
    check_models(params, path)


def test_the_default_is_as_small_as_the_design_promises():
    default = yaml.safe_load(committed("params.yaml"))
    assert len(default["models"]) == 1
    assert len(default["pruned"]) <= 4
    assert len(default["variants"]) <= 8


def test_dvc_changes_a_value_of_the_default_and_no_other_line(tmp_path):
    """`dvc exp run -S` writes the whole file anew, and wraps entries wider than 80 columns."""
    path = tmp_path / "params.yaml"
    path.write_text(committed("params.yaml"))
    with modify_yaml(str(path)) as data:
        data["base"]["seed"] = 17
    assert path.read_text() == re.sub("(?m)^  seed: 0 ", "  seed: 17", committed("params.yaml"), count=1)


def test_an_unknown_key_is_named_with_the_nearest_known_one(raw, tmp_path):
    raw["finetune"]["epoch"] = 3
    assert "finetune.epoch = 3: unknown key; did you mean epochs?" in refusal(raw, tmp_path)


def test_a_wrong_type_is_named_with_path_value_and_what_is_allowed(raw, tmp_path):
    raw["finetune"]["epochs"] = "many"
    assert "finetune.epochs = 'many': must be a valid integer" in refusal(raw, tmp_path)


def test_a_value_out_of_range_inside_a_named_entry_is_named_by_its_path_in_the_file(raw, tmp_path):
    raw["pruners"]["oto50"]["group_sparsity"] = 1.5
    assert "pruners.oto50.group_sparsity = 1.5: must be less than 1" in refusal(raw, tmp_path)


def test_an_unknown_key_inside_a_named_entry_is_named(raw, tmp_path):
    raw["pruners"]["l1"]["sparsty"] = 0.1
    raw["quantizers"]["int8_dynamic"]["perchannel"] = True
    raw["pruners"]["oto50"]["importance"] = {"magnitud": 1.0}
    raw["models"]["convnext"]["inputsize"] = 32
    raw["pruners"]["none"]["epochs"] = 3
    message = refusal(raw, tmp_path)
    assert "pruners.l1.sparsty = 0.1: unknown key; did you mean sparsity?" in message
    assert "quantizers.int8_dynamic.perchannel = True: unknown key; did you mean per_channel?" in message
    assert "pruners.oto50.importance.magnitud = 1.0: unknown key; did you mean magnitude?" in message
    assert "models.convnext.inputsize = 32: unknown key; did you mean input_size?" in message
    assert "pruners.none.epochs = 3: unknown key; known: method" in message


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(raw, tmp_path, value):
    raw["finetune"]["learning_rate"] = value
    raw["edge_benchmark"]["window_seconds"] = value
    message = refusal(raw, tmp_path)
    assert f"finetune.learning_rate = {value}: must be" in message
    assert f"edge_benchmark.window_seconds = {value}: must be" in message


def test_an_unknown_method_lists_the_known_ones(raw, tmp_path):
    raw["pruners"]["oto50"]["method"] = "otto"
    message = refusal(raw, tmp_path)
    assert "pruners.oto50.method = 'otto'" in message
    assert "'l1_unstructured'" in message


def test_a_missing_value_is_named(raw, tmp_path):
    del raw["pruners"]["oto50"]["epochs"]
    del raw["data"]["image_size"]
    message = refusal(raw, tmp_path)
    assert "2 problems" in message
    assert "pruners.oto50.epochs: is required and missing" in message
    assert "data.image_size: is required and missing" in message


@pytest.mark.parametrize(("targets", "given"), [({}, "none"), ({"macs_reduction": 0.5}, "group_sparsity, macs")])
def test_a_structured_pruner_has_exactly_one_target(raw, tmp_path, targets, given):
    if not targets:
        del raw["pruners"]["oto50"]["group_sparsity"]
    raw["pruners"]["oto50"].update(targets)
    assert f"pruners.oto50: give one of group_sparsity, params_reduction and macs_reduction (given: {given}" in refusal(
        raw, tmp_path
    )


def test_a_penalty_above_its_limit_is_refusal(raw, tmp_path):
    del raw["pruners"]["oto50"]["pruning_periods"]
    raw["pruners"]["oto50"] |= {"optimizer": "dhspg", "penalty": 300.0}
    assert "pruners.oto50: penalty 300.0 is above penalty_limit 200.0: lower the one or raise" in refusal(raw, tmp_path)


@pytest.mark.parametrize("key", ["minimum_width", "divisible_by"])
def test_a_width_beyond_any_layer_is_refused(raw, tmp_path, key):
    raw["pruners"]["oto50"][key] = 10**20
    assert f"pruners.oto50.{key} = {10**20}: must be less than or equal to 65536" in refusal(raw, tmp_path)


@pytest.mark.parametrize("late", [{"epochs": 1}, {"end_fraction": 1.0}])
@pytest.mark.parametrize(
    ("pruner", "cause"),
    [
        ({"method": "oto", "layer_norm": "plain"}, "layer_norm: plain"),
        ({"method": "depgraph", "importance": "group_lasso"}, "method: depgraph"),
    ],
)
def test_an_inexact_cut_without_an_epoch_to_recover_is_refused(raw, tmp_path, late, pruner, cause):
    raw["pruners"]["oto50"] = STRUCTURED | {"end_fraction": 0.5} | pruner | late
    expected = f"pruners.oto50: {cause} changes the output when channels are cut, and end_fraction"
    assert expected in refusal(raw, tmp_path)
    for exact in ({"method": "oto"}, {"method": "depgraph", "importance": "magnitude"}):
        raw["pruners"]["oto50"] = STRUCTURED | exact | {"epochs": 1}
        assert "changes the output" not in refusal(raw, tmp_path)  # only that its control is missing


STRUCTURED = {"epochs": 2, "learning_rate_factor": 0.5, "macs_reduction": 0.5}
L1 = {"method": "l1_unstructured", "epochs": 2, "learning_rate_factor": 0.5, "sparsity": 0.8}


@pytest.mark.parametrize(
    ("pruner", "idle", "beside"),
    [
        (STRUCTURED | {"method": "oto"}, {"penalty": 1.0}, "optimizer: hesso"),
        (STRUCTURED | {"method": "oto"}, {"penalty_limit": 1.0}, "optimizer: hesso"),
        (STRUCTURED | {"method": "oto"}, {"half_space": 0.5}, "optimizer: hesso"),
        (STRUCTURED | {"method": "oto", "optimizer": "dhspg"}, {"pruning_periods": 5}, "optimizer: dhspg"),
        (STRUCTURED | {"method": "small_dense"}, {"layer_norm": "plain"}, "method: small_dense"),
        (STRUCTURED | {"method": "depgraph"}, {"allow_partial": True}, "method: depgraph"),
        (STRUCTURED | {"method": "depgraph"}, {"penalty": 1e-4}, "importance: magnitude"),
        (STRUCTURED | {"method": "depgraph"}, {"start_fraction": 0.1}, "importance: magnitude"),
        (STRUCTURED | {"method": "depgraph"}, {"end_fraction": 0.5}, "importance: magnitude"),
        (L1, {"pruning_periods": 3}, "schedule: one_shot"),
        (L1, {"start_fraction": 0.1}, "schedule: one_shot"),
        (L1, {"end_fraction": 0.5}, "schedule: one_shot"),
        (L1, {"distillation_temperature": 2.0}, "distillation: 0"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_also_at_its_default(raw, tmp_path, pruner, idle, beside):
    raw["pruners"]["mine"] = pruner | idle
    [(key, value)] = idle.items()
    expected = f"pruners.mine.{key} = {value!r}: does nothing with {beside}: leave it out"
    assert refusal(raw, tmp_path).splitlines()[1:] == [f"  {expected}"]
    raw["pruners"]["mine"] = pruner
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    load_params(Params, tmp_path / "params.yaml")


SEARCH = {"method": "learned_bits", "average_bits": 4.0}


@pytest.mark.parametrize(
    ("quantizer", "idle", "beside"),
    [
        ({"method": "int8_static", "calibration": "minmax"}, {"percentile": 99.99}, "calibration: minmax"),
        ({"method": "uniform_bits", "bits": 4}, {"calibration_images": 256}, "rounding: nearest"),
        ({"method": "uniform_bits", "bits": 4}, {"distillation": 0.5}, "epochs: 0"),
        (SEARCH, {"learning_rate_factor": 0.1}, "epochs: 0"),
        (SEARCH | {"epochs": 1, "distillation": 0.0}, {"distillation_temperature": 2.0}, "distillation: 0"),
    ],
)
def test_a_quantizers_key_that_would_do_nothing_is_refused(raw, tmp_path, quantizer, idle, beside):
    raw["quantizers"]["mine"] = quantizer | idle
    [(key, value)] = idle.items()
    message = refusal(raw, tmp_path)
    assert f"quantizers.mine.{key} = {value!r}: does nothing with {beside}: leave it out" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"average_bits": 1.5}, "quantizers.mine.average_bits = 1.5: must be greater than or equal to 2"),
        ({"choices": [4, 8], "average_bits": 3.0}, "average_bits = 3.0 is under the 4 bits that every layer needs"),
        ({"choices": [4, 4]}, "choices must rise, each once"),
        ({"choices": [4]}, "quantizers.mine.choices"),
        ({"choices": [2, 9]}, "quantizers.mine.choices.1"),
        ({"evaluations": 0}, "quantizers.mine.evaluations"),
        ({"average_bits": 8.0}, "average_bits = 8.0 leaves nothing to choose"),
        ({"choices": [2, 3], "average_bits": 3.5}, "may have the 3 bits that are the most of choices"),
        ({"learning_rate": -0.1}, "quantizers.mine.learning_rate"),
        ({"rounding": "gptq", "epochs": 2}, "rounding: gptq with epochs: 2: recovery rounds to nearest"),
    ],
)
def test_a_budget_of_bits_that_cannot_be_kept_is_refused(raw, tmp_path, changes, expected):
    raw["quantizers"]["mine"] = SEARCH | changes
    assert expected in refusal(raw, tmp_path)


def test_an_importance_by_name_is_refused_with_the_scores_that_can_be_weighted(raw, tmp_path):
    raw["pruners"]["oto50"]["importance"] = "magnitude"
    message = (
        "pruners.oto50.importance = 'magnitude': must map scores to weights ({magnitude: 1.0}); the scores: magnitude,"
    )
    assert message in refusal(raw, tmp_path)


def test_the_readmes_example_of_a_pruner_fits_into_the_default_params(tmp_path):
    readme = (TOP / "README.md").read_text()
    [example] = [block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "dhspg50" in block]
    raw = yaml.safe_load((TOP / "params.yaml").read_text())
    for section, entries in yaml.safe_load(example).items():
        raw[section] |= entries
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert "variant   convnext-dhspg50-fp32: fp32" in plan(load_params(Params, tmp_path / "params.yaml"))


def test_two_to_four_sparsity_is_refused_at_another_sparsity(raw, tmp_path):
    raw["pruners"]["l1"]["pattern"] = "2:4"
    assert "pruners.l1: pattern 2:4 zeroes half of every layer" in refusal(raw, tmp_path)


def test_two_to_four_sparsity_is_refused_with_the_gradual_schedule(raw, tmp_path):
    raw["pruners"]["l1"] |= {"pattern": "2:4", "sparsity": 0.5, "schedule": "gradual"}
    assert "pruners.l1: pattern 2:4 is chosen at once: set schedule: one_shot, or pattern: none" in refusal(
        raw, tmp_path
    )


def test_a_control_without_the_pruners_distillation_is_no_control(raw, tmp_path):
    raw["pruners"]["oto50"]["distillation"] = 0.5
    assert "with distillation 0.5 at temperature 2.0" in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "entry", "expected"),
    [
        (
            "pruned",
            "atto-none",
            {"model": "atto", "pruner": "none"},
            "pruned.atto-none.model = 'atto': not listed under models",
        ),
        (
            "pruned",
            "convnext-l2",
            {"model": "convnext", "pruner": "l2"},
            "pruned.convnext-l2.pruner = 'l2': not listed under pruners",
        ),
        (
            "variants",
            "convnext-none-int4",
            {"pruned": "convnext-none", "quantizer": "int4"},
            "variants.convnext-none-int4.quantizer = 'int4': not listed under quantize",
        ),
        (
            "variants",
            "best",
            {"pruned": "convnext-none", "quantizer": "fp32"},
            "variants.best: the key must be its joined parts, 'convnext-none-fp32'",
        ),
    ],
)
def test_an_entry_that_names_nothing_or_has_another_key_is_refused(raw, tmp_path, section, key, entry, expected):
    raw[section][key] = entry
    assert expected in refusal(raw, tmp_path)


def test_an_early_input_size_that_is_not_smaller_is_refused(raw, tmp_path):
    size = raw["models"]["convnext"]["input_size"]
    raw["finetune"]["early_input_size"] = size
    told = f"finetune.early_input_size = {size}: must be less than models.convnext.input_size = {size}"
    assert told in refusal(raw, tmp_path)
    raw["models"]["convnext"]["weights"] = "pretrained"  # is trained at its size from the first step
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_params(Params, path).finetune.early_input_size == size
    budget = {"epochs": 2, "learning_rate_factor": 0.5}
    raw["pruners"]["small"] = {"method": "small_dense", "group_sparsity": 0.5} | budget  # fresh weights all the same
    raw["pruners"]["as_long"] = {"method": "continued"} | budget
    raw["pruned"] |= {f"convnext-{key}": {"model": "convnext", "pruner": key} for key in ("small", "as_long")}
    assert told in refusal(raw, tmp_path)


def test_a_model_without_its_baseline_is_refusal(raw, tmp_path):
    del raw["variants"]["convnext-none-fp32"]
    assert "models.convnext: its baseline is missing" in refusal(raw, tmp_path)


def test_pruning_with_recovery_needs_the_control_of_the_same_length(raw, tmp_path):
    raw["pruners"]["oto50"]["epochs"] += 1
    assert "a pruner trains for 3 more epochs at learning_rate_factor 0.5" in refusal(raw, tmp_path)


def test_the_control_must_train_at_the_same_learning_rate(raw, tmp_path):
    raw["pruners"]["continued"]["learning_rate_factor"] = 1.0
    assert "a continued pruner with the same settings must be listed" in refusal(raw, tmp_path)


def test_numbers_that_dvc_writes_without_a_point_are_numbers(raw, tmp_path):
    text = yaml.safe_dump(raw).replace("learning_rate: 0.002", "learning_rate: 5e-05")
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(Params, tmp_path / "params.yaml").finetune.learning_rate == 0.00005


def test_a_key_given_twice_is_refused(tmp_path):
    text = PARAMS.replace("  seed: 0\n", "  seed: 0\n  seed: 1\n", 1)
    (tmp_path / "params.yaml").write_text(text)
    line = text[: text.index("seed: 1")].count("\n") + 1
    with pytest.raises(UserError, match=f"line {line}: found duplicate key .seed.[^\n]*$"):
        load_params(Params, tmp_path / "params.yaml")


def test_names_that_yaml_reads_as_something_else_are_told(raw, tmp_path):
    for name in (None, 1, 1000.0):
        told = refusal(raw | {"pruners": raw["pruners"] | {name: {"method": "none"}}}, tmp_path)
        assert f"prune: the name {name!r} is no text: put it in quotes" in told.replace(f"pruners.{name}:", "prune:")


def test_a_long_value_is_shortened(raw, tmp_path):
    told = refusal(raw | {"variantz": raw["variants"]}, tmp_path)
    assert "variantz = {" in told
    assert max(len(line) for line in told.splitlines()) < 200


def test_a_file_nested_beyond_reason_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("[" * 3000)
    with pytest.raises(UserError, match="nested too deeply"):
        load_params(Params, tmp_path / "params.yaml")


def test_scores_that_are_not_named_have_no_weight():
    assert Oto(method="oto", group_sparsity=0.5, epochs=1, learning_rate_factor=1.0).importance == Importance(
        **dict.fromkeys(Importance.model_fields, 0.2)
    )
    assert Importance(taylor_first_order=1.0).model_dump() == dict.fromkeys(Importance.model_fields, 0.0) | {
        "taylor_first_order": 1.0
    }
    with pytest.raises(ValueError, match="at least one weight must be above 0"):
        Importance(magnitude=0)


def test_a_controller_that_cannot_take_a_step_is_refused():
    settings = {"method": "learned_bits", "average_bits": 4.0, "samples": 10}
    assert LearnedBits(**settings, evaluations=20).samples == 10
    with pytest.raises(ValueError, match="set it to 20 or more, or lower samples"):
        LearnedBits(**settings, evaluations=19)


def test_digits_have_no_location(raw, tmp_path):
    raw["data"] |= {"source": "digits", "location": "somewhere"}
    assert "data.location = 'somewhere': does nothing with source: digits" in refusal(raw, tmp_path)


@pytest.mark.parametrize(
    ("launcher", "told"),
    [
        ("mpirun -n 2", "must be python, or torchrun with its options"),
        ("python -O", "must be python, or torchrun with its options"),
        ("", "must be python, or torchrun with its options"),
        ('torchrun "--nproc-per-node', "no closing quotation"),
    ],
)
def test_a_launcher_that_is_none_is_refused(raw, tmp_path, launcher, told):
    raw["base"]["launcher"] = launcher
    assert f"base.launcher = {launcher!r}: {told}" in refusal(raw, tmp_path)


@pytest.mark.parametrize(("section", "key", "value"), [("base", "seed", 2**32), ("base", "threads", 100_000)])
def test_numbers_that_no_generator_or_machine_takes_are_refused(raw, tmp_path, section, key, value):
    raw[section][key] = value
    assert f"{section}.{key} = {value}: must be less than" in refusal(raw, tmp_path)


def test_a_crop_that_may_miss_the_image_is_refused(raw, tmp_path):
    size = raw["data"]["image_size"]
    raw["finetune"]["crop_padding"] = size
    assert f"finetune.crop_padding = {size}: must be less than data.image_size" in refusal(raw, tmp_path)


def test_mixing_needs_an_even_batch(raw, tmp_path):
    raw["finetune"] |= {"batch_size": 33, "mixup": 0.2}
    assert "it must be even" in refusal(raw, tmp_path)


def test_an_unknown_architecture_is_refused_with_the_nearest_names(raw, tmp_path):
    raw["models"]["convnext"]["architecture"] = "convnext_ato"
    message = refusal(raw, tmp_path)
    assert message.startswith(f"{tmp_path / 'params.yaml'}: 1 problem")
    assert "models.convnext.architecture = 'convnext_ato'" in message
    assert "convnext_atto" in message


def test_names_with_dots_are_refused_since_dvc_would_split_them(raw, tmp_path):
    raw["pruners"]["oto.5"] = {"method": "none"}
    raw["variants"]["convnext-none-fp32"]["pruned"] = "convnext none"
    message = refusal(raw, tmp_path)
    assert "pruners.oto.5: names hold letters, digits, _ and - only" in message
    assert "variants.convnext-none-fp32.pruned = 'convnext none': names hold letters" in message


@pytest.mark.parametrize("root", ["..", "nowhere", "stages"])
def test_a_root_without_the_code_is_refused(raw, tmp_path, root):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw | {"root": root}))
    with pytest.raises(UserError, match=f"root = '{root}': .* holds no folder `stages` with the code"):
        check_for_dvc(load_params(Params, path), path)


def test_a_section_left_out_is_refused_since_dvc_knows_no_defaults(raw, tmp_path):
    del raw["profile"], raw["root"]
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError) as error:
        check_for_dvc(load_params(Params, path), path)
    assert "\n  profile: is required and missing\n  root = '.'" in str(error.value)
    assert str(error.value).endswith("\n  root: is required and missing")


def test_arguments_that_the_architecture_does_not_take_are_refusal(raw, tmp_path):
    raw["models"]["convnext"]["arguments"]["dephts"] = [1, 1, 1, 1]
    message = refusal(raw, tmp_path)
    assert "models.convnext.arguments: timm convnext_atto does not take arguments" in message
    assert "unexpected keyword argument 'dephts'" in message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arguments": {"in_chans": 1}}, "timm convnext_atto with arguments {'in_chans': 1} takes no RGB images of 32"),
        ({"arguments": {"patch_size": 0}}, "with arguments {'patch_size': 0} takes no RGB images of 32 pixels"),
        ({"arguments": {}, "input_size": 8}, "models.convnext: timm convnext_atto takes no RGB images of 8 pixels"),
        ({"arguments": {}, "architecture": "vit_tiny_patch16_224"}, "takes no RGB images of 32 pixels"),
        ({"arguments": {"features_only": True}, "architecture": "resnet18"}, "something other than logits"),
        ({"arguments": {}, "library": "torchvision", "architecture": "googlenet"}, "googlenet has auxiliary outputs"),
    ],
)
def test_a_network_that_takes_no_images_of_its_size_is_refused(raw, tmp_path, change, reason):
    raw["models"]["convnext"] |= {"input_size": 32} | change
    assert reason in refusal(raw, tmp_path)


def test_a_network_that_takes_no_images_of_the_early_size_is_refused(raw, tmp_path):
    raw["models"]["convnext"] |= {"input_size": 32}
    raw["finetune"]["early_input_size"] = 8
    assert "takes no RGB images of 8 pixels" in (found := refusal(raw, tmp_path))
    assert "change finetune.early_input_size, or the arguments" in found


def test_a_weights_file_is_looked_for_beside_the_params(raw, tmp_path):
    raw["models"]["convnext"]["weights"] = "weights/atto.pth"
    assert "models.convnext.weights = 'weights/atto.pth': no such file" in refusal(raw, tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/atto.pth").touch()
    check_models(load_params(Params, tmp_path / "params.yaml"), tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("models", {}, "models: needs entries, at least 1"),
        ("finetune", None, "finetune: is empty: its keys are missing"),
        ("pruners", {"none": None}, "pruners.none: is empty: its keys are missing"),
    ],
)
def test_an_empty_section_is_named(raw, tmp_path, section, value, words):
    raw[section] = value
    assert words in refusal(raw, tmp_path)


@pytest.mark.parametrize("text", ["", "just words", "a: [1", "- 1\n- 2\n"])
def test_a_file_that_holds_no_sections_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(Params, tmp_path / "params.yaml")


def test_the_command_prints_the_plan_of_the_file_given_or_at_hand(raw, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw | {"root": str(TOP)}))
    command = [sys.executable, "-m", "stages.common.params"]
    given = subprocess.run([*command, str(path)], cwd=TOP, capture_output=True, text=True, check=True)
    here = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(TOP)}
    )
    printed = given.stdout
    assert printed == here.stdout == plan(load_params(Params, path)) + "\n"
    assert all(f"variant   {key}:" in printed for key in raw["variants"])


def test_the_plan_remarks_on_images_that_are_not_there(raw, tmp_path):
    raw["data"] |= {"source": "folder", "location": str(tmp_path / "images")}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))

    def remarks() -> list[str]:
        told = plan(load_params(Params, tmp_path / "params.yaml")).splitlines()
        return [line for line in told if line.startswith("remark    data.location")]

    assert remarks()[0].startswith(f"remark    data.location: {tmp_path / 'images'} is not there (seen from ")
    (tmp_path / "images").mkdir()
    assert remarks() == []


def test_the_plan_remarks_on_a_pruning_that_no_variant_uses(raw, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    remarks = [
        line for line in plan(load_params(Params, tmp_path / "params.yaml")).splitlines() if line.startswith("remark")
    ]
    assert remarks == [
        "remark    pruned.convnext-continued: no variant uses it: it would be made, and neither measured nor reported"
    ]


def test_a_bad_file_ends_the_command_with_exit_code_2_and_no_traceback(raw, tmp_path):
    raw["base"]["seed"] = -1
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    run = subprocess.run(
        [sys.executable, "-m", "stages.common.params", str(tmp_path / "params.yaml")],
        cwd=TOP,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"error: {tmp_path}/params.yaml: 1 problem",
        "  base.seed = -1: must be greater than or equal to 0",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "pi@raspberry"}, "edge_benchmark.target = 'pi@raspberry': must be local or ssh://user@host[:port]"),
        ({"target": "ssh://-oProxyCommand=x"}, "must be local or ssh://"),
        ({"target": "ssh://a;touch b"}, "must be local or ssh://"),
        ({"target": "ssh://pi@raspberry:70000"}, "with a port from 1 to 65535"),
        ({"target": "ssh://[::1]:22"}, "give an IPv6 address a name"),
        ({"soak": {"variant": "convnext-none-fp32", "minutes": 0.1}}, "6 s in windows of 5 s: it needs at least 4"),
        (
            {"soak": {"variant": "convnext-none-fp32", "minutes": 9, "images_per_second": 0.1}},
            "at 0.1 images_per_second windows of 5 s would be empty",
        ),
        ({"runtimes": ["openvino"]}, "runtimes must hold onnxruntime"),
        ({"runtimes": ["onnxruntime", "onnxruntime"]}, "runtimes: each once"),
        ({"threads": 2, "affinity": [0]}, "affinity names 1 cores for 2 threads"),
        ({"affinity": [0, 0]}, "affinity: each core once"),
        ({"soak": {"variant": "another", "minutes": 1}}, "edge_benchmark.soak.variant = 'another': not listed"),
        ({"printed": {"variant": "another"}}, "edge_benchmark.printed.variant = 'another': not listed"),
    ],
)
def test_settings_of_the_edge_benchmark_that_cannot_be_are_refused(raw, tmp_path, change, words):
    raw["edge_benchmark"] |= change
    assert words in refusal(raw, tmp_path)


def test_files_that_take_one_image_at_a_time_are_not_timed_in_batches(raw, tmp_path):
    raw["export"]["batch"] = 1
    raw["edge_benchmark"]["batch"] = 4
    assert "edge_benchmark.batch = 4: export.batch = 1" in refusal(raw, tmp_path)


@pytest.mark.parametrize("target", ["local", "ssh://raspberry", "ssh://pi@raspberry.local:2222", "ssh://10.0.0.7/"])
def test_a_target_is_this_machine_or_an_address(raw, tmp_path, target):
    raw["edge_benchmark"]["target"] = target
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load_params(Params, path).edge_benchmark.target == target
