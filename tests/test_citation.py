import tomllib
from pathlib import Path

import yaml

TOP = Path(__file__).parents[1]


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((TOP / "CITATION.cff").read_text())
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors", "type", "references"} <= citation.keys()
