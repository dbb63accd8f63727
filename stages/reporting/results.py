"""Print the results of a finished or committed report as Markdown.

In:  `reports/variants.json`, `run.json` and `metrics.json` of a folder.
Out: on the terminal, the text of `reports/summary.md`.
Run: edgewise results [FOLDER]
"""

import argparse
from pathlib import Path

from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import read_json
from stages.reporting.summary import summary_of


def summary_in(folder: Path) -> str:
    """The summary of the report in a folder.

    Raises:
        UserError: if a file is missing, broken or of another run.
    """
    reports = folder / paths.REPORTS
    rows, run, metrics = (read_json(reports / f"{name}.json") for name in ("variants", "run", "metrics"))
    try:
        if {row["run_id"] for row in rows} != {run["run_id"]}:
            raise UserError(f"{reports}: variants.json and run.json are of different runs: run `dvc repro report`")
        return summary_of(rows, run, metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{reports}: a value is missing ({type(error).__name__}: {error}): run `dvc repro report` there"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(), help="the folder of params.yaml; the current one by default"
    )


def run(arguments: argparse.Namespace) -> None:
    print(summary_in(arguments.folder), end="")
