from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, recall_score
from synthetic_run import change_profile, params_of, read, write_defects, write_run

from stages.reporting.inputs import CompletedRun, Params
from stages.reporting.rows import (
    ROW_KEYS,
    Choices,
    Row,
    assemble_rows,
    choose,
    control_of,
    group_of,
    groups_of,
    headline_metrics,
    points_of,
)
from stages.reporting.statistics import holm, mcnemar_p

OLD_KEYS = (
    "variant model pruner quantizer seed group run_id n_test top1 top1_ci_low top1_ci_high top1_delta p_value agreement"
    " params params_nonzero params_visible macs macs_visible bops artifact_bytes size_bytes size_gzip_bytes"
    " latency_ms_p50 latency_ms_p95 latency_ratio peak_rss_bytes load_ms runtime calibration_error corrupted_top1"
)


def report_params(raw: dict) -> Params:
    return Params.model_validate({key: raw[key] for key in raw if key in Params.model_fields})


def chosen() -> Choices:
    run = read()
    return choose(run, assemble_rows(run))


def test_rows_have_every_key_that_readers_know_in_one_order(run: CompletedRun, rows: list[Row]):
    assert [key for key in ROW_KEYS if key in OLD_KEYS.split()] == OLD_KEYS.split()
    assert [list(row) for row in rows] == [list(ROW_KEYS)] * len(run.params.variants)
    assert {row["run_id"] for row in rows} == {run.run_id}


def test_the_baseline_is_not_compared_with_itself(run: CompletedRun):
    rows = {row["variant"]: row for row in assemble_rows(run)}
    assert rows["atto-none-fp32"]["top1_delta"] is None
    assert rows["atto-none-fp32"]["p_value"] is None
    assert rows["atto-none-int8"]["p_value"] is not None


def test_p_values_are_mcnemar_corrected_over_the_table(run: CompletedRun):
    rows = {row["variant"]: row for row in assemble_rows(run)}
    base = run.variants["atto-none-fp32"].correct
    raw = {}
    for variant, measured in run.variants.items():
        if variant != "atto-none-fp32":
            raw[variant] = mcnemar_p(int((measured.correct & ~base).sum()), int((base & ~measured.correct).sum()))
    for variant, p in holm(raw).items():
        assert rows[variant]["p_value"] == pytest.approx(p)
    assert rows["atto-l1-fp32"]["p_value"] < 0.001


def test_seeds_share_a_group_and_its_p_value(seeds_run: CompletedRun):
    groups = groups_of(assemble_rows(seeds_run))
    assert group_of(seeds_run.params, "atto-s2-oto50-int8") == "atto-oto50-int8"
    assert groups["atto-oto50-int8"].variants == ["atto-oto50-int8", "atto-s1-oto50-int8", "atto-s2-oto50-int8"]
    l1 = groups["atto-l1-fp32"]
    assert len({row["p_value"] for row in l1.rows}) == 1
    assert l1.std("top1") == pytest.approx(np.std([row["top1"] for row in l1.rows], ddof=1))
    assert l1.change.delta == pytest.approx(np.mean([row["top1_delta"] for row in l1.rows]))


def test_a_model_with_other_settings_is_another_group():
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"a": network | {"seed": 0}, "b": network | {"seed": 1, "arguments": {"depths": [1, 1, 1, 1]}}}
    params = report_params(params_of(models=models))
    assert group_of(params, "a-oto50-fp32") != group_of(params, "b-oto50-fp32")


def test_the_headline_is_the_smallest_within_the_drop_on_validation(run: CompletedRun):
    choices = choose(run, assemble_rows(run))
    assert choices.headline == "atto-oto50-int8"  # 0.79 on validation, the limit is 0.8 - 0.01
    assert choices.most_accurate == "atto-continued-fp32"


def test_the_headline_is_chosen_without_the_test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of(), accuracy={"none": 0.8, "continued": 0.8, "oto50": 0.79, "l1": 0.8})
    change_profile(tmp_path, "atto-oto50-int8", validation_top1=0.78)
    monkeypatch.chdir(tmp_path)
    assert chosen().headline == "atto-oto50-fp32"  # the next in size


