import json
import re
from pathlib import Path

import pytest

from stages.common.errors import UserError
from stages.reporting.offline_template import LARGEST, NAMES, offline_template

PLOTS = Path(__file__).parents[2] / ".dvc/plots"


def test_the_committed_frame_needs_no_network():
    page = (PLOTS / "offline.html").read_text(encoding="utf-8")
    assert len(page.encode()) < LARGEST
    assert not re.search(r"<script[^>]+src\s*=", page)
    assert not re.search(r"<link[^>]+href\s*=\s*[\"']?(https?:)?//", page)
    assert page.count("<script>") == page.count("</script>") == len(NAMES)
    assert "University of Washington Interactive Data Lab" in page


def test_the_committed_frame_holds_the_places_that_dvc_fills():
    page = (PLOTS / "offline.html").read_text(encoding="utf-8")
    assert page.count("{plot_divs}") == 1
    assert page.count("{refresh_tag}") == 1
    assert "{scripts}" not in page  # DVC's links to its CDN


def test_dvc_fills_the_committed_frame():
    from dvc_render.html import HTML

    page = HTML((PLOTS / "offline.html").read_text(encoding="utf-8")).with_scripts('<script src="http://cdn">')
    filled = page.with_element("<div>a plot</div>").embed()
    assert "<div>a plot</div>" in filled
    assert "http://cdn" not in filled


def test_a_script_that_would_end_its_element_is_refused():
    with pytest.raises(UserError, match="vega-lite"):
        offline_template({"vega": "1", "vega-lite": 'document.write("</script>")', "vega-embed": "2"}, "a licence")


@pytest.mark.parametrize("name", ["pareto", "bars", "counts", "training", "matrix"])
def test_templates_take_the_data_and_fields_of_dvc(name: str):
    text = (PLOTS / f"{name}.json").read_text()
    template = json.loads(text)
    assert template["data"]["values"] == "<DVC_METRIC_DATA>"
    assert all(f"<DVC_METRIC_{anchor}>" in text for anchor in ("X", "Y", "TITLE", "X_LABEL"))
    assert '"tooltip"' in text
