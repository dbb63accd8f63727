import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from miniature import committed, committed_params
from synthetic_run import EDGE, params_of, write_run

from stages import report
from stages.common.errors import UserError
from stages.reporting import readme
from stages.reporting.readme import BLOCKS, filled
from stages.reporting.text import ms_text, points_text

TOP = Path(__file__).parents[2]


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return reported(tmp_path, monkeypatch, params_of())


def reported(top: Path, monkeypatch: pytest.MonkeyPatch, params: dict) -> Path:
    folder = top / "profiles" / "tiny-one"
    folder.mkdir(parents=True)
    write_run(folder, params)
    monkeypatch.chdir(folder)
    report.main()
    write_recipes(folder / "reports")
    write_training(folder / "reports")
    write_even_widths(folder / "reports")
    return top


def write_recipes(reports: Path) -> None:
    rows = [
        "change,epochs,seed,validation_images,validation_top1,seconds,images_per_second,threads,cpu,commit",
        "none,4,0,5000,0.1234,60,3,2,A Processor,before",
        "none,4,0,5000,0.2345,60,3,2,A Processor,abc",
        "none,4,0,5000,0.8000,600,300.5,2,A Processor,abc",
        "none,4,1,5000,0.8100,660,299.5,2,A Processor,abc",
        "finetune.batch_size=256,4,0,5000,0.7900,540,350,2,A Processor,abc",
    ]
    (reports / "recipes.csv").write_text("\n".join(rows) + "\n")


def write_training(reports: Path) -> None:
    names = ("plain over loop", "bare over loop", "hesso over silent", "averaged and logged over silent")
    row = {"ratio": 1.04, "ratio_ci_low": 0.98, "ratio_ci_high": 1.1}
    found = {
        "machine": {"cpu": "A Processor", "torch": "2.15.0", "instruction_sets": ["avx2"]},
        "threads": 2,
        "precision": "float32",
        "settings": {"rounds": 12, "batch": 128},
        "images_per_second": {"loop": 1234.4, "plain": 400.2},
        "ratios": dict.fromkeys((*names, "silent again over silent"), row),
    }
    (reports / "benchmarks").mkdir(exist_ok=True)
    (reports / "benchmarks/training.json").write_text(json.dumps(found))


def write_even_widths(reports: Path) -> None:
    times = {(1, "exact"): (1.1, 1.3), (1, "plain"): (1.0, 1.0), (8, "exact"): (0.6, 0.6), (8, "plain"): (0.5, 0.5)}
    rows = [{"divisible_by": None, "layer_norm": None, "seed": None, "macs_share": 1.0, "time_over_dense": 1.0}]
    rows += [
        {"divisible_by": unit, "layer_norm": form, "seed": seed, "macs_share": 0.3 + seed / 10, "time_over_dense": time}
        for (unit, form), of_seeds in times.items()
        for seed, time in enumerate(of_seeds)
    ]
    result = {"profile": "profiles/x", "model": "net", "busy": False, "rows": rows}
    once = result | {"model": "other", "rows": [row for row in rows if row["seed"] in (None, 0)]}
    found = {"machine": {"cpu": "A Processor", "onnxruntime": "1.32.0"}, "results": [result, once]}
    (reports / "benchmarks/even_widths.json").write_text(json.dumps(found))


def test_what_even_widths_are_worth_is_a_mean_over_choices_of_channels(top):
    lines = filled(block("even_widths"), top).splitlines()
    assert "| `profiles/x`, `net` | 1 | 35.0 % | 120.0 \N{PLUS-MINUS SIGN} 14.1 % | 100.0 % |" in lines
    assert "| `profiles/x`, `net` | 8 | 35.0 % | 60.0 % | 50.0 % |" in lines
    assert "over 2 random choices of the channels" in lines[-3]


def test_the_recipes_are_means_over_seeds_with_their_spread(top):
    lines = filled(block("recipes"), top).splitlines()
    assert "| `none` | 4 | 2 | 80.50 \N{PLUS-MINUS SIGN} 0.71 | 10.5 | 300 | 5,000 | A Processor, 2 threads |" in lines
    assert "| `finetune.batch_size=256` | 4 | 1 | 79.00 | 9.0 | 350 | 5,000 | A Processor, 2 threads |" in lines
    assert "| `none` | 4 | 1 | 12.34 | 1.0 | 3 | 5,000 | A Processor, 2 threads |" in lines  # another commit's recipe
    assert len(lines) == 9


def test_a_benchmark_that_was_not_run_is_named_with_what_makes_its_file(top):
    (top / "profiles/tiny-one/reports/recipes.csv").unlink()
    with pytest.raises(UserError, match=r"recipes\.csv is missing: tests/benchmarks/recipes\.py makes it"):
        filled(block("recipes"), top)


