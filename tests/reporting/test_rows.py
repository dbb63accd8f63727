import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import params_of, write_run

from stages.common.params import Params, load_params
from stages.reporting.inputs import Run, read_run
from stages.reporting.rows import (
    ROW_KEYS,
    assemble_groups,
    assemble_rows,
    choose,
    group_of,
    headline_metrics,
    mark_front,
)
from stages.reporting.statistics import holm, mcnemar_p

DESIGN_KEYS = (
    "variant model pruner quantizer seed group run_id n_test top1 top1_ci_low top1_ci_high top1_delta p_value agreement"
    " params params_nonzero params_visible macs macs_visible bops artifact_bytes size_bytes size_gzip_bytes"
    " latency_ms_p50 latency_ms_p95 latency_ratio peak_rss_bytes load_ms runtime"
)


def test_rows_say_what_the_design_names_in_its_order(run: Run):
    rows = assemble_rows(run, assemble_groups(run))
    assert " ".join(ROW_KEYS) == DESIGN_KEYS
    assert [list(row) for row in rows] == [list(ROW_KEYS)] * len(run.params.variants)
    assert {row["run_id"] for row in rows} == {run.run_id}


def test_the_baseline_is_not_compared_with_itself(run: Run):
    rows = {row["variant"]: row for row in assemble_rows(run, assemble_groups(run))}
    assert rows["atto-none-fp32"]["top1_delta"] is None
    assert rows["atto-none-fp32"]["p_value"] is None
    assert rows["atto-none-int8"]["p_value"] is not None


def test_p_values_are_mcnemar_corrected_over_the_table(run: Run):
    rows = {row["variant"]: row for row in assemble_rows(run, assemble_groups(run))}
    base = run.variants["atto-none-fp32"].correct
    raw = {}
    for variant, measured in run.variants.items():
        if variant != "atto-none-fp32":
            raw[variant] = mcnemar_p(int((measured.correct & ~base).sum()), int((base & ~measured.correct).sum()))
    for variant, p in holm(raw).items():
        assert rows[variant]["p_value"] == pytest.approx(p)
    assert rows["atto-l1-fp32"]["p_value"] < 0.001


def test_seeds_share_a_group_and_its_p_value(seeds_run: Run):
    groups = assemble_groups(seeds_run)
    rows = assemble_rows(seeds_run, groups)
    assert group_of(seeds_run.params, "atto-s2-oto50-int8") == "atto-oto50-int8"
    assert groups["atto-oto50-int8"].variants == ["atto-oto50-int8", "atto-s1-oto50-int8", "atto-s2-oto50-int8"]
    assert len({row["p_value"] for row in rows if row["group"] == "atto-l1-fp32"}) == 1
    tops = [row["top1"] for row in rows if row["group"] == "atto-l1-fp32"]
    assert groups["atto-l1-fp32"].top1_deviation == pytest.approx(np.std(tops, ddof=1))


def test_a_model_with_other_settings_is_another_group():
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"a": network | {"seed": 0}, "b": network | {"seed": 1, "arguments": {"depths": [1, 1, 1, 1]}}}
    params = Params.model_validate(params_of(models=models))
    assert group_of(params, "a-oto50-fp32") != group_of(params, "b-oto50-fp32")


def test_the_headline_is_the_smallest_within_the_drop_on_validation(run: Run):
    choices = choose(run)
    assert choices.headline == "atto-oto50-int8"  # 0.79 on validation, the limit is 0.8 - 0.01
    assert choices.most_accurate == "atto-continued-fp32"


def test_the_headline_is_chosen_without_the_test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path, params_of(), accuracy={"none": 0.8, "continued": 0.8, "oto50": 0.79, "l1": 0.8})
    path = tmp_path / "reports/profile/atto-oto50-int8/profile.json"
    profile = json.loads(path.read_text())
    path.write_text(json.dumps(profile | {"validation_top1": 0.78}))
    monkeypatch.chdir(tmp_path)
    assert choose(read_run(load_params())).headline == "atto-oto50-fp32"  # the next in size


def test_headline_metrics_are_few_and_flat(run: Run):
    metrics = headline_metrics(run, assemble_rows(run, assemble_groups(run)), choose(run))
    assert len(metrics) <= 10
    assert all(isinstance(value, int | float | str) for value in metrics.values())
    assert metrics["headline_size_ratio"] > 10
    assert not any("small_dense" in key for key in metrics)


def test_the_front_holds_the_cheapest_and_the_most_accurate(run: Run):
    rows = assemble_rows(run, assemble_groups(run))
    flags = mark_front(rows, "size_bytes")
    assert flags[min(rows, key=lambda row: row["size_bytes"])["variant"]]
    assert flags[max(rows, key=lambda row: row["top1"])["variant"]]
    assert not flags["atto-l1-fp32"]
