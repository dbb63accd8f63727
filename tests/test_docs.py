"""README and docs: links lead somewhere, commands name what exists, and the example of a pruner is valid."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from benchmarks import networks
from stages.cli import COMMANDS
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.wording import bytes_text, p_text, points_text

TOP = Path(__file__).parents[1]
PAGES = [path.relative_to(TOP).as_posix() for path in [*sorted(TOP.glob("*.md")), *sorted(TOP.glob("docs/**/*.md"))]]


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_readme_is_short():
    lines = (TOP / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", prose(TOP / page)) if "://" not in link]
    targets = [((TOP / page).parent / file if file else TOP / page, anchor) for file, _, anchor in links]
    assert [file for file, _ in targets if not file.exists()] == []
    assert [(file, anchor) for file, anchor in targets if anchor and anchor not in anchors(file)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_exists(page):
    commands = "\n".join(blocks(TOP / page, "bash"))
    modules = re.findall(r"python -m ((?:stages|benchmarks|studies)[\w.]*)", commands)
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    assert set(re.findall(r"uv run edgewise (\w+)", commands)) <= set(COMMANDS)


def test_every_committed_report_stands_unchanged_in_its_page():
    refreshed = runpy.run_path(str(TOP / "docs/results/refresh.py"))["refreshed"]
    pages = {path.stem: path.read_text() for path in (TOP / "docs/results").glob("*.md")}
    assert [name for name, text in pages.items() if refreshed(text) != text] == []
    reports = {path.parents[1].name: path for path in TOP.glob("profiles/*/reports/summary.md")}
    reports["study-claims"] = TOP / "profiles/cifar10/reports/claims.md"
    assert [name for name, report in reports.items() if report.read_text() not in pages[name]] == []


def test_the_figures_of_the_readme_are_those_of_the_committed_run():
    rows = {row["variant"]: row for row in json.loads((TOP / "profiles/cifar10/reports/variants.json").read_text())}
    lines = re.findall(r"^\| `(\w+-\w+)`: [^|]*\| (.*) \|$", (TOP / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 6
    for name, line in lines:
        row = rows[f"convnext-{name}"]
        top1, low, high = (f"{100 * row[key]:.2f}" for key in ("top1", "top1_ci_low", "top1_ci_high"))
        delta = points_text(row["top1_delta"], 2) if row["top1_delta"] is not None else ""
        change = f"{delta} ({p_text(row['p_value'])})" if delta else "baseline"
        cells = [f"{top1} [{low}, {high}]", change, bytes_text(row["size_bytes"]), f"{row['latency_ms_p50']:.3f}"]
        assert line == " | ".join(cells)


def test_the_example_of_a_pruner_fits_into_the_default_params(tmp_path):
    [example] = [yaml.safe_load(block) for block in blocks(TOP / "docs/pruning.md", "yaml") if "dhspg50" in block]
    raw = yaml.safe_load((TOP / "params.yaml").read_text())
    merged = raw | {section: raw[section] | entries for section, entries in example.items()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged))
    assert "convnext-dhspg50-fp32" in load_params(Params, tmp_path / "params.yaml").variants


def test_the_table_of_networks_is_that_of_the_results():
    results = json.loads(networks.RESULTS.read_text())
    text = networks.PAGE.read_text()
    assert networks.page(text, results) == text
    timm = [row for row in results["rows"] if row["family"].startswith("timm/")]
    assert sum(map(networks.counted, timm)) >= 95 <= len(timm)