def test_what_training_costs_is_told_with_its_intervals(top):
    text = filled(block("training"), top)
    assert "1,234 images/s, 1.04 [0.98, 1.10] times the loop that people write first (400 images/s" in text
    assert "HESSO costs +4.0 % [\N{MINUS SIGN}2.0, +10.0]" in text
    assert "12 rounds" in text
    assert "Over the whole recipe" not in text
    assert "on A Processor (avx2; 2 threads), torch 2.15.0, float32." in text


def test_what_smaller_images_bring_is_told_where_the_recipe_has_them(top):
    path = top / "profiles/tiny-one/reports/benchmarks/training.json"
    found = json.loads(path.read_text()) | {"early_input_size": 48, "early_fraction": 0.6}
    found["ratios"]["plain over recipe"] = {"ratio": 2.0, "ratio_ci_low": 1.9, "ratio_ci_high": 2.1}
    path.write_text(json.dumps(found))
    text = filled(block("training"), top)
    assert "whose first 60 % of the steps see 48 pixels: 2.00 [1.90, 2.10] times that loop at full size.\n" in text


def test_what_training_costs_is_told_of_each_machine(top):
    path = top / "profiles/tiny-one/reports/benchmarks/training.json"
    other = json.loads(path.read_text()) | {"precision": "bfloat16"}
    path.with_stem("training_other").write_text(json.dumps(other))
    first, second = filled(block("training"), top).split("Medians of 12 rounds")[1:]
    assert "float32.\n\n- One epoch's steps: 1,234 images/s" in first
    assert "bfloat16." in second


def test_a_gpu_is_named_where_training_was_timed_on_one(top):
    path = top / "profiles/tiny-one/reports/benchmarks/training.json"
    found = json.loads(path.read_text())
    found["settings"] |= {"device": "cuda", "architecture": "convnext_tiny"}
    found["machine"]["cores"] = 16
    path.write_text(json.dumps(found | {"device": "A GPU"}))
    text = filled(block("training"), top)
    assert "`convnext_tiny` at 64 pixels, batch 128, on A GPU beside A Processor (16 cores), torch 2.15.0" in text


def block(name: str) -> str:
    return f"before\n<!-- tiny-one:{name} -->\n999 old numbers\n<!-- end -->\nafter\n"


def test_the_numbers_in_the_readme_are_those_of_the_report_files(tmp_path):
    """As they were committed: whoever runs the pipeline has reports of their own."""
    folders = [str(Path(name).parent / "reports") for name in committed_params()]
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD", "README.md", *committed_params(), *folders],
        **{"cwd": TOP, "capture_output": True, "text": True, "check": True},
    ).stdout.splitlines()
    for name in listed:
        if Path(name).suffix in (".csv", ".json", ".yaml") or name == "README.md":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(committed(name))
    text = (tmp_path / "README.md").read_text()
    assert "default:headline" in text
    assert filled(text, tmp_path) == text


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_written_anew_and_the_text_around_it_stays(top, name):
    text = filled(block(name), top)
    assert text.startswith(f"before\n<!-- tiny-one:{name} -->\n")
    assert text.endswith("\n<!-- end -->\nafter\n")
    assert "999 old numbers" not in text
    assert len(text) > len(block(name)) + 100
    assert filled(text, top) == text


def test_the_table_has_a_line_for_every_variant_with_its_accuracy(top):
    text = filled(block("variants"), top)
    for row in json.loads((top / "profiles/tiny-one/reports/variants.json").read_text()):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['variant']} |")]
        assert f"{100 * row['top1']:.2f}" in line


def test_the_table_has_the_change_against_the_control_of_those_that_have_one(top):
    text = filled(block("variants"), top)
    rows = json.loads((top / "profiles/tiny-one/reports/variants.json").read_text())
    top1 = {row["variant"]: row["top1"] for row in rows}
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    place = lines[0].index("Δ control, points")
    found = {line[1]: line[place] for line in lines[2:]}
    expected = points_text(top1["atto-oto50-int8"] - top1["atto-continued-fp32"], 2)
    assert found["atto-oto50-int8"] == expected
    assert found["atto-none-int8"] == found["atto-none-fp32"] == found["atto-continued-fp32"] == ""


