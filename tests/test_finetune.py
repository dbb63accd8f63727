import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toy_project import PARAMS, pruned_project

import stages
from stages import finetune
from stages.common.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned_project(tmp_path)
    write_params(tmp_path, batch_size=4)
    return tmp_path


def write_params(folder: Path, batch_size: int) -> None:
    recipe = PARAMS["finetune"] | {"epochs": 1000, "batch_size": batch_size}
    models = {"toy": PARAMS["models"]["toy"] | {"arguments": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}}}
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"finetune": recipe, "models": models}))


def test_a_batch_larger_than_the_training_part_is_refused_before_any_work(folder: Path, monkeypatch):
    write_params(folder, batch_size=5)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["finetune", "toy"])
    with pytest.raises(UserError, match=r"finetune\.batch_size = 5: the training part .* has only 4 images"):
        finetune.main()
    assert not (folder / ".scratch").exists()


def test_ctrl_c_ends_a_training_with_one_line_that_says_what_is_kept(folder: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.finetune", "toy"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(stages.__file__).parents[1])},
    )
    assert process.stdout.readline().startswith("finetune toy: epoch 1/1000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("interrupted: finetune toy: ")
    assert " of 1000 epochs are finished and kept" in errors
    assert errors.count("\n") == 1
    assert list((folder / ".scratch/finetune/toy").glob("*/checkpoint.pt"))
