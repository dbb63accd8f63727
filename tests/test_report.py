import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from reporting.synthetic_run import params_of, write_run

from stages import report
from stages.common.errors import UserError

OUTPUTS = ("metrics.json", "run.json", "variants.json", "variants.csv", "summary.md", "index.html", "cards", "plots")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_run(tmp_path, params_of())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[str, bytes]:
    files = [path for name in OUTPUTS for path in sorted((folder / "reports" / name).rglob("*") or [])]
    files += [folder / "reports" / name for name in OUTPUTS if (folder / "reports" / name).is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def test_the_report_is_written_whole(folder: Path):
    report.main()
    rows = json.loads((folder / "reports/variants.json").read_text())
    with (folder / "reports/variants.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == [row["variant"] for row in table]
    assert [float(row["top1"]) for row in table] == [row["top1"] for row in rows]
    assert table[0]["p_value"] == ""
    assert {path.stem for path in (folder / "reports/cards").iterdir()} == {row["variant"] for row in rows}
    plots = {path.name for path in (folder / "reports/plots").iterdir()}
    assert {"pareto_size.png", "pareto_latency.png", "training.png", "training.csv", "confusion.csv"} <= plots
    assert (folder / "reports/metrics.json").read_text().endswith("}\n")
    run = json.loads((folder / "reports/run.json").read_text())
    assert {run["run_id"]} == {row["run_id"] for row in rows}
    assert {"machine", "protocol", "data_name", "n_test", "versions"} <= run.keys()
    assert "rows" not in run


def test_the_same_inputs_give_the_same_bytes(folder: Path):
    report.main()
    first = written(folder)
    report.main()
    assert written(folder) == first


def test_a_bad_input_leaves_the_last_good_report_whole(folder: Path):
    report.main()
    good = written(folder)
    (folder / "reports/profile/atto-l1-fp32/profile.json").write_text("{")
    with pytest.raises(UserError, match="atto-l1-fp32"):
        report.main()
    assert written(folder) == good


def limited(file_bytes: int) -> subprocess.CompletedProcess:
    """The stage on a disk that takes no file of more than `file_bytes`."""
    return subprocess.run(
        [sys.executable, "-m", "stages.report"],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": str(Path(report.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",  # or Python itself would leave cut files of bytecode
        },
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


def test_a_disk_that_fills_up_is_one_line_and_leaves_the_last_report_whole(folder: Path):
    report.main()
    good = written(folder)
    (folder / "params.yaml").write_text((folder / "params.yaml").read_text() + "report: {confidence: 0.9}\n")
    done = limited((folder / "reports/index.html").stat().st_size // 2)  # cards, plots and tables still fit
    assert done.returncode == 2
    assert done.stderr == "error: cannot write reports/index.html: File too large: make room, then run again\n"
    assert written(folder) == good
    assert limited(resource.RLIM_INFINITY).returncode == 0
    assert written(folder) != good


def test_cards_of_variants_that_are_no_longer_listed_go(folder: Path):
    (folder / "reports/cards").mkdir()
    (folder / "reports/cards/old.md").write_text("old")
    report.main()
    assert not (folder / "reports/cards/old.md").exists()


def test_the_stage_runs_without_torch_and_imports_nothing_heavy_before_it_reads(folder: Path):
    code = (
        "import sys; import stages.report;"
        "heavy = {'torch', 'timm', 'matplotlib', 'jinja2', 'onnxruntime'} & sys.modules.keys();"
        "stages.report.main(); print(heavy, 'torch' in sys.modules)"
    )
    root = Path(report.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)}
    )
    heavy, torch = done.stdout.split()
    assert heavy == "set()"
    assert torch == "False"


def test_a_user_error_is_one_line_and_exit_code_2(folder: Path):
    (folder / "reports/edge/edge.json").unlink()
    root = Path(report.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "stages.report"], capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "dvc repro" in done.stderr