def test_the_groups_are_means_over_seeds_with_their_spread(tmp_path, monkeypatch):
    top = reported(tmp_path, monkeypatch, params_of(seeds=3))
    rows = json.loads((top / "profiles/tiny-one/reports/variants.json").read_text())
    text = filled(block("groups"), top)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()[4:]
        if line.startswith("|")
    }
    assert list(cells) == ["none", "continued", "oto50", "l1", "none-int8", "oto50-int8"]
    top1 = {row["variant"]: row["top1"] for row in rows}
    ours = [top1[f"atto{seed}-oto50-fp32"] for seed in ("", "-s1", "-s2")]
    dense = [top1[f"atto{seed}-none-fp32"] for seed in ("", "-s1", "-s2")]
    assert cells["oto50"][0] == "25.0 %"
    latency = {row["variant"]: row["latency_ms_p50"] for row in rows}
    ratios = [latency[f"atto{seed}-oto50-fp32"] / latency[f"atto{seed}-none-fp32"] for seed in ("", "-s1", "-s2")]
    spread = f" \N{PLUS-MINUS SIGN} {100 * np.std(ratios, ddof=1):.1f}" if np.std(ratios) else ""
    assert cells["oto50"][3] == f"{100 * np.mean(ratios):.1f}{spread} %"
    by_name = {row["variant"]: row["artifact_bytes"] for row in rows}
    shares = [by_name[f"atto{seed}-oto50-fp32"] / by_name[f"atto{seed}-none-fp32"] for seed in ("", "-s1", "-s2")]
    assert cells["oto50"][1] == f"{100 * np.mean(shares):.1f} %"
    assert cells["oto50"][4] == f"{100 * np.mean(ours):.2f} \N{PLUS-MINUS SIGN} {100 * np.std(ours, ddof=1):.2f}"
    changes = np.subtract(ours, dense)
    assert (
        cells["oto50"][5] == f"{points_text(changes.mean(), 2)} \N{PLUS-MINUS SIGN} {100 * np.std(changes, ddof=1):.2f}"
    )
    assert cells["none"][5:] == ["", ""]


def test_the_words_follow_the_params(tmp_path, monkeypatch):
    params = params_of() | {"report": {"confidence": 0.9, "headline_max_drop": 0.025}}
    top = reported(tmp_path, monkeypatch, params)
    assert "[90 %]" in filled(block("variants"), top)
    assert "within 2.5 points of the dense network" in filled(block("headline"), top)


def test_a_dense_headline_has_a_sentence_of_its_own(tmp_path, monkeypatch):
    params = params_of(pruners={"none": {"method": "none"}}, variants=[("none", "fp32")])
    text = filled(block("headline"), reported(tmp_path, monkeypatch, params))
    assert "no smaller variant than the dense network `atto-none-fp32`" in text
    assert "instead of" not in text


def test_the_findings_are_those_of_the_rows_and_of_the_run(tmp_path, monkeypatch):
    top = reported(tmp_path, monkeypatch, params_of() | {"edge_benchmark": EDGE})
    reports = top / "profiles/tiny-one/reports"
    rows = {row["variant"]: row for row in json.loads((reports / "variants.json").read_text())}
    text = filled(block("findings"), top)
    small, dense = rows["atto-oto50-int8"], rows["atto-none-fp32"]
    fast = min(rows.values(), key=lambda row: row["latency_ms_p50"])
    for words in (
        f"`atto-oto50-int8` is the smallest: {100 * (1 - small['artifact_bytes'] / dense['artifact_bytes']):.1f} %",
        f"`{fast['variant']}` has the lowest median latency, {ms_text(fast['latency_ms_p50'])}:"
        f" {fast['latency_ratio']:.1f} times as fast as dense in PyTorch eager",
        f"in ONNX Runtime takes {ms_text(dense['latency_ms_p50'])}, {dense['latency_ratio']:.1f} times as fast",
        f"corrupted test images (noise, blur, brightness, contrast, JPEG) `atto-oto50-int8` has"
        f" {100 * small['corrupted_top1']:.1f} %, dense {100 * dense['corrupted_top1']:.1f} %",
        "filmed in simulation `atto-oto50-int8` has 84.20 % [81.80 %, 86.30 %], on the same as they are 86.10 %",
        "over 1.0 minutes: stable, the latency's change +0.1 % [\N{MINUS SIGN}1.0, +1.1], 0 of 10,800 answers changed",
    ):
        assert words in text
    assert "Marked" not in text
    run = json.loads((reports / "run.json").read_text())
    (reports / "run.json").write_text(json.dumps(run | {"busy": True, "printed": None, "soak": None}))
    text = filled(block("findings"), top)
    assert "Marked: others used the processor" in text
    assert "printed" not in text


def test_the_default_is_a_profile_too(tmp_path, monkeypatch):
    top = reported(tmp_path, monkeypatch, params_of())
    (top / "profiles/tiny-one").rename(top / "kept")
    (top / "kept/reports").rename(top / "reports")
    (top / "kept/params.yaml").rename(top / "params.yaml")
    assert "`atto-oto50-int8`" in filled(block("headline").replace("tiny-one", "default"), top)


