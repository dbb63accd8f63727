import json
from pathlib import Path

import pytest
from reporting.synthetic_run import EDGE, change_arrays, change_profile, params_of, read, write_run

import studies.edge_ai.claims as claims
from stages import report
from stages.common.errors import UserError
from stages.params.load import load_params
from stages.reporting.edge import describe_run
from stages.reporting.rows import assemble_rows
from studies.edge_ai.claims import FAILS, HOLDS, NOT_TESTED, ONLY_AS_COUNTED, Evidence, assess, read_claims

FILE = Path(claims.__file__).with_name("claims.yaml")


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The entries by id of a run that is written with these settings and then changed."""
    monkeypatch.chdir(tmp_path)

    def found(params: dict | None = None, change=lambda folder: None, **settings) -> dict[str, dict]:
        write_run(tmp_path, params or params_of(), **settings)
        change(tmp_path)
        run = read()
        evidence = Evidence(load_params(claims.Params), assemble_rows(run), describe_run(run))
        return {entry["id"]: entry for entry in assess(read_claims(FILE), evidence)}

    return found


@pytest.mark.parametrize(
    ("there", "honest", "expected"),
    [(0.95, 0.95, HOLDS), (0.93, 0.91, HOLDS), (0.95, 0.0, ONLY_AS_COUNTED), (0.5, 0.0, FAILS), (0.8, 0.8, FAILS)],
)
def test_an_effect_of_at_least_the_published_size(there: float, honest: float, expected: str):
    assert claims.verdict_at_least(0.95, 0.05, there, honest, 0.05) == expected


def test_sizes_hold_and_visible_counts_hold_only_as_counted(verdicts):
    found = verdicts()
    visible = found["dynamic_quantization_params_reduction"]
    assert (visible["verdict"], visible["ours_honest"]) == (ONLY_AS_COUNTED, 0)
    assert visible["ours_as_counted_there"] == pytest.approx(0.94, abs=1e-4)
    assert found["combination_params_reduction"]["ours_honest"] == pytest.approx(0.75)
    for key in ("structured_pruning_size_reduction", "combination_size_reduction", "combination_beats_each_part"):
        assert found[key]["verdict"] == HOLDS
    assert found["combination_beats_each_part"]["variants"] == ["atto-oto50-int8", "atto-oto50-fp32", "atto-none-int8"]
    for key in ("edge_top1", "edge_latency_ms", "pretraining_top1_delta"):
        assert found[key]["verdict"] == NOT_TESTED


@pytest.mark.parametrize(("visible", "verdict"), [(0.2, ONLY_AS_COUNTED), (0.34, FAILS)])
def test_the_wide_tolerance_is_for_visible_counts_only(verdicts, visible: float, verdict: str):
    def change(folder: Path) -> None:
        change_profile(folder, "atto-none-int8", params_visible=round(2_400_000 * visible))

    assert verdicts(change=change)["dynamic_quantization_params_reduction"]["verdict"] == verdict


def test_the_variant_nearest_to_the_operating_point_answers(verdicts):
    oto = {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5}
    pruners = {"none": {"method": "none"}} | {f"oto{n}": oto | {"group_sparsity": n / 100} for n in (50, 90)}

    def change(folder: Path) -> None:
        change_profile(folder, "atto-none-fp32", artifact_bytes=10_000_000)
        for variant, left in {"oto50-fp32": 0.27, "oto90-fp32": 0.05, "oto50-int8": 0.11, "oto90-int8": 0.02}.items():
            change_profile(folder, f"atto-{variant}", artifact_bytes=round(10_000_000 * left))

    params = params_of(pruners=pruners, variants=[(p, q) for p in pruners for q in ("fp32", "int8")])
    found = verdicts(params, change)
    assert found["structured_pruning_size_reduction"]["variants"] == ["atto-oto50-fp32"]
    assert found["combination_size_reduction"]["variants"] == ["atto-oto50-int8"]
    assert found["combination_top1_gain"]["verdict"] == NOT_TESTED  # no control


def test_unstructured_pruning_is_judged_by_time(verdicts):
    def change(folder: Path) -> None:
        path = folder / "reports/edge/edge.json"
        edge = json.loads(path.read_text())
        time = {row["variant"]: row for row in edge["rows"] if row["runtime"] == "onnxruntime"}
        time["atto-l1-fp32"]["latency_ms_p50"] = 0.7 * time["atto-none-fp32"]["latency_ms_p50"]
        path.write_text(json.dumps(edge))

    found = verdicts(change=change)["unstructured_pruning_macs_reduction"]
    assert (found["ours_as_counted_there"], found["verdict"]) == (0, ONLY_AS_COUNTED)
    assert found["ours_honest"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("accuracy", "n", "verdict"),
    [
        ((0.7, 0.76, 0.76), 2000, ONLY_AS_COUNTED),  # longer training explains the gain
        ((0.7, 0.71, 0.8), 2000, HOLDS),
        ((0.76, 0.7, 0.76), 20, FAILS),  # too few images
    ],
)
def test_a_gain_counts_over_the_control_and_beyond_chance(verdicts, accuracy, n: int, verdict: str):
    names = ("none", "continued", "oto50")
    found = verdicts(n=n, accuracy=dict(zip(names, accuracy, strict=True)))["combination_top1_gain"]
    assert found["verdict"] == verdict
    assert found["variants"] == ["atto-oto50-int8", "atto-continued-fp32"]


def test_without_room_a_gain_is_not_tested(verdicts):
    def change(folder: Path) -> None:
        path = folder / "reports/profile/atto-none-fp32/predictions.npz"
        change_arrays(path, lambda stored: stored | {"predicted": stored["label"]})
        change_profile(folder, "atto-none-fp32", top1=1.0)

    found = verdicts(change=change)["combination_top1_gain"]
    assert found["verdict"] == NOT_TESTED
    assert "no room" in found["how"]


@pytest.mark.parametrize(
    ("top1", "high", "verdict"), [(0.842, 0.92, FAILS), (0.842, 0.925, NOT_TESTED), (0.925, 0.94, HOLDS)]
)
def test_printed_images_answer_by_their_interval(verdicts, top1: float, high: float, verdict: str):
    def change(folder: Path) -> None:
        path = folder / "reports/edge/printed.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"top1_printed": top1, "top1_printed_ci_high": high}))

    found = verdicts(params_of() | {"edge_benchmark": EDGE}, change)["edge_top1"]
    assert (found["verdict"], found["ours_honest"], found["variants"]) == (verdict, top1, ["atto-oto50-int8"])


@pytest.mark.parametrize(("worse", "verdict"), [(False, FAILS), (True, HOLDS)])
def test_pretrained_networks_are_compared_with_their_twins_from_scratch(verdicts, worse: bool, verdict: str):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"scratch": network, "tuned": network | {"weights": "pretrained"}}

    def change(folder: Path) -> None:
        for path in folder.glob("reports/profile/scratch-[ol]*/predictions.npz"):
            change_arrays(path, lambda stored: stored | {"predicted": stored["label"] + int(worse)})
            change_profile(folder, path.parent.name, top1=1.0 - worse)

    found = verdicts(params_of(models=models), change)["pretraining_top1_delta"]
    assert found["verdict"] == verdict
    assert {"tuned-oto50-int8", "scratch-oto50-int8"} <= set(found["variants"])
    assert "tuned-continued-fp32" not in found["variants"]


@pytest.mark.parametrize(
    ("worse", "epochs", "verdict"), [(False, 4, FAILS), (True, 4, HOLDS), (True, 3, NOT_TESTED), (True, 2, NOT_TESTED)]
)
def test_networks_compressed_from_given_weights_are_compared_with_fine_tuned_ones(
    verdicts, worse: bool, epochs: int, verdict: str
):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16, "weights": "pretrained"}
    models = {"given": network | {"epochs": 0}, "tuned": network | {"epochs": 2}}
    budget = {"learning_rate_factor": 0.5, "epochs": epochs}
    pruners = {
        "none": {"method": "none"},
        "oto50": {"method": "oto", "epochs": 2, "learning_rate_factor": 0.5, "group_sparsity": 0.5},
        "oto90": {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5, "group_sparsity": 0.9},
        "long": {"method": "oto", "group_sparsity": 0.5} | budget,
        "continued": {"method": "continued"} | budget,
    }

    def change(folder: Path) -> None:
        for path in folder.glob("reports/profile/given-*/predictions.npz"):
            change_arrays(path, lambda stored: stored | {"predicted": stored["label"] + int(worse)})
            change_profile(folder, path.parent.name, top1=1.0 - worse)

    variants = [(pruner, quantizer) for pruner in pruners for quantizer in ("fp32", "int8")]
    found = verdicts(params_of(models=models, pruners=pruners, variants=variants), change)
    assert found["fine_tuning_top1_gain"]["verdict"] == verdict
    assert found["pretraining_top1_delta"]["verdict"] == NOT_TESTED
    if verdict != NOT_TESTED:
        pairs = ["tuned-oto50-fp32", "given-long-fp32", "tuned-oto50-int8", "given-long-int8"]
        assert found["fine_tuning_top1_gain"]["variants"] == pairs


def test_the_command_needs_only_the_committed_report_and_a_file_of_claims(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, params_of() | {"report": {"claims": str(FILE)}})
    report.main()
    (tmp_path / "reports/profile").rename(tmp_path / "profile")
    claims.main()
    entries = json.loads(Path("reports/claims.json").read_text())
    assert [entry["id"] for entry in entries] == [claim.id for claim in read_claims(FILE)]
    assert f"**{ONLY_AS_COUNTED}**" in Path("reports/claims.md").read_text()
    params = Path("params.yaml")
    params.write_text(params.read_text().replace(str(FILE), "null"))
    with pytest.raises(UserError, match=r"report\.claims"):
        claims.main()