def test_a_poor_network_that_compresses_well_is_no_headline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"good": network, "poor": network | {"arguments": {"depths": [1, 1, 1, 1]}}}
    write_run(tmp_path, params_of(models=models))
    for variant in params_of(models=models)["variants"]:
        if variant.startswith("poor"):
            change_profile(tmp_path, variant, validation_top1=0.5, size_bytes=1000)
    monkeypatch.chdir(tmp_path)
    choices = chosen()
    assert choices.headline == "good-oto50-int8"
    assert choices.fastest.startswith("good")


def test_the_control_is_float_of_the_same_model_and_trained_as_long():
    oto = {"method": "oto", "learning_rate_factor": 0.5, "group_sparsity": 0.5}
    more = {"method": "continued", "learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "more4": more | {"epochs": 4},
        "more8": more | {"epochs": 8},
        "oto4": oto | {"epochs": 4},
        "oto8": oto | {"epochs": 8},
    }
    variants = [(pruner, quantizer) for pruner in pruners for quantizer in ("int8", "fp32")]
    params = report_params(params_of(seeds=2, pruners=pruners, variants=variants))
    assert control_of(params, "atto-s1-oto8-int8") == "atto-s1-more8-fp32"
    assert control_of(params, "atto-oto4-fp32") == "atto-more4-fp32"
    assert control_of(params, "atto-more4-int8") == "atto-more4-fp32"
    assert control_of(params, "atto-more4-fp32") is None
    assert control_of(params, "atto-none-int8") is None


def test_the_recovery_of_a_quantizer_counts_as_training_too():
    training = {"learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "more4": training | {"method": "continued", "epochs": 4},
        "oto3": training | {"method": "oto", "epochs": 3, "group_sparsity": 0.5},
        "more3": training | {"method": "continued", "epochs": 3},
    }
    recovery = {"method": "uniform_bits", "bits": 3, "learning_rate_factor": 0.5, "distillation": 0}
    quantizers = {
        "q1": recovery | {"epochs": 1},
        "q4": recovery | {"epochs": 4},
        "taught": recovery | {"epochs": 4, "distillation": 0.5},
        "slow": recovery | {"epochs": 1, "learning_rate_factor": 0.1},
    }
    raw = params_of(pruners=pruners, variants=[(p, q) for p in pruners for q in ("fp32", *quantizers)])
    raw["quantizers"] |= quantizers
    params = report_params(raw)
    assert control_of(params, "atto-none-q4") == "atto-more4-fp32"
    assert control_of(params, "atto-oto3-q1") == "atto-more4-fp32"
    assert control_of(params, "atto-oto3-q4") is None
    assert control_of(params, "atto-oto3-fp32") == "atto-more3-fp32"
    assert control_of(params, "atto-none-taught") is None  # no control that a teacher helped
    assert control_of(params, "atto-oto3-slow") is None  # four epochs, but not by one setting


def test_the_difference_to_the_control_is_paired_and_corrected(run: CompletedRun, rows: list[Row]):
    with_control = {row["variant"]: row for row in rows if row["control"] is not None}
    assert set(with_control) == {"atto-oto50-fp32", "atto-oto50-int8", "atto-l1-fp32"}
    control = run.variants["atto-continued-fp32"].correct
    raw = {}
    for name, row in with_control.items():
        correct = run.variants[name].correct
        raw[name] = mcnemar_p(int((correct & ~control).sum()), int((control & ~correct).sum()))
        assert row["control_delta"] == pytest.approx(correct.mean() - control.mean())
        assert row["control_ci_low"] < row["control_delta"] < row["control_ci_high"]
    assert {name: row["control_p_value"] for name, row in with_control.items()} == pytest.approx(holm(raw))


def test_rows_of_an_older_report_make_groups_too(rows: list[Row]):
    group = groups_of([{key: row[key] for key in OLD_KEYS.split()} for row in rows])["atto-oto50-fp32"]
    assert group.change.delta == group.rows[0]["top1_delta"]
    assert (group.change.low, group.control) == (None, None)


def test_headline_metrics_are_few_and_flat(run: CompletedRun, rows: list[Row]):
    metrics = headline_metrics(rows, choose(run, rows))
    assert len(metrics) <= 12
    assert all(isinstance(value, int | float | str) for value in metrics.values())
    assert metrics["headline_size_ratio"] > 10
    assert metrics["headline_validation_top1"] == 0.79
    assert not any("small_dense" in key for key in metrics)


