from pathlib import Path

import pytest
from reporting.synthetic_run import params_of, write_run

from stages import report
from stages.common.errors import UserError
from stages.reporting.readme import BLOCKS, filled

TOP = Path(__file__).parents[2]


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "profiles" / "tiny"
    folder.mkdir(parents=True)
    write_run(folder, params_of())
    monkeypatch.chdir(folder)
    report.main()
    return tmp_path


def block(name: str) -> str:
    return f"before\n<!-- tiny:{name} -->\n999 old numbers\n<!-- end -->\nafter\n"


def test_the_numbers_in_the_readme_are_those_of_the_report_files():
    text = (TOP / "README.md").read_text()
    assert filled(text, TOP) == text


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_written_anew_and_the_text_around_it_stays(top, name):
    text = filled(block(name), top)
    assert text.startswith(f"before\n<!-- tiny:{name} -->\n")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "999 old numbers" not in text
    assert len(text) > len(block(name)) + 100
    assert filled(text, top) == text


def test_the_table_has_a_line_for_every_variant_with_its_accuracy(top):
    import json

    text = filled(block("variants"), top)
    for row in json.loads((top / "profiles/tiny/reports/variants.json").read_text()):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['variant']} |")]
        assert f"{100 * row['top1']:.2f}" in line


def test_an_unknown_block_or_a_missing_report_is_named(top):
    with pytest.raises(UserError, match="no block 'nothing'; known: headline, variants, claims"):
        filled(block("nothing"), top)
    (top / "profiles/tiny/reports/run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        filled(block("headline"), top)
