import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_run import change_edge, change_profile, page_of, read

from stages.common.errors import UserError
from stages.reporting.edge import describe_run, exports_of, lost_classes, marks_of, runtimes_of, too_few_images
from stages.reporting.plots import soak
from stages.reporting.wording import printed_lines, soak_lines

VARIANT = "atto-oto50-int8"


def test_the_fastest_runtime_of_each_variant_is_named_with_its_lead(edge_folder):
    heads, table = runtimes_of(read())
    assert heads[1:-1] == ["onnxruntime", "openvino", "torch-eager"]
    lines = {line[0]: line[1:] for line in table}
    assert lines["atto-none-fp32"][-1] == "openvino (2.00\u00d7 as fast as onnxruntime)"
    assert lines["atto-none-fp32"][2].startswith("8.00 ms")
    assert lines[VARIANT][1:] == ("\u2013", "\u2013", "onnxruntime")  # OpenVINO does not run it
    assert lines["atto-l1-fp32"][2] == "\u2013"  # PyTorch times only the dense network
    page = page_of(read())
    assert "Requested but not available: torch-compile is not installed: do this." in page
    assert page.count("<li>openvino does not run it: why</li>") == 1


def test_there_is_no_table_where_no_other_runtime_was_asked_for(run):
    assert runtimes_of(run) is None
    facts = describe_run(run)
    assert (soak_lines(facts), printed_lines(facts), soak(run), facts["marks"]) == ([], [], None, [])


def test_a_busy_throttled_or_unsteady_run_is_marked(edge_folder):
    rows = json.loads((edge_folder / "reports/edge/edge.json").read_text())["rows"]
    rows[0]["unsteady"] = True
    change_edge(edge_folder, busy=True, throttled=True, rows=rows)
    run = read()
    busy, throttled, unsteady = marks_of(run, run.variants)
    assert "Other programs" in busy
    assert "throttled" in throttled
    assert unsteady.endswith("atto-none-fp32 in onnxruntime.")
    assert marks_of(run, [VARIANT]) == [busy, throttled]


def test_speed_ups_that_the_run_before_told_otherwise_are_marked(edge_folder):
    repeat = {"run_id": "before", "compared": 6, "largest": 0.096, "apart": [f"{VARIANT} in onnxruntime"]}
    change_edge(edge_folder, repeat=repeat)
    run = read()
    (mark,) = marks_of(run, [VARIANT])
    assert "(before, same machine and files)" in mark
    assert mark.endswith(f"(at most 9.6 %): {VARIANT} in onnxruntime.")
    assert marks_of(run, ["atto-l1-fp32"]) == []
    change_edge(edge_folder, repeat=None)
    assert marks_of(read(), run.variants) == []


def test_a_file_that_is_not_faithful_to_its_artifact_is_named(edge_folder):
    run = read()
    assert exports_of(run, run.variants) == []
    change_profile(edge_folder, "atto-none-fp32", agreement=0.99)
    change_profile(edge_folder, "atto-l1-fp32", agreement=0.9975)  # one image of 400
    top1 = json.loads((edge_folder / "reports/profile" / VARIANT / "profile.json").read_text())["top1"]
    change_profile(edge_folder, VARIANT, quantized_operators=5, agreement=0.9, top1_torch=top1 - 0.01)
    run = read()
    assert exports_of(run, run.variants) == [
        "atto-none-fp32 (the same class on 99.00 %)",
        f"{VARIANT} (top-1 differs by 1.00 %)",
    ]
    assert marks_of(run, run.variants)[-1].endswith("differs by 1.00 %).")


def test_soak_and_printed_samples_stand_on_the_page_with_their_figures(edge_folder):
    run = read()
    page = page_of(run)
    for words in (
        "0 of 10,800",
        "+0.05 % [\N{MINUS SIGN}1.00, +1.10]",
        "84.20 % [81.80 %, 86.30 %]",
        "1,000, seed 0",
        "torch-compile is not installed",
    ):
        assert words in page
    assert soak(run).title == f"Soak test of {VARIANT}: stable"
    assert describe_run(run)["printed"]["top1_printed"] == 0.842


