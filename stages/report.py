"""report: from what was measured to what a person reads: tables, statistics, claims, plots, cards and one page.

in    reports/profile/<variant>/ and reports/edge/ of the variants listed in params.yaml, reports/curves/
out   reports/: metrics.json, run.json, variants.json, variants.csv, claims.json, cards/<variant>.md, plots/*.csv and
      *.png, index.html
run   python -m stages.report

Nothing is written before everything is computed, so a broken input leaves the last good report whole.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stages.common import paths
from stages.common.errors import run_stage
from stages.common.files import atomic_file, atomic_folder, write_csv, write_json, write_text
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.cards import card
from stages.reporting.claims import assess, read_claims
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import Picture, draw_all
from stages.reporting.rows import ROW_KEYS, assemble_groups, assemble_rows, choose, describe_run, headline_metrics
from stages.reporting.tables import Table, plot_tables


@dataclass(frozen=True)
class Report:
    """All that is written, in memory."""

    metrics: dict[str, float | int | str]
    run: dict
    rows: list[dict]
    claims: list[dict]
    cards: dict[str, str]
    tables: dict[str, Table]
    pictures: dict[str, Picture]
    page: str


def make_report(run: Run) -> Report:
    """Everything the report says of a run; deterministic, reads and writes nothing but its own templates."""
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    choices = choose(run)
    claims = assess(read_claims(), run, rows, groups)
    pictures = draw_all(run, rows, groups, choices)
    return Report(
        headline_metrics(run, rows, choices),
        describe_run(run),
        rows,
        claims,
        {row["variant"]: card(run, row, groups) for row in rows},
        plot_tables(run, rows, choices),
        pictures,
        render_page(run, rows, groups, choices, claims, pictures),
    )


def write_report(report: Report) -> None:
    """All files are written before the first takes its name: a full disk leaves the last report as it was.

    The folders hold exactly what this report has.
    """
    with ExitStack() as stack:

        def unfinished(name: str) -> Path:
            return stack.enter_context(atomic_file(paths.REPORTS / name))

        cards = stack.enter_context(atomic_folder(paths.REPORTS / "cards"))
        for variant, text in report.cards.items():
            write_text(cards / f"{variant}.md", text)
        plots = stack.enter_context(atomic_folder(paths.PLOTS))
        for name, table in report.tables.items():
            write_csv(plots / f"{name}.csv", table.rows, table.columns)
        for name, picture in report.pictures.items():
            (plots / f"{name}.png").write_bytes(picture.png)
        write_csv(unfinished("variants.csv"), report.rows, ROW_KEYS)
        write_json(unfinished("variants.json"), report.rows)
        write_json(unfinished("claims.json"), report.claims)
        write_json(unfinished("run.json"), report.run)
        write_text(unfinished("index.html"), report.page)
        write_json(unfinished("metrics.json"), report.metrics)


def main() -> None:
    write_report(make_report(read_run(load_params(Params))))


if __name__ == "__main__":
    run_stage(main)
