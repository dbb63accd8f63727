import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import ACCURACY, change_edge, change_profile, params_of, read, write_run

from stages import cli
from stages.reporting import choose
from stages.reporting.rows import Row, assemble_rows
from stages.reporting.rows import choose as choose_headline


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command with these arguments; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgewise", "choose", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def set_latencies(folder: Path, **latencies: float) -> None:
    path = folder / "reports/edge/edge.json"
    timed = json.loads(path.read_text())["rows"]
    for row in timed:
        if row["runtime"] == "onnxruntime":
            row["latency_ms_p50"] = latencies.get(row["variant"].replace("-", "_"), row["latency_ms_p50"])
    change_edge(folder, rows=timed)


def now() -> list[Row]:
    """The rows of the run in the working folder."""
    return assemble_rows(read())


def chosen(rows: list[Row], max_drop: float | None = None, ms: float | None = None, size: int | None = None):
    limits = choose.limits_of(rows, max_drop, ms, size)
    fits = choose.fitting(rows, limits)
    return choose.best(fits, limits)["variant"] if fits else None


def line(out: str, label: str) -> str:
    """The text of the output's line with this label, joined."""
    entries = re.findall(r"^(\S.{17})(.*(?:\n {18}.*)*)", out, re.MULTILINE)
    return " ".join({name.strip(): text for name, text in entries}[label].split())


def test_a_drop_alone_chooses_the_headline_of_the_report(run, seeds_run):
    for one in (run, seeds_run):
        rows = assemble_rows(one)
        assert chosen(rows, 0.01) == choose_headline(one, rows).headline == "atto-oto50-int8"


def test_without_a_drop_the_highest_validation_top1_under_the_limits_is_chosen(rows):
    assert chosen(rows, ms=5) == "atto-continued-fp32"
    assert chosen(rows, size=3_000_000) == "atto-none-int8"
    assert chosen(rows, ms=0.5) == "atto-oto50-int8"  # as accurate as in float, and smaller
    assert chosen(rows, 0.01, ms=5, size=1_000_000) == "atto-oto50-int8"  # a further limit that it meets


def test_a_limit_is_met_by_a_value_that_equals_it(folder: Path):
    set_latencies(folder, atto_oto50_int8=0.25)
    rows = now()
    size = next(row["size_bytes"] for row in rows if row["variant"] == "atto-oto50-int8")
    assert chosen(rows, 0.8 - 0.79, ms=0.25, size=size) == "atto-oto50-int8"
    assert chosen(rows, ms=0.2499) is None
    assert chosen(rows, size=size - 1) is None


def test_ties_go_to_the_smaller_file_and_to_the_higher_top1(folder: Path):
    change_profile(folder, "atto-none-int8", validation_top1=0.82)
    assert chosen(now(), ms=5) == "atto-none-int8"
    change_profile(folder, "atto-oto50-fp32", size_bytes=700_000, validation_top1=0.799)
    change_profile(folder, "atto-oto50-int8", size_bytes=700_000)
    assert chosen(now(), 0.01) == "atto-oto50-fp32"


def test_the_drop_is_below_the_best_dense_network_of_all_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
    models = {"good": network, "poor": network | {"arguments": {"depths": [1, 1, 1, 1]}}}
    write_run(tmp_path, params_of(models=models))
    monkeypatch.chdir(tmp_path)
    for variant in params_of(models=models)["variants"]:
        if variant.startswith("poor"):
            change_profile(tmp_path, variant, validation_top1=0.5, size_bytes=1000)
    assert chosen(now(), 0.1).startswith("good")
    assert chosen(now(), 0.3).startswith("poor")


def test_test_figures_have_no_part_in_a_choice(folder: Path):
    asked = [(0.01, None, None), (None, 0.9, None), (None, None, 3_000_000), (0.02, 0.9, 2_700_000)]
    rows = now()
    before, far = [chosen(rows, *limits) for limits in asked], choose.limits_of(rows, 0.005, 0.2, 1000)
    variants = [row["variant"] for row in rows]
    stored = [dict(np.load(folder / f"reports/profile/{name}/predictions.npz")) for name in variants]
    for variant, other in zip(variants, stored[::-1], strict=True):
        np.savez_compressed(folder / f"reports/profile/{variant}/predictions.npz", **other)
        change_profile(folder, variant, top1=float((other["label"] == other["predicted"]).mean()))
    assert [row["top1"] for row in now()] != [row["top1"] for row in rows]
    assert [chosen(now(), *limits) for limits in asked] == before
    assert choose.nearest(now(), far)["variant"] == choose.nearest(rows, far)["variant"]