def test_a_device_without_pytorch_has_its_baseline_in_onnx_runtime(edge_folder):
    rows = json.loads((edge_folder / "reports/edge/edge.json").read_text())["rows"]
    rows = [row | {"baseline_runtime": "onnxruntime"} for row in rows if row["runtime"] == "onnxruntime"]
    change_edge(edge_folder, rows=rows, left_out=[])
    run = read()
    assert run.baselines["atto"].runtime == "onnxruntime"
    assert describe_run(run)["baseline_runtime"] == "ONNX Runtime"


def test_a_soak_or_printed_samples_of_another_run_are_refused_by_name(edge_folder):
    printed = edge_folder / "reports/edge/printed.json"
    content = json.loads(printed.read_text())
    printed.write_text(json.dumps(content | {"onnx_sha256": "0" * 64}))
    with pytest.raises(UserError, match=rf"{VARIANT}: .*printed.json describes {VARIANT}, model.onnx 000000000000"):
        read()
    printed.unlink()
    with pytest.raises(UserError, match=rf"{VARIANT}: .*printed.json is missing"):
        read()
    printed.write_text(json.dumps(content))
    change_edge(edge_folder, soak=None)
    with pytest.raises(UserError, match=rf"{VARIANT}: .*edge.json holds no soak test of it"):
        read()


def test_with_balanced_accuracy_chance_is_one_in_as_many_classes_and_an_image_counts_by_its_class(run):
    dense = "atto-none-fp32"
    report = run.params.report.model_copy(update={"metric": "balanced_accuracy"})
    run = replace(run, params=run.params.model_copy(update={"report": report}))
    assert too_few_images(run, run.variants) == []
    measured = run.variants[dense]
    profile = measured.profile.model_copy(update={"n_validation_smallest_class": 4})
    constant = replace(measured, profile=profile, predicted=np.zeros_like(run.labels))
    chance, few = too_few_images(replace(run, variants=run.variants | {dense: constant}), [dense])
    assert "(balanced accuracy 20.0 %" in chance
    assert "a constant answer has 20.0 %" in chance
    assert "One of the 4 validation images of the smallest class is 5.0 % of balanced accuracy" in few


def test_variants_that_give_up_a_class_or_all_but_one_are_told(run):
    assert lost_classes(run, run.variants) == []

    def losing(names: list[str], **others: list[str]) -> list[str]:
        found = dict(run.variants)
        for variant, never in {"atto-none-fp32": names, **others}.items():
            profile = found[variant].profile.model_copy(update={"validation_never_right": never})
            found[variant] = replace(found[variant], profile=profile)
        return lost_classes(replace(run, variants=found), found)

    [mark] = losing([], **{"atto-l1-fp32": ["cat"], "atto-none-int8": ["cat"]})
    assert "for cat in atto-l1-fp32, atto-none-int8" in mark or "for cat in atto-none-int8, atto-l1-fp32" in mark
    assert losing(["cat"], **{"atto-l1-fp32": ["cat"]}) == []  # the dense network never got it right either
    [mark] = losing(["cat"], **{"atto-l1-fp32": ["bird", "cat"]})
    assert "for bird in atto-l1-fp32" in mark
    constant = replace(run.variants["atto-l1-fp32"], predicted=np.full_like(run.labels, 3))
    [mark] = lost_classes(replace(run, variants=run.variants | {"atto-l1-fp32": constant}), run.variants)
    assert mark == "Every test image is classified as cat by atto-l1-fp32."


def test_a_dense_network_at_chance_and_very_few_validation_images_are_told(run):
    dense = "atto-none-fp32"
    assert too_few_images(run, run.variants) == []
    most = float(np.bincount(run.labels).max() / len(run.labels))
    measured = run.variants[dense]
    profile = measured.profile.model_copy(update={"n_validation": 24})
    answers = np.where(np.arange(len(run.labels)) < most * len(run.labels) + 4, run.labels, run.labels - 1)
    poor = replace(measured, profile=profile, predicted=answers % len(run.classes))
    assert most < poor.correct.mean() < most + 0.02
    too_poor = replace(run, variants=run.variants | {dense: poor})
    chance, few = too_few_images(too_poor, [dense])
    assert "Ship this one: " in page_of(run)
    assert "Ship this one: " not in page_of(too_poor)
    assert "Nothing to ship yet" in page_of(too_poor)
    assert chance.startswith(f"{dense} is not measurably better than always predicting")
    assert "One of the 24 validation images is 4.2 % of top-1, more than the allowed drop (1.0 %)" in few
