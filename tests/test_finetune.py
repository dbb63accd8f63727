import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.metrics import balanced_accuracy_score
from toy_network import UNCOUNTABLE
from toy_project import CLASSES, PARAMS, pruned_project

import stages
from stages import finetune
from stages.artifacts.artifact import load_artifact
from stages.common.errors import UserError
from stages.datasets.store import open_part
from stages.networks import architectures
from stages.networks.build import build_network, spec_of
from stages.networks.predict import predict_logits, top1
from stages.networks.preprocess import Classifier
from stages.params.models import Model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned_project(tmp_path)
    write_params(tmp_path, batch_size=4)
    return tmp_path


def write_params(folder: Path, batch_size: int, recipe: dict | None = None, **model) -> None:
    recipe = PARAMS["finetune"] | {"epochs": 1000, "batch_size": batch_size} | (recipe or {})
    models = {"toy": PARAMS["models"]["toy"] | {"arguments": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}} | model}
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS | {"finetune": recipe, "models": models}))


def test_a_batch_larger_than_the_training_part_is_refused_before_any_work(folder: Path, monkeypatch):
    write_params(folder, batch_size=5)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["finetune", "toy"])
    with pytest.raises(UserError, match=r"finetune\.batch_size = 5: the training part .* has only 4 images"):
        finetune.main()
    assert not (folder / ".scratch").exists()


def test_a_network_that_profile_cannot_count_is_refused_before_any_work(folder: Path, monkeypatch):
    monkeypatch.setattr(architectures, "CUSTOM", folder)
    (folder / "pairs.py").write_text(UNCOUNTABLE)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["models"]["toy"] |= {"library": "custom", "architecture": "pairs.py", "arguments": {}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["finetune", "toy"])
    with pytest.raises(UserError, match=r"models\.toy: pairs: Bilinear .* cannot be counted"):
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
    assert process.stdout.readline().startswith("toy: validation top-1 of a constant answer: ")
    assert process.stdout.readline().startswith("finetune toy: epoch 1/1000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.startswith("interrupted: finetune toy: ")
    assert " of 1000 epochs are finished and kept" in errors
    assert errors.count("\n") == 1
    assert list((folder / ".scratch/finetune/toy").glob("*/checkpoint.pt"))


def given_weights(folder: Path, classes: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = Model(**yaml.safe_load((folder / "params.yaml").read_text())["models"]["toy"])
    state = build_network(spec_of(model, classes)).state_dict()
    torch.save({"state_dict": state}, folder / "given.pth")
    return state


def run(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["finetune", "toy"])
    finetune.main()


def test_zero_epochs_take_the_given_weights_and_their_normalization_as_they_are(folder: Path, monkeypatch, capsys):
    state = given_weights(folder)
    write_params(folder, 4, weights="given.pth", normalization=[[0.1, 0.2, 0.3], 0.5], epochs=0)
    run(folder, monkeypatch)
    network, description = load_artifact(folder / "models/dense/toy")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert (description.mean, description.std) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    part = open_part(folder / "data/images", "validation")
    logits = predict_logits(Classifier(description.preprocess(), network), part.images, 64)
    balanced = balanced_accuracy_score(part.labels, logits.argmax(1))
    expected = {"validation_top1": top1(logits, part.labels), "validation_balanced_accuracy": balanced, "epoch": 0}
    assert description.metrics == pytest.approx(expected)
    right = set(part.labels[logits.argmax(1) == part.labels])
    assert description.never_right == [name for k, name in enumerate(CLASSES) if k not in right]
    out = capsys.readouterr().out
    assert "toy: warning: " in out  # random weights do not know all classes
    assert f"validation top-1 as loaded: {100 * description.metrics['validation_top1']:.2f} %" in out
    assert len((folder / "reports/curves/dense/toy.csv").read_text().splitlines()) == 1


def test_a_fresh_head_gives_every_class_the_same_chance(folder: Path, monkeypatch, capsys):
    given_weights(folder, classes=3)
    write_params(folder, 4, {"epochs": 2, "label_smoothing": 0.0, "learning_rate": 1e-9}, weights="given.pth")
    run(folder, monkeypatch)
    assert "fresh, starting at zero: head.fc.weight, head.fc.bias" in capsys.readouterr().out
    rows = (folder / "reports/curves/dense/toy.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[2]) for row in rows] == pytest.approx([math.log(5)] * 2, abs=1e-4)
    assert load_artifact(folder / "models/dense/toy")[1].fresh == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize(
    ("recipe", "model", "message"),
    [
        ({"epochs": 0}, {}, r"models\.toy\.weights = 'none': finetune\.epochs = 0 leaves random weights"),
        ({}, {"weights": "no.pth"}, r"models\.toy: weights 'no\.pth': no such file"),
        ({}, {"weights": "given.pth", "arguments": {}}, r"models\.toy: weights 'given\.pth' .* is not of this network"),
        ({}, {"normalization": [[0.1, 0.2], 0.5]}, r"models\.toy\.normalization: 2 means and 3 standard deviations"),
        ({"class_weights": "balanced"}, {}, r"class_weights = 'balanced': the training part has no image of "),
        ({"pretrained": {"freeze": ["x.*"]}}, {"weights": "given.pth"}, r"freeze: 'x\.\*' matches no tensor"),
    ],
)
def test_weights_and_settings_that_do_not_fit_are_refused_before_training(folder, monkeypatch, recipe, model, message):
    given_weights(folder)
    write_params(folder, 4, recipe, **model)
    with pytest.raises(UserError, match=message):
        run(folder, monkeypatch)
    assert not (folder / "models/dense").exists()
