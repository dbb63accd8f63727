"""report: from what was measured to what a person reads: tables, statistics, claims, plots, cards and one page.

in    reports/profile/<variant>/ and reports/edge/ of the variants listed in params.yaml, reports/curves/
out   reports/: metrics.json, run.json, variants.json, variants.csv, claims.json, cards/<variant>.md, plots/*.csv and
      *.png, index.html
run   python -m stages.report

Nothing is written before everything is computed, so a broken input leaves the last good report whole.
"""

from dataclasses import dataclass

from stages.common import paths
from stages.common.errors import run_stage
from stages.common.files import atomic_file, atomic_folder, write_csv, write_json, write_text
from stages.common.params import load_params
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
    """Each file whole or not at all; the folders hold exactly what this report has."""
    with atomic_folder(paths.REPORTS / "cards") as folder:
        for variant, text in report.cards.items():
            write_text(folder / f"{variant}.md", text)
    with atomic_folder(paths.PLOTS) as folder:
        for name, table in report.tables.items():
            write_csv(folder / f"{name}.csv", table.rows, table.columns)
        for name, picture in report.pictures.items():
            with atomic_file(folder / f"{name}.png") as temporary:
                temporary.write_bytes(picture.png)
    write_csv(paths.REPORTS / "variants.csv", report.rows, ROW_KEYS)
    write_json(paths.REPORTS / "variants.json", report.rows)
    write_json(paths.REPORTS / "claims.json", report.claims)
    write_json(paths.REPORTS / "run.json", report.run)
    write_text(paths.REPORTS / "index.html", report.page)
    write_json(paths.REPORTS / "metrics.json", report.metrics)


def main() -> None:
    write_report(make_report(read_run(load_params())))


if __name__ == "__main__":
    run_stage(main)