def test_the_front_holds_the_cheapest_and_the_most_accurate(rows: list[Row]):
    points = {point.first["variant"]: point for point in points_of(rows, "size_bytes")}
    assert points[min(rows, key=lambda row: row["size_bytes"])["variant"]].on_front
    best = max(rows, key=lambda row: row["top1"])
    assert points[best["variant"]].on_front
    assert (points[best["variant"]].low, points[best["variant"]].high) == (best["top1_ci_low"], best["top1_ci_high"])
    assert not points["atto-l1-fp32"].on_front


def test_seeds_stand_on_the_front_by_their_mean_and_not_by_the_luckiest_of_them():
    same = {"model": "m", "pruner": "p", "top1_ci_low": 0.0, "top1_ci_high": 1.0}
    figures = [("steady", 0.80, 10), ("steady", 0.80, 12), ("lucky", 0.84, 13), ("lucky", 0.70, 11)]
    rows = [
        same | {"variant": f"{group}-{n}", "group": group, "quantizer": group, "top1": top1, "macs": macs}
        for n, (group, top1, macs) in enumerate(figures)
    ]
    steady, lucky = points_of(rows, "macs")
    assert (steady.group.variants, lucky.group.variants) == (["steady-0", "steady-1"], ["lucky-2", "lucky-3"])
    assert (steady.cost, steady.accuracy, steady.low, steady.high) == pytest.approx((11, 0.80, 0.80, 0.80))
    assert (lucky.cost, lucky.accuracy) == pytest.approx((12, 0.77))
    assert (lucky.low, lucky.high) == pytest.approx((0.77 - 0.07 * 2**0.5, 0.77 + 0.07 * 2**0.5))
    assert (steady.on_front, lucky.on_front) == (True, False)


def test_balanced_figures_are_those_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_defects(tmp_path, params_of(), {"none": 8, "oto50": 2, "continued": 6})
    monkeypatch.chdir(tmp_path)
    run = read()
    rows = {row["variant"]: row for row in assemble_rows(run)}
    for variant, row in rows.items():
        predicted = run.variants[variant].predicted
        recalls = recall_score(run.labels, predicted, average=None)
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(run.labels, predicted), abs=1e-6)
        assert row["balanced_accuracy_ci_low"] < row["balanced_accuracy"] < row["balanced_accuracy_ci_high"]
        assert (row["worst_class"], row["worst_images"]) == ("defect", 20)
        assert row["worst_recall"] == pytest.approx(recalls[1])
        assert row["classes_at_zero"] == (recalls == 0).sum()
    dense, control, pruned = (rows[f"atto-{pruner}-fp32"] for pruner in ("none", "continued", "oto50"))
    for key, other in (("balanced_accuracy_delta", dense), ("balanced_control_delta", control)):
        assert pruned[key] == pytest.approx(pruned["balanced_accuracy"] - other["balanced_accuracy"], abs=2e-6)
    assert pruned["balanced_delta_ci_low"] < pruned["balanced_accuracy_delta"] < pruned["balanced_delta_ci_high"]
    assert pruned["top1_delta"] > 0 > pruned["balanced_accuracy_delta"]
    assert pruned["balanced_p_value"] > pruned["p_value"]  # 6 defects against 30 false alarms
    assert dense["balanced_p_value"] is dense["balanced_accuracy_delta"] is None


def test_with_classes_of_one_size_balanced_accuracy_and_its_tests_are_those_of_top1(rows: list[Row]):
    for row in rows:
        assert row["balanced_accuracy"] == pytest.approx(row["top1"], abs=1e-6)
        assert row["balanced_p_value"] == row["p_value"]
        assert row["balanced_control_p_value"] == row["control_p_value"]


def test_the_metric_decides_whether_a_network_that_finds_defects_is_chosen(tmp_path, monkeypatch):
    """Without any defect found top-1 is 99 %, with 8 of 20 found 97.4 %: top-1 prefers the constant answer."""
    for metric, expected in (("top1", "atto-oto50-int8"), ("balanced_accuracy", "atto-none-int8")):
        folder = tmp_path / metric
        folder.mkdir()
        write_defects(folder, params_of(), {"none": 8}, metric)
        monkeypatch.chdir(folder)
        run = read()
        rows = assemble_rows(run)
        choices = choose(run, rows)
        assert choices.headline == expected
        accurate = next(row for row in rows if row["variant"] == choices.most_accurate)
        assert (accurate["worst_recall"] > 0) == (metric == "balanced_accuracy")