def test_the_nearest_has_the_smallest_worst_excess_as_a_fraction_of_the_limit(folder: Path):
    set_latencies(folder, atto_oto50_int8=0.6, atto_none_int8=0.75, atto_l1_fp32=0.5)
    for variant, size in (("atto-oto50-int8", 500_000), ("atto-none-int8", 650_000), ("atto-l1-fp32", 1_000_000)):
        change_profile(folder, variant, size_bytes=size)
    rows = now()
    by_name = {row["variant"]: row for row in rows}
    cost = choose.limits_of(rows, None, 0.5, 500_000)
    assert choose.excesses(by_name["atto-l1-fp32"], cost) == {"--max-size": 500_000}  # one limit, missed by all of it
    assert choose.nearest(rows, cost)["variant"] == "atto-oto50-int8"  # 20 % over; atto-none-int8 50 %
    assert choose.distance(by_name["atto-none-int8"], cost) == pytest.approx(0.5)
    drop = choose.limits_of(rows, 0.0, 0.55, None)  # an error rate of 20 % is allowed: 21 % is 5 % over, 40 % twice it
    assert choose.distance(by_name["atto-l1-fp32"], drop) == pytest.approx(1)
    assert choose.distance(by_name["atto-oto50-fp32"], drop) == pytest.approx(0.05)
    change_profile(folder, "atto-none-fp32", validation_top1=1.0)  # an allowed error rate of 0
    assert chosen(now(), 0.0) == "atto-none-fp32"
    assert choose.nearest(now(), choose.limits_of(now(), 0.0, 0.1, None))["variant"] == "atto-none-fp32"


def test_the_answer_has_reason_figures_and_command(folder: Path, rows, command):
    code, out, _ = command("--max-drop", "1.0", "--max-latency-ms", "5", "--max-size", "4 MB")
    assert code == 0
    assert out.startswith("chosen            atto-oto50-int8\n")
    assert "of 3 that fit, of 6 variants" in line(out, "why")
    assert line(out, "validation top-1") == "79.00 % (best dense 80.00 %); at most 1 point below dense"
    assert line(out, "latency").endswith("; at most 5 ms")
    assert line(out, "timed on").startswith("A CPU of the tests, 1 thread")
    assert line(out, "model.onnx") == "705 KB; at most 4.00 MB"
    tested = {row["variant"]: f"{100 * row['top1']:.2f} %" for row in rows}
    assert line(out, "test top-1").startswith(f"{tested.pop('atto-oto50-int8')} [")
    assert line(out, "test top-1").endswith("n = 400")
    assert not any(top1 in out for top1 in tested.values())
    assert "measurable difference" in line(out, "change")
    assert line(out, "seeds").startswith("one seed")
    assert "13.7\N{MULTIPLICATION SIGN} the bytes (atto-none-fp32, 9.64 MB)" in line(out, "dense costs")
    assert out.endswith("\ndeploy            uv run edgewise bundle atto-oto50-int8\n")
    assert "warning" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_only_one_that_fits_and_the_dense_network_itself_are_named_so(folder: Path, rows, command):
    for row in rows:
        if row["variant"] != "atto-none-fp32":
            change_profile(folder, row["variant"], size_bytes=20_000_000)
    _, out, _ = command("--max-size", "10MB")
    assert line(out, "why") == "the only one of 6 variants that fits"
    assert line(out, "change") == "it is the dense network itself"


def test_the_spread_over_seeds_is_shown(tmp_path: Path, monkeypatch, command):
    write_run(tmp_path, params_of(3), accuracy=ACCURACY)
    monkeypatch.chdir(tmp_path)
    _, out, _ = command("--max-drop", "1")
    assert line(out, "seeds").startswith("mean of 3 seeds 78.08 % \N{PLUS-MINUS SIGN} ")
    assert "pooled over 3 seeds" in line(out, "change")


