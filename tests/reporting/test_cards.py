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
from stages.reporting.cards import card, describe
from stages.reporting.inputs import Run
from stages.reporting.rows import assemble_groups, assemble_rows


def cards(run: Run) -> dict[str, str]:
    groups = assemble_groups(run)
    return {row["variant"]: card(run, row, groups) for row in assemble_rows(run, groups)}


def test_the_metadata_in_front_is_what_the_hub_reads(run: Run):
    text = cards(run)["atto-oto50-int8"]
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["pipeline_tag"] == "image-classification"
    assert "datasets" not in metadata  # only names of data sets on the hub may stand there
    value = metadata["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == round(float(run.variants["atto-oto50-int8"].correct.mean()), 6)


def test_the_card_says_that_its_times_are_of_a_busy_machine(run: Run):
    slow = replace(run, edge=run.edge | {"busy": True}, timings=[row | {"unsteady": True} for row in run.timings])
    text = cards(slow)["atto-l1-fp32"]
    assert "- Other programs were using this machine" in text
    assert "may tell another: atto-l1-fp32 in onnxruntime." in text
    assert "Other programs" not in cards(run)["atto-l1-fp32"]


def test_the_card_says_numbers_lineage_limits_and_licences(run: Run):
    text = cards(run)["atto-oto50-int8"]
    for words in (
        "n = 400",
        "a" * 64,
        "b" * 64,
        "seed 0",
        run.run_id,
        "## Limits",
        "| calibration error |",
        "the mean over noise, blur, JPEG at growing severities (9 times 200 test images)",
        "data: CC0",
        "Holm",
        "A CPU of the tests",
        "had no part in training or choice",
        "against atto-none-fp32 |",
        "against atto-continued-fp32, the control that trained as long |",
    ):
        assert words in text
    assert "random initialisation" in text


def test_differences_over_seeds_are_pooled_and_say_so(seeds_run: Run):
    group = assemble_groups(seeds_run)["atto-oto50-int8"]
    text = cards(seeds_run)["atto-s1-oto50-int8"]
    (line,) = [line for line in text.splitlines() if line.startswith("| against atto-s1-none-fp32")]
    assert "pooled over 3 seeds" in line
    assert f"{100 * abs(group.difference.delta):.2f} points" in line
    assert "control that trained as long, pooled over 3 seeds" in text


def test_the_loading_code_is_ten_lines_that_parse_and_feed_pixels(run: Run):
    for text in cards(run).values():
        code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
        ast.parse(code)
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
        assert '{"pixels": pixels}' in code
        assert "(16, 16)" in code


def test_the_loading_code_runs_on_a_real_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    weight = np.zeros((3, 5), np.float32)
    weight[:, 3] = 1  # whatever is bright is a cat
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 16, 16, 3])],
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
        expected, _ = decode(Path("picture.jpg"), 16)
        assert np.array_equal(names["pixels"][0], expected)


def test_only_settings_that_were_given_are_told():
    quantizer = UniformBits(method="uniform_bits", bits=4)
    assert describe("uniform_4", quantizer) == "uniform_4 (uniform_bits, bits 4)"