MEASURED = re.compile(
    r"[-+\N{MINUS SIGN}]\d+\.\d|\d\.\d+ ?(%|points|ms\b|[KMG]B\b|times)|\d\N{MULTIPLICATION SIGN}|\d (ms|points)\b"
)
"""What a measured figure looks like: a signed decimal, or a decimal with a unit."""


def test_no_measured_figure_stands_in_the_readme_outside_the_blocks_that_are_filled():
    text = re.sub(r"<!-- [\w-]+:\w+ -->.*?<!-- end -->", "", (TOP / "README.md").read_text(), flags=re.DOTALL)
    found = [line for line in text.splitlines() if MEASURED.search(line)]
    assert found == []


@pytest.mark.parametrize(
    "figure", ["0.46 ms", "\N{MINUS SIGN}0.12 points", "86.54 %", "1.44 MB", "6.8 times", "3 points"]
)
def test_a_measured_figure_is_recognised(figure):
    assert MEASURED.search(f"words {figure} words")


def test_an_unknown_block_or_a_missing_report_is_named(top):
    with pytest.raises(UserError, match="no block 'nothing'; known: headline, findings, variants, groups, claims"):
        filled(block("nothing"), top)
    (top / "profiles/tiny-one/reports/run.json").unlink()
    with pytest.raises(UserError, match=r"run\.json is missing"):
        filled(block("headline"), top)


@pytest.mark.parametrize("name", ["headline", "variants"])
def test_a_block_without_an_end_is_refused_before_the_text_behind_it_is_lost(top, name):
    text = block(name).replace("<!-- end -->\n", "") + block("claims")
    with pytest.raises(UserError, match=rf"<!-- tiny-one:{name} --> has no <!-- end -->: .*nothing was written"):
        filled(text, top)
    with pytest.raises(UserError, match="has no <!-- end -->"):
        filled(block(name).replace("<!-- end -->\n", ""), top)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("headline", "variants", {}),
        ("variants", "variants", [{}]),
        ("headline", "metrics", {}),
        ("headline", "metrics", {"headline_variant": "gone"}),
        ("findings", "run", None),
        ("claims", "claims", [{"id": "x"}]),
        ("claims", "claims", []),
    ],
)
def test_report_files_that_do_not_fit_are_named(top, name, file, content):
    (top / f"profiles/tiny-one/reports/{file}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"profiles/tiny-one/reports.*run `dvc repro report`"):
        filled(block(name), top)


def test_outside_the_top_the_command_says_where_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"README\.md is missing: run this at the top of the checkout"):
        readme.main()


@pytest.mark.parametrize(("share", "faster"), [(0.5, True), (1.1, False)])
def test_the_headline_calls_nothing_faster_that_is_not(top, share, faster):
    path = top / "profiles/tiny-one/reports/variants.json"
    rows = json.loads(path.read_text())
    metrics = json.loads((path.parent / "metrics.json").read_text())
    by_name = {row["variant"]: row for row in rows}
    chosen, dense = by_name[metrics["headline_variant"]], by_name["atto-none-fp32"]
    chosen["latency_ms_p50"] = share * dense["latency_ms_p50"]
    path.write_text(json.dumps(rows))
    text = filled(block("headline"), top)
    words = f"{ms_text(chosen['latency_ms_p50'])} instead of {ms_text(dense['latency_ms_p50'])}** (both in ONNX"
    assert (words in text) == faster
    assert ("and no faster: " in text) == (not faster)


def test_the_findings_tell_what_simply_training_a_narrower_network_gives(tmp_path, monkeypatch):
    budget = {"epochs": 4, "learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "continued": budget | {"method": "continued"},
        "oto50": budget | {"method": "oto", "group_sparsity": 0.5},
        "narrow": budget | {"method": "small_dense", "macs_reduction": 0.5},
    }
    variants = [("none", "fp32"), ("continued", "fp32"), ("oto50", "int8"), ("narrow", "int8"), ("narrow", "fp32")]
    top = reported(tmp_path, monkeypatch, params_of(pruners=pruners, variants=variants))
    metrics = json.loads((top / "profiles/tiny-one/reports/metrics.json").read_text())
    rows = json.loads((top / "profiles/tiny-one/reports/variants.json").read_text())
    text = filled(block("findings"), top)
    quantizer = next(row["quantizer"] for row in rows if row["variant"] == metrics["headline_variant"])
    (line,) = [line for line in text.splitlines() if "Simply a narrower network" in line]
    assert f"`atto-narrow-{quantizer}` has" in line
    assert f"`{metrics['headline_variant']}` has" in line
    assert "narrower" not in filled(block("findings"), reported(tmp_path / "other", monkeypatch, params_of()))
