import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import change_edge, page_of, params_of, read, write_run

from stages.reporting.cards import card
from stages.reporting.drawing import Picture
from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import Row, assemble_rows, choose, groups_of
from stages.reporting.wording import ms_text, points_text

VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def page(run: CompletedRun, pictures: dict[str, Picture]) -> str:
    return page_of(run, pictures)


def section_of(page: str, start: str) -> str:
    return page[page.index(start) : page.index("</section>", page.index(start))]


class Structure(HTMLParser):
    """Checks that elements nest, and collects what loads something."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.mistakes = [], [], []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            if tag != "a" and values.get(key):
                self.loads.append(values[key])

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mistakes.append((tag, self.getpos()))


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere(page: str):
    structure = Structure()
    structure.feed(page)
    assert structure.mistakes == []
    assert structure.open == []
    assert all(target.startswith(("#", "data:")) for target in structure.loads)
    assert not re.search(r"@import|url\(\s*['\"]?http|fetch\(|XMLHttpRequest|import\(", page)


def test_ids_are_unique_and_links_lead_somewhere(page: str):
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'<a [^>]*href="#([^"]+)"', page)) <= set(ids)


def test_tables_have_captions_and_sortable_headings(page: str):
    assert page.count("<table") == page.count("<caption")
    table = page[page.index('<table class="sortable">') : page.index("</table>")]
    assert table.count("aria-sort=") == table.count('<button type="button">') == 10
    assert 'lang="en"' in page


def test_a_picture_comes_before_the_table(page: str):
    assert page.index("</h2>") < page.index("<svg") < page.index("<table")


def test_the_headline_has_n_interval_spread_and_control(page: str):
    answer = section_of(page, 'class="answer"')
    for words in ("atto-oto50-int8", "n = 400", "p = ", "one seed", "the control atto-continued-fp32"):
        assert words in answer
    assert "A CPU of the tests" in page
    assert "median latency from" not in answer


def test_a_headline_without_its_control_says_so(run: CompletedRun):
    pruners = {name: pruner for name, pruner in run.params.pruners.items() if name != "continued"}
    variants = {name: entry for name, entry in run.params.variants.items() if "continued" not in name}
    params = run.params.model_copy(update={"pruners": pruners, "variants": variants})
    measured = {name: one for name, one in run.variants.items() if name in variants}
    answer = section_of(page_of(replace(run, params=params, variants=measured)), 'class="answer"')
    assert "4 more epochs than the dense network, and the run has no control" in answer


def test_every_variant_has_its_change_against_dense_and_control(page: str, run: CompletedRun, rows: list[Row]):
    for variant in run.params.variants:
        assert f'data-key="{variant}"' in page
    row = page[page.index('data-key="atto-oto50-int8"') :]
    control = groups_of(rows)["atto-oto50-int8"].control
    assert f"<small>control {points_text(control.delta)} [{points_text(control.low)}," in row
    baseline = page[page.index('data-key="atto-none-fp32"') :]
    assert "control" not in baseline[: baseline.index("</tr>")]


def test_speed_ups_have_intervals_and_sleeping_threads_are_mentioned(
    tmp_path, monkeypatch, page: str, run: CompletedRun
):
    edge = run.variants["atto-oto50-int8"].edge
    assert f"<small>{edge.latency_ratio_low:.2f} to {edge.latency_ratio_high:.2f}</small>" in page
    assert "do not spin" not in page
    write_run(tmp_path, params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")]), threads=2)
    monkeypatch.chdir(tmp_path)
    alone = page_of(read())
    assert "do not spin" in alone
    assert "no compressed variant" in alone


def test_the_batch_that_was_timed_is_named(folder: Path, page: str):
    assert "Latency at batch 1 on" in page
    edge = json.loads((folder / "reports/edge/edge.json").read_text())
    change_edge(folder, protocol=edge["protocol"] | {"batch": 3})
    run = read()
    rows, found = assemble_rows(run), page_of(run)
    assert "batch 1" not in found
    assert "Latency at batch 3 on" in found
    assert "median at batch 3;" in found
    assert "| latency, batch 3 |" in card(run, rows[0], groups_of(rows))


def test_a_class_without_test_images_is_not_the_worst(tmp_path, monkeypatch):
    write_run(tmp_path, params_of(), n=4)  # of five classes
    monkeypatch.chdir(tmp_path)
    page = page_of(read())
    worst = page[page.index("Recall of the worst classes") :]
    assert "deer" not in worst[: worst.index("</table>")]
    assert "&ndash;</td>" in page


def test_seeds_have_a_table_and_the_headline_their_spread(seeds_run: CompletedRun):
    page = page_of(seeds_run)
    for words in ("Over seeds", "mean of 3 seeds", "pooled over 3 seeds", "<small>dense (3 seeds) "):
        assert words in page
    rows = assemble_rows(seeds_run)
    group = next(group for group in groups_of(rows).values() if choose(seeds_run, rows).headline in group.variants)
    latencies = [row["latency_ms_p50"] for row in group.rows]
    assert f"; median latency from {ms_text(min(latencies))} to {ms_text(max(latencies))})" in page


def test_calibration_corruptions_confusion_and_bytes_are_shown(page: str, run: CompletedRun):
    accuracy = section_of(page, 'id="accuracy"')
    for words in ("Calibration error", "200 test images", "mean of all 9", "Corrupted (%)"):
        assert words in accuracy
    lines = accuracy[: accuracy.index("</table>")].count("<tr>")
    assert lines == 1 + len(run.variants)
    corrupted = run.variants["atto-oto50-int8"].corrupted
    right = corrupted.predicted == run.labels[corrupted.position]
    clean = run.variants["atto-oto50-int8"].correct[corrupted.position].mean()
    means = [clean, *(right[first : first + 3].mean() for first in (0, 3, 6))]  # noise, blur, JPEG
    cells = "".join(f"<td>{100 * mean:.1f}</td>" for mean in means)
    assert f'<th scope="row">atto-oto50-int8</th>{cells}</tr>' in accuracy
    assert all(f'scope="row">{name}<' in section_of(page, 'id="errors"') for name in run.classes)
    assert "26.0 KB" in section_of(page, 'id="compression"')


def test_removals_and_layers_left_in_float_are_shown(run: CompletedRun):
    measured = run.variants["atto-oto50-int8"]
    artifact = measured.artifact.model_copy(update={"float_layers": ["head"]})
    changed = replace(run, variants=run.variants | {"atto-oto50-int8": replace(measured, artifact=artifact)})
    detail = section_of(page_of(changed), 'id="compression"')
    assert "left in float: 1 (head) in atto-oto50-int8.</p>" in detail
    row = '<th scope="row">atto-oto50-fp32</th><td>77.00</td><td>77.00</td><td>79.00</td><td>2.0e-07</td>'
    assert row in detail
    assert '<th scope="row">atto-l1-fp32</th><td>' not in detail[: detail.index("<details>")]


def test_a_page_about_other_data_names_no_study(page: str):
    assert not re.search("CIFAR|2409.02134|claim", page, re.IGNORECASE)
