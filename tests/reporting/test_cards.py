import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from PIL import Image

from stages.datasets.decode import decode
from stages.params.quantizers import UniformBits
from stages.reporting.cards import card
from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import assemble_rows, groups_of
from stages.reporting.wording import describe


def cards(run: CompletedRun) -> dict[str, str]:
    rows = assemble_rows(run)
    return {row["variant"]: card(run, row, groups_of(rows)) for row in rows}


def test_the_metadata_in_front_is_what_the_hub_reads(run: CompletedRun):
    metadata = yaml.safe_load(cards(run)["atto-oto50-int8"].split("---\n")[1])
    assert metadata["pipeline_tag"] == "image-classification"
    assert "datasets" not in metadata  # the hub accepts only names of its own data sets
    value = metadata["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == round(float(run.variants["atto-oto50-int8"].correct.mean()), 6)


def test_the_card_warns_of_a_busy_machine_and_an_unsteady_variant(run: CompletedRun):
    unsteady = [row.model_copy(update={"unsteady": True}) for row in run.timings]
    text = cards(replace(run, edge=run.edge | {"busy": True}, timings=unsteady))["atto-l1-fp32"]
    assert "- Other programs used this machine" in text
    assert "another value: atto-l1-fp32 in onnxruntime." in text
    assert "Other programs" not in cards(run)["atto-l1-fp32"]


def test_the_card_has_numbers_lineage_limits_and_licences(run: CompletedRun, rows: list):
    text = cards(run)["atto-oto50-int8"]
    group = groups_of(rows)["atto-oto50-int8"]
    for words in (
        "n = 400",
        "a" * 64,
        "b" * 64,
        "seed 0",
        run.run_id,
        "9 times 200 test images",
        "data: CC0",
        "A CPU of the tests",
        f"{100 * group.change.delta:+.2f} points".replace("-", "\N{MINUS SIGN}"),
        "random initialization",
    ):
        assert words in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| change against atto-none-fp32" in lines
    assert "| change against atto-continued-fp32, the control that trained as long" in lines


def test_differences_over_seeds_are_pooled(seeds_run: CompletedRun):
    text = cards(seeds_run)["atto-s1-oto50-int8"]
    (line,) = [line for line in text.splitlines() if line.startswith("| change against atto-s1-none-fp32")]
    assert "pooled over 3 seeds" in line
    delta = groups_of(assemble_rows(seeds_run))["atto-oto50-int8"].change.delta
    assert f"{100 * abs(delta):.2f} points" in line


def test_layers_left_in_float_are_listed(run: CompletedRun):
    measured = run.variants["atto-oto50-int8"]
    artifact = measured.artifact.model_copy(update={"float_layers": ["embedding", "gate"]})
    changed = replace(run, variants=run.variants | {"atto-oto50-int8": replace(measured, artifact=artifact)})
    assert "| layers left in float | 2: embedding, gate |" in cards(changed)["atto-oto50-int8"]
    assert "left in float" not in cards(run)["atto-oto50-int8"]


def test_the_loading_code_is_ten_lines_that_parse_and_feed_pixels(run: CompletedRun):
    for text in cards(run).values():
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
        ast.parse(code)
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
        assert '{"pixels": pixels}' in code
        assert "(16, 16)" in code


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", ["crop", "letterbox", "stretch"])
def test_the_loading_code_runs_on_a_real_model(
    run: CompletedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, geometry: str, channels: int
):
    monkeypatch.chdir(tmp_path)
    measured = run.variants["atto-oto50-int8"]
    profile = measured.profile.model_copy(update={"geometry": geometry, "channels": channels})
    run = replace(run, variants=run.variants | {"atto-oto50-int8": replace(measured, profile=profile)})
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    weight = np.zeros((channels, 5), np.float32)
    weight[:, 3] = 1  # whatever is bright is a cat
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 16, 16, channels])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(np.array([1, 2]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "model.onnx")
    code = re.search(r"```python\n(.*?)```", cards(run)["atto-oto50-int8"], re.DOTALL).group(1)
    sideways = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    turn = Image.Exif()
    turn[0x0112] = 6
    transparent = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
    for picture, settings in [(sideways, {"format": "JPEG", "exif": turn}), (transparent, {"format": "PNG"})]:
        picture.save("picture.jpg", **settings)
        printed = []
        names = {"print": printed.append}
        exec(compile(code, "card", "exec"), names)
        assert printed == ["cat"]
        expected, _ = decode(Path("picture.jpg"), 16, geometry, channels)
        assert np.array_equal(names["pixels"][0], expected)


def test_only_settings_that_were_given_are_told():
    quantizer = UniformBits(method="uniform_bits", bits=4)
    assert describe("uniform_4", quantizer) == "uniform_4 (uniform_bits, bits 4)"