def test_only_warnings_about_the_run_and_the_choice_are_shown(folder: Path, command):
    change_edge(folder, busy=True, throttled=True)
    change_profile(folder, "atto-l1-fp32", agreement=0.5)
    _, out, _ = command("--max-drop", "1")
    assert out.count("warning ") == 2
    assert "atto-l1-fp32" not in out
    change_profile(folder, "atto-oto50-int8", agreement=0.5)
    _, out, _ = command("--max-drop", "1")
    assert out.count("warning ") == 3
    code, out, _ = command("--max-latency-ms", "0.1")
    assert (code, out.count("warning ")) == (1, 2)


def test_if_none_fits_the_limits_that_cannot_be_met_and_the_nearest_are_shown(folder: Path, command):
    set_latencies(folder, atto_oto50_int8=0.25)
    code, out, err = command("--max-drop", "1", "--max-latency-ms", "0.1", "--max-size", "1MB")
    assert (code, err) == (1, "")
    assert line(out, "chosen").startswith("none")
    assert line(out, "--max-drop") == "at most 1 point below dense; met by 5 of 6 variants"
    assert line(out, "--max-latency-ms") == "at most 0.1 ms; cannot be met: met by none of 6 variants"
    assert line(out, "--max-size") == "at most 1.00 MB; met by 1 of 6 variants"
    assert line(out, "nearest").startswith("atto-oto50-int8: at worst 2.50\N{MULTIPLICATION SIGN} a limit")
    assert line(out, "latency") == "0.25 ms; at most 0.1 ms, missed by 0.15 ms"
    assert "test top-1" not in out
    assert "bundle" not in out
    code, out, _ = command("--max-drop", "0.99", "--max-size", "700 KB")
    assert code == 1
    assert line(out, "validation top-1").endswith("at most 0.99 points below dense, missed by 0.01 points")
    assert line(out, "model.onnx").startswith("705 KB; at most 700 KB, missed by 5")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300000", 300_000),
        ("300000B", 300_000),
        ("500KB", 500_000),
        ("1.5MB", 1_500_000),
        ("1.5 mb", 1_500_000),
        (".5GB", 500_000_000),
        ("1.001MB", 1_001_000),
    ],
)
def test_sizes_are_in_decimal_units(text: str, size: int):
    assert choose.size(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one of --max-drop, --max-latency-ms, --max-size"),
        (["--max-drop", "-1"], "--max-drop: -1: give points of accuracy from 0 to 100, such as 1.0"),
        (["--max-drop", "101"], "give points of accuracy from 0 to 100"),
        (["--max-drop", "nan"], "give points of accuracy from 0 to 100"),
        (["--max-drop", "one"], "argument --max-drop: one: give points of accuracy from 0 to 100"),
        (["--max-latency-ms", "0"], "argument --max-latency-ms: 0: give milliseconds above 0, such as 2.5"),
        (["--max-latency-ms", "nan"], "give milliseconds above 0"),
        (["--max-latency-ms", "inf"], "give milliseconds above 0"),
        (["--max-latency-ms", "5ms"], "5ms: give milliseconds above 0"),
        *(
            (["--max-size", text], f"argument --max-size: {text}: give bytes, or KB, MB or GB")
            for text in ("", "0", "0.4", "nan", "1,5MB", "1.2.3", "5 TB", "500KiB", "9" * 400)
        ),
        (["--max-size=-5KB"], "--max-size: -5KB: give bytes"),
    ],
)
def test_impossible_limits_are_refused_before_anything_is_read(tmp_path, monkeypatch, command, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_without_a_run_there_is_one_clear_line(folder: Path, command):
    (folder / "reports/edge/edge.json").unlink()
    code, out, err = command("--max-drop", "1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "edge.json is missing: run `dvc repro`" in err
    (folder / "params.yaml").unlink()
    code, _, err = command("--max-drop", "1")
    assert code == 2
    assert "params.yaml is missing" in err
