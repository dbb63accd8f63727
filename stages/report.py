"""report: tables, statistics, pictures, model cards, a page and a Markdown summary from the measurements.

in    reports/profile/<variant>/ and reports/edge/ of the variants listed in params.yaml, reports/curves/
out   reports/: metrics.json, run.json, variants.json, variants.csv, summary.md, index.html, cards/<variant>.md,
      plots/*.csv and *.png
run   python -m stages.report

Nothing is written before everything is computed, so a broken input leaves the last good report whole.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common import paths
from stages.common.errors import run_stage
from stages.common.files import atomic_file, atomic_folder, write_csv, write_json, write_text
from stages.params.load import load_params
from stages.reporting.cards import card
from stages.reporting.drawing import Picture
from stages.reporting.edge import describe_run
from stages.reporting.inputs import CompletedRun, Params, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import draw_all
from stages.reporting.rows import ROW_KEYS, Row, assemble_rows, choose, groups_of, headline_metrics
from stages.reporting.summary import summary_of
from stages.reporting.tables import Table, plot_tables


@dataclass(frozen=True)
class Report:
    """All outputs in memory."""

    rows: list[Row]
    run: dict[str, Any]
    metrics: dict[str, Any]
    summary: str
    cards: dict[str, str]
    tables: dict[str, Table]
    pictures: dict[str, Picture]
    page: str


def make_report(run: CompletedRun) -> Report:
    """Deterministic; reads and writes nothing but its own templates."""
    rows = assemble_rows(run)
    choices, facts, groups = choose(run, rows), describe_run(run), groups_of(rows)
    metrics = headline_metrics(rows, choices)
    pictures = draw_all(run, rows, choices)
    return Report(
        rows,
        facts,
        metrics,
        summary_of(rows, facts, metrics),
        {row["variant"]: card(run, row, groups) for row in rows},
        plot_tables(run, choices),
        pictures,
        render_page(run, rows, facts, metrics, choices, pictures),
    )


def write_report(report: Report) -> None:
    """Write all files under temporary names before the first takes its name: a full disk leaves the last report whole.

    The folders hold exactly the files of this report.
    """
    with ExitStack() as stack:

        def unfinished(name: str) -> Path:
            return stack.enter_context(atomic_file(paths.REPORTS / name))

        cards = stack.enter_context(atomic_folder(paths.REPORTS / "cards"))
        for variant, text in report.cards.items():
            write_text(cards / f"{variant}.md", text)
        plots = stack.enter_context(atomic_folder(paths.PLOTS))
        for name, (columns, rows) in report.tables.items():
            write_csv(plots / f"{name}.csv", rows, columns)
        for name, picture in report.pictures.items():
            (plots / f"{name}.png").write_bytes(picture.png)
        write_csv(unfinished("variants.csv"), report.rows, ROW_KEYS)
        write_json(unfinished("variants.json"), report.rows)
        write_json(unfinished("run.json"), report.run)
        write_text(unfinished("summary.md"), report.summary)
        write_text(unfinished("index.html"), report.page)
        write_json(unfinished("metrics.json"), report.metrics)


def main() -> None:
    write_report(make_report(read_run(load_params(Params))))


if __name__ == "__main__":
    run_stage(main)
