"""The page in Debian's headless Chromium, with a script that inspects the layout."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from synthetic_run import EDGE, params_of, read, write_run

from stages import report
from stages.reporting.inputs import CompletedRun
from stages.reporting.rows import assemble_rows, choose
from stages.reporting.tables import confusion_counts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
FIRST = """<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<script>
window.found = {errors: []};
addEventListener("securitypolicyviolation", event => found.errors.push(`loads ${event.blockedURI}`));
addEventListener("error", event => found.errors.push(event.message || `${event.target.tagName} does not load`), true);
console.error = (...words) => found.errors.push(words.join(" "));
</script>"""
LAST = """<script>
addEventListener("load", () => setTimeout(() => {
  const box = element => element.getBoundingClientRect();
  const named = element => `${element.tagName} ${element.className} ${element.textContent.trim().slice(0, 40)}`;
  found.interactive_ms = performance.getEntriesByType("navigation")[0].domInteractive;
  found.pictures = [...document.querySelectorAll("figure")].map(figure => {
    const svg = figure.querySelector("svg");
    const groups = [...svg.querySelectorAll("g[transform*='scale(']")];  // a line of text each, of glyphs
    const texts = groups.filter(group => group.querySelector(":scope > use")).map(box);
    const outside = texts.filter(t => t.left < box(svg).left - 1 || t.right > box(svg).right + 1).length;
    let overlapping = 0;
    texts.forEach((a, i) => texts.slice(i + 1).forEach(b => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      overlapping += across > 1 && down > 1;
    }));
    return {caption: figure.querySelector("figcaption").textContent, width: box(svg).width, height: box(svg).height,
            shapes: svg.querySelectorAll("path, use").length, texts: texts.length, overlapping, outside};
  });
  found.broken = [...document.images].filter(image => !image.naturalWidth).length;
  const wide = element => box(element).width && box(element).right > innerWidth + 1;
  found.sideways = [...document.querySelectorAll("body *")].filter(element =>
    wide(element) && !element.closest(".scroll, svg, pre, .skip")).map(named);
  found.width = innerWidth;
  found.scrollable = [...document.querySelectorAll(".scroll")].every(part => box(part).right <= innerWidth + 1);
  const table = document.querySelector("table.sortable"), head = table.tHead.rows[0].cells[1];
  const keys = () => [...table.tBodies[0].rows].map(row => +row.cells[1].dataset.key);
  head.querySelector("button").click();
  found.rising = keys(); found.said_rising = head.getAttribute("aria-sort");
  head.querySelector("button").click();
  found.falling = keys(); found.said_falling = head.getAttribute("aria-sort");
  const mark = document.querySelector(".mark"), tip = document.getElementById("tip");
  mark.dispatchEvent(new PointerEvent("pointerenter"));
  found.tip = tip.hidden ? "" : tip.textContent;
  mark.dispatchEvent(new PointerEvent("pointerleave"));
  found.tip_left = tip.hidden;
  mark.focus({preventScroll: true});
  found.tip_focused = tip.hidden ? "" : tip.textContent;
  found.tip_inside = box(tip).left >= 0 && box(tip).right <= innerWidth;
  dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
  found.tip_escaped = tip.hidden;
  found.mark = mark.getAttribute("aria-label");
  found.first_stop = document.querySelector("a[href], button, [tabindex='0'], summary").className;
  const picker = document.getElementById("picker");
  picker.value = picker.options[picker.options.length - 2].value;
  picker.dispatchEvent(new Event("change"));
  found.picked = picker.value;
  const lines = [...document.getElementById("confusions").tBodies[0].rows].filter(row => !row.hidden);
  found.confusions = lines.map(row => [...row.cells].map(cell => cell.textContent));
  document.documentElement.dataset.found = JSON.stringify(found);
}));
</script>"""


def chromium(*arguments: str) -> str:
    done = subprocess.run([CHROMIUM, *FLAGS, *arguments], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def look(page: str, folder: Path, width: int) -> dict:
    """The findings of `LAST` on a page in a window of that width."""
    page = page.replace("<head>", f"<head>{FIRST}", 1).replace("</body>", f"{LAST}</body>", 1)
    (folder / "page.html").write_text(page)
    # a window is never narrower than 500 pixels, a frame may be
    frame = f'<iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
    pull = "onload=\"setInterval(() => document.title = this.contentDocument.documentElement.dataset.found || '', 50)\""
    (folder / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame.replace('<iframe', f'<iframe {pull}')}")
    dom = chromium(
        "--virtual-time-budget=20000", "--window-size=1600,1000", "--dump-dom", f"file://{folder}/frame.html"
    )
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1]))


SETTINGS = {
    "one seed": {},
    "three seeds": {"seeds": 3},
    "forty variants": {
        "pruners": {"none": {"method": "none"}}
        | {
            f"l1_{share}": {
                "method": "l1_unstructured",
                "epochs": 4,
                "learning_rate_factor": 0.5,
                "sparsity": share / 100,
            }
            for share in range(50, 88, 2)
        }
        | {"continued": {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5}},
    },
}


def page_of(folder: Path, settings: dict, **more) -> str:
    params = params_of(**settings) | more
    write_run(folder, params, accuracy={"none": 0.8, "continued": 0.82, "oto50": 0.79, "l1": 0.6})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report.main()
    return (folder / "reports/index.html").read_text()


@pytest.fixture(scope="module")
def edge_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    page_of(folder := tmp_path_factory.mktemp("edge"), {}, edge_benchmark=EDGE)
    return folder


@pytest.fixture(scope="module")
def edge_page(edge_made: Path) -> str:
    return (edge_made / "reports/index.html").read_text()


@pytest.fixture(scope="module")
def edge_run(edge_made: Path) -> CompletedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(edge_made)
        return read()


@pytest.fixture(scope="module")
def desktop(edge_page: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return look(edge_page, tmp_path_factory.mktemp("desktop"), 1300)


def test_it_runs_without_an_error_and_loads_nothing(desktop: dict):
    assert (desktop["errors"], desktop["broken"]) == ([], 0)
    assert desktop["width"] == 1300


def test_every_picture_is_there_with_labels_that_do_not_overlap(desktop: dict):
    captions = [picture["caption"] for picture in desktop["pictures"]]
    assert len(captions) == len(set(captions)) == 4
    for picture in desktop["pictures"]:
        assert picture["width"] > 300
        assert picture["height"] > 150
        assert picture["texts"] > 5
        assert (picture["overlapping"], picture["outside"]) == (0, 0), picture["caption"]


def test_the_table_sorts_both_ways_and_says_so(desktop: dict):
    assert desktop["rising"] == sorted(desktop["rising"])
    assert desktop["falling"] == sorted(desktop["falling"], reverse=True)
    assert len(set(desktop["rising"])) > 1
    assert (desktop["said_rising"], desktop["said_falling"]) == ("ascending", "descending")


def test_the_confusions_are_those_of_the_variant_that_is_picked(desktop: dict, edge_run: CompletedRun):
    counts = confusion_counts(edge_run, desktop["picked"])
    assert desktop["picked"] != choose(edge_run, assemble_rows(edge_run)).headline
    found = desktop["confusions"]
    assert [line[0] for line in found] == edge_run.classes
    assert [[int(count) for count in line[1:-1]] for line in found] == counts.tolist()
    recalls = [float(line[-1].removesuffix(" %")) for line in found]
    assert recalls == pytest.approx(100 * counts.diagonal() / counts.sum(axis=1), abs=0.0501)


def test_of_a_thousand_classes_the_most_frequent_confusions_are_shown(tmp_path: Path):
    write_run(tmp_path, params_of(), n=3000, classes=[f"class <{k}>" for k in range(1000)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        report.main()
        run = read()
    found = look((tmp_path / "reports/index.html").read_text(), tmp_path, 1300)
    assert (found["errors"], found["sideways"]) == ([], [])
    counts = confusion_counts(run, found["picked"])
    np.fill_diagonal(counts, 0)
    numbers = [int(line[2]) for line in found["confusions"]]
    assert numbers == sorted(counts.flatten().tolist(), reverse=True)[:20]
    for true, predicted, number, images in found["confusions"]:
        assert counts[run.classes.index(true), run.classes.index(predicted)] == int(number)
        assert int(images) == 3


def test_marks_tell_what_they_are_to_pointer_and_keyboard(desktop: dict):
    assert desktop["tip"] == desktop["tip_focused"] == desktop["mark"] != ""
    assert desktop["tip_left"]
    assert desktop["tip_inside"]
    assert desktop["tip_escaped"]
    assert desktop["first_stop"] == "skip"


@pytest.mark.parametrize("width", [390, 800, 1300])
def test_nothing_is_wider_than_the_window(edge_page: str, tmp_path: Path, width: int):
    found = look(edge_page, tmp_path, width)
    assert found["width"] == width
    assert found["sideways"] == []
    assert found["scrollable"]
    assert found["errors"] == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_labels_do_not_overlap_with_many_variants_seeds_or_long_names(tmp_path: Path, settings: str):
    found = look(page_of(tmp_path, SETTINGS[settings]), tmp_path, 1300)
    assert {picture["caption"]: (picture["overlapping"], picture["outside"]) for picture in found["pictures"]} == {
        picture["caption"]: (0, 0) for picture in found["pictures"]
    }
    assert found["errors"] == []


def test_it_prints_and_its_picture_is_not_blank(edge_page: str, tmp_path: Path):
    (tmp_path / "page.html").write_text(edge_page)
    chromium(f"--print-to-pdf={tmp_path}/page.pdf", f"file://{tmp_path}/page.html")
    pages = len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert 3 <= pages <= 20
    chromium(f"--screenshot={tmp_path}/page.png", "--window-size=1300,4000", f"file://{tmp_path}/page.html")
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (1300, 4000)
        rows = [shot.crop((0, top, 1300, top + 400)).convert("L").getextrema() for top in range(0, 4000, 400)]
    assert all(low < 100 < high for low, high in rows)  # ink and paper, all the way down


BREAK = {
    "a script error": (lambda page: page.replace('"use strict";', '"use strict"; nothing();', 1), "errors"),
    "a missing picture": (lambda page: re.sub(r"<svg.*?</svg>", "<svg></svg>", page, count=1, flags=re.DOTALL), None),
    "a wide element": (
        lambda page: page.replace("<main>", '<main><div style="width: 3000px">wide</div>', 1),
        "sideways",
    ),
    "a picture that is gone": (lambda page: page.replace("<main>", '<main><img src="gone.png">', 1), "broken"),
    "a file beside it": (lambda page: page.replace("<main>", '<main><iframe src="frame.html#"></iframe>', 1), "errors"),
}


@pytest.mark.parametrize("broken", BREAK)
def test_what_is_broken_is_found(edge_page: str, tmp_path: Path, broken: str):
    spoil, key = BREAK[broken]
    found = look(spoil(edge_page), tmp_path, 1300)
    assert found[key] if key else min(picture["texts"] for picture in found["pictures"]) == 0


def test_labels_on_one_another_are_found(edge_page: str, tmp_path: Path):
    moved = re.sub(r"translate\([\d. -]+\) scale\(0\.1 -0\.1\)", "translate(99 99) scale(0.1 -0.1)", edge_page)
    assert moved != edge_page
    assert max(picture["overlapping"] for picture in look(moved, tmp_path, 1300)["pictures"]) > 0
