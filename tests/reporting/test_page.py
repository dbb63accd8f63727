import json
import re
from html.parser import HTMLParser

import pytest
from synthetic_run import params_of, write_run

from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.cards import card
from stages.reporting.claims import assess, read_claims
from stages.reporting.inputs import Run, read_run
from stages.reporting.page import render_page
from stages.reporting.plots import Picture, draw_all
from stages.reporting.rows import assemble_groups, assemble_rows, choose
from stages.reporting.text import ms_text, points_text

VOID = {"meta", "link", "br", "img", "input", "hr"}


def render(run: Run, pictures: dict[str, Picture] | None = None) -> str:
    groups = assemble_groups(run)
    rows = assemble_rows(run, groups)
    choices = choose(run)
    claims = assess(read_claims(), run, rows, groups)
    return render_page(run, rows, groups, choices, claims, pictures or draw_all(run, rows, groups, choices))


@pytest.fixture(scope="module")
def page(run: Run, pictures: dict[str, Picture]) -> str:
    return render(run, pictures)


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
    assert table.count("aria-sort=") == table.count('<button type="button">') == 9
    assert 'lang="en"' in page


def test_the_headline_says_n_interval_spread_and_machine(page: str, run: Run):
    answer = page[page.index('class="answer"') : page.index("</section>")]
    assert "atto-oto50-int8" in answer
    assert "n = 400" in answer
    assert "p = " in answer or "p &lt; " in answer
    assert "one seed" in answer
    assert "A CPU of the tests" in page


def test_every_variant_and_claim_is_in_the_page(page: str, run: Run):
    for variant in run.params.variants:
        assert f'data-key="{variant}"' in page
    assert page.count('class="verdict') == len(read_claims())


def test_the_change_stands_beside_that_against_the_control(page: str, run: Run):
    answer = page[page.index('class="answer"') : page.index("</section>")]
    assert "against the control (atto-continued-fp32)" in answer
    assert "real" not in answer
    row = page[page.index('data-key="atto-oto50-int8"') :]
    group = assemble_groups(run)["atto-oto50-int8"]
    assert f"<small>control {points_text(group.control.delta)} [{points_text(group.control.low)}," in row
    baseline = page[page.index('data-key="atto-none-fp32"') : page.index('data-key="atto-none-int8"')]
    assert "control" not in baseline[: baseline.index("</tr>")]


def test_the_speed_up_has_its_interval_and_threads_that_sleep_are_named(tmp_path, monkeypatch, page: str, run: Run):
    edge = run.variants["atto-oto50-int8"].edge
    assert f"<small>{edge['latency_ratio_low']:.2f} to {edge['latency_ratio_high']:.2f}</small>" in page
    assert "do not spin" not in page
    write_run(tmp_path, params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")]), threads=2)
    monkeypatch.chdir(tmp_path)
    alone = render(read_run(load_params(Params)))
    assert "do not spin" in alone
    assert "the run has no compressed variant" in alone
    assert "no smaller variant stayed" not in alone


def test_the_batch_that_was_timed_is_told(tmp_path, monkeypatch, page: str):
    assert "Latency at batch 1 on" in page
    write_run(tmp_path, params_of())
    path = tmp_path / "reports/edge/edge.json"
    edge = json.loads(path.read_text())
    path.write_text(json.dumps(edge | {"protocol": edge["protocol"] | {"batch": 3}}))
    monkeypatch.chdir(tmp_path)
    run = read_run(load_params(Params))
    groups = assemble_groups(run)
    found = render(run)
    assert "batch 1" not in found
    for words in ("Latency at batch 3 on", "median at batch 3;", "median latency, batch 3"):
        assert words in found
    assert "| latency, batch 3 |" in card(run, assemble_rows(run, groups)[0], groups)


def test_a_training_that_sees_small_images_first_explains_its_curve(tmp_path, monkeypatch, page: str):
    assert "sees images of" not in page
    params = params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    size = next(iter(params["models"].values()))["input_size"]
    write_run(tmp_path, params | {"finetune": params["finetune"] | {"early_input_size": size - 8}})
    monkeypatch.chdir(tmp_path)
    assert f"sees images of {size - 8} pixels first" in render(read_run(load_params(Params)))


def test_claims_say_of_which_network_and_data_they_speak(page: str):
    claims = page[page.index('id="claims"') :]
    words = claims[: claims.index("<table")]
    assert "ConvNeXt (Small) on CIFAR-10" in words
    assert "convnext_atto" in words
    assert "toys" in words


def test_a_class_without_test_images_is_not_the_worst(tmp_path, monkeypatch):
    write_run(tmp_path, params_of(), n=4)  # of five classes
    monkeypatch.chdir(tmp_path)
    page = render(read_run(load_params(Params)))
    worst = page[page.index("Found least often") :]
    assert "deer" not in worst[: worst.index("</p>")]
    assert "&ndash;</td>" in page


def test_seeds_have_a_table_of_their_own(seeds_run: Run):
    page = render(seeds_run)
    assert "Over seeds" in page
    assert "mean of 3 seeds" in page
    assert "pooled over 3 seeds" in page
    assert "<small>dense (3 seeds) " in page
    assert "<small>control (3 seeds) " in page
    assert len(page.encode()) < 3_000_000


def test_the_page_tells_calibration_corruptions_classes_and_bytes(page: str, run: Run):
    section = page[page.index('id="accuracy"') : page.index("</section>", page.index('id="accuracy"'))]
    for words in ("Calibration error", "200 test images", "mean of all 9", "Corrupted (%)", "noise, atto-oto50-int8"):
        assert words in section
    assert section.count("<tr>") == 1 + len(run.variants)
    errors = page[page.index('id="errors"') :]
    table = errors[: errors.index("</table>")]
    assert all(name in table for name in (*run.classes, "atto-none-fp32", "atto-oto50-int8"))
    counts = page[page.index('id="counts"') : page.index('id="training"')]
    assert "Scales" in counts
    assert "26.0 KB" in counts


def test_the_headline_tells_the_latency_of_the_other_seeds(page: str, seeds_run: Run):
    assert "median latency from" not in page[page.index('class="answer"') : page.index("</section>")]
    group = next(group for group in assemble_groups(seeds_run).values() if choose(seeds_run).headline in group.variants)
    latencies = [seeds_run.variants[variant].edge["latency_ms_p50"] for variant in group.variants]
    assert f"; median latency from {ms_text(min(latencies))} to {ms_text(max(latencies))})" in render(seeds_run)
