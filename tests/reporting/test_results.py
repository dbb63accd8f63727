import json
from pathlib import Path

import pytest
from synthetic_run import params_of, read, write_defects

from stages import cli, report
from stages.common.errors import UserError
from stages.reporting import results
from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import assemble_rows
from stages.reporting.summary import findings_of, summary_of
from stages.reporting.wording import bytes_text, ms_text


def table_of(summary: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in summary.splitlines() if "|" in line]
    return {line[0]: line for line in lines[2:]}


@pytest.fixture(scope="module")
def made(run: CompletedRun) -> report.Report:
    return report.make_report(run)


def test_the_summary_has_headline_table_and_findings(made: report.Report):
    rows = {row["variant"]: row for row in made.rows}
    head, _, rest = made.summary.partition("\n| variant")
    assert "**Ship `atto-oto50-int8`: 705 KB" in head
    assert "control `atto-continued-fp32`" in head
    assert f"times smaller than the dense network ({bytes_text(rows['atto-none-fp32']['size_bytes'])})" in head
    assert f"instead of {ms_text(rows['atto-none-fp32']['latency_ms_p50'])} in ONNX Runtime" in head
    table = table_of(made.summary)
    assert list(table) == list(rows)
    row = rows["atto-l1-fp32"]
    top1 = f"{100 * row['top1']:.2f} [{100 * row['top1_ci_low']:.2f}, {100 * row['top1_ci_high']:.2f}]"
    assert table["atto-l1-fp32"][1] == top1
    balanced = (f"{100 * row[f'balanced_accuracy{end}']:.2f}" for end in ("", "_ci_low", "_ci_high"))
    assert table["atto-l1-fp32"][2] == "{} [{}, {}]".format(*balanced)
    assert table["atto-l1-fp32"][4] == "< 0.001"
    for words in ("## Findings", "`atto-oto50-int8` is the smallest", "n = 400", "A CPU of the tests"):
        assert words in rest


def test_seeds_share_a_line_of_the_table(seeds_run: CompletedRun):
    rows = assemble_rows(seeds_run)
    made = report.make_report(seeds_run)
    table = table_of(made.summary)
    assert list(table) == list(dict.fromkeys(row["group"] for row in rows))
    assert "\N{PLUS-MINUS SIGN}" in table["atto-l1-fp32"][1]


def test_warnings_soak_and_prints_are_findings(made: report.Report):
    run = made.run | {"marks": ["Other programs used this machine."]}
    assert findings_of(made.rows, run, made.metrics)[-1] == "Warning: Other programs used this machine."


def test_data_that_support_no_conclusion_recommend_nothing(made: report.Report):
    assert "**Ship `" in made.summary
    assert "**Ship `" not in summary_of(made.rows, made.run | {"inconclusive": True}, made.metrics)


def test_committed_files_give_the_same_text_without_a_rerun(folder: Path, capsys, monkeypatch):
    report.main()
    text = (folder / "reports/summary.md").read_text()
    for kind in ("profile", "edge", "curves"):
        (folder / "reports" / kind).rename(folder / kind)
    monkeypatch.setattr("sys.argv", ["edgewise", "results"])
    cli.main()
    assert capsys.readouterr().out == text


def test_files_of_an_older_report_give_a_summary_too(made: report.Report):
    new = ("delta_ci", "control", "validation", "balanced", "worst", "classes_at_zero", "metric")
    rows = [{key: value for key, value in row.items() if not key.startswith(new)} for row in made.rows]
    run = {key: value for key, value in made.run.items() if key not in ("confidence", "headline_max_drop", "marks")}
    summary = summary_of(rows, run, made.metrics)
    assert list(table_of(summary)) == [row["variant"] for row in rows]
    assert "control" not in summary
    assert "balanced" not in summary


def test_files_of_two_runs_or_without_a_value_are_refused(folder: Path):
    report.main()
    path = folder / "reports/run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"run_id": "other"}))
    with pytest.raises(UserError, match="different runs"):
        results.summary_in(folder)
    path.write_text(json.dumps({key: value for key, value in run.items() if key != "protocol"}))
    with pytest.raises(UserError, match="'protocol'"):
        results.summary_in(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        results.summary_in(folder)


def test_a_constant_answer_is_never_recommended_in_silence(tmp_path: Path, capsys, monkeypatch):
    write_defects(tmp_path, params_of(), {})
    monkeypatch.chdir(tmp_path)
    made = report.make_report(read())
    constant = "classifies none of the 20 test images of defect correctly (dense network: 1 such class)."
    assert "**Ship" not in made.summary
    assert f"**atto-oto50-int8 {constant}**" in made.summary
    assert "99.0 % top-1, 50.0 % balanced accuracy" in made.summary
    assert made.page.index(constant) < made.page.index("</section>")
    assert all(constant in card for card in made.cards.values())
    assert any("Every test image is classified as ok by" in mark for mark in made.run["marks"])
    monkeypatch.setattr("sys.argv", ["edgewise", "choose", "--max-size", "1MB"])
    cli.main()
    assert f"atto-oto50-int8 {constant}" in " ".join(capsys.readouterr().out.split())


def test_a_class_that_only_the_headline_gives_up_is_named(tmp_path: Path, monkeypatch):
    write_defects(tmp_path, params_of(), {"none": 8})
    monkeypatch.chdir(tmp_path)
    made = report.make_report(read())
    assert "of defect correctly (dense network: 0 such classes)." in made.summary


def test_with_balanced_accuracy_as_the_metric_all_words_are_about_it(tmp_path: Path, capsys, monkeypatch):
    write_defects(tmp_path, params_of(), {"none": 8}, "balanced_accuracy")
    monkeypatch.chdir(tmp_path)
    made = report.make_report(read())
    assert "the smallest file whose validation balanced accuracy is within 10 points" in made.summary
    assert "Against the dense network, balanced accuracy changes by" in made.summary
    assert "classifies none" not in made.summary
    assert "\N{MINUS SIGN}18.99 [" in table_of(made.summary)["atto-oto50-int8"][3]
    assert "test balanced accuracy" in made.pictures["pareto_size"].alt
    monkeypatch.setattr("sys.argv", ["edgewise", "choose", "--max-drop", "5"])
    cli.main()
    assert capsys.readouterr().out.startswith("chosen            atto-none-int8\n")
