import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import change_arrays, read

from stages.common.errors import UserError

VARIANT = "atto-oto50-int8"
FOLDER = Path("reports/profile") / VARIANT


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def fewer_predictions() -> None:
    change_arrays(FOLDER / "predictions.npz", lambda stored: {key: array[:-1] for key, array in stored.items()})


def other_order() -> None:
    change_arrays(FOLDER / "predictions.npz", lambda stored: {key: array[::-1] for key, array in stored.items()})


def fewer_probabilities() -> None:
    change_arrays(FOLDER / "predictions.npz", lambda stored: stored | {"confidence": stored["confidence"][1:]})


def other_corrupted_images() -> None:
    change_arrays(FOLDER / "corruptions.npz", lambda stored: stored | {"position": stored["position"] + 1})


def fewer_corrupted_images() -> None:
    change_arrays(FOLDER / "corruptions.npz", lambda stored: stored | {"predicted": stored["predicted"][:, 1:]})


def no_such_images() -> None:
    change_arrays(FOLDER / "corruptions.npz", lambda stored: stored | {"position": stored["position"] + 10**6})


def fewer_images() -> None:
    fewer_predictions()
    with np.load(FOLDER / "predictions.npz") as stored:
        right = float((stored["label"] == stored["predicted"]).mean())
    edit(FOLDER / "profile.json", lambda p: p.update(n_test=p["n_test"] - 1, top1=right))


def other_file_timed() -> None:
    def change(edge: dict) -> None:
        next(row for row in edge["rows"] if row["variant"] == VARIANT)["onnx_sha256"] = "e" * 64

    edit(Path("reports/edge/edge.json"), change)


def not_timed() -> None:
    def change(edge: dict) -> None:
        edge["rows"] = [row for row in edge["rows"] if row["variant"] != VARIANT]

    edit(Path("reports/edge/edge.json"), change)


BAD_INPUTS = {
    "missing profile": (lambda: (FOLDER / "profile.json").unlink(), "missing"),
    "half-written profile": (lambda: (FOLDER / "profile.json").write_text('{"variant": '), "not valid JSON"),
    "missing figure": (lambda: edit(FOLDER / "profile.json", lambda p: p.pop("macs")), "macs"),
    "text for a figure": (lambda: edit(FOLDER / "profile.json", lambda p: p.update(top1="high")), "top1"),
    "missing predictions": (lambda: (FOLDER / "predictions.npz").unlink(), "missing"),
    "half-written predictions": (
        lambda: (FOLDER / "predictions.npz").write_bytes((FOLDER / "predictions.npz").read_bytes()[:200]),
        "cannot be read",
    ),
    "fewer predictions": (fewer_predictions, "predictions"),
    "fewer probabilities": (fewer_probabilities, "probabilities"),
    "missing corruptions": (lambda: (FOLDER / "corruptions.npz").unlink(), "missing"),
    "other corrupted images": (other_corrupted_images, "other corrupted images than atto-none-fp32"),
    "fewer corrupted images": (fewer_corrupted_images, "9 cells of 200 test images"),
    "corrupted images that are not there": (no_such_images, "9 cells of 200 test images"),
    "fewer test images": (fewer_images, "has 400"),
    "labels in another order": (other_order, "order"),
    "other top-1": (lambda: edit(FOLDER / "profile.json", lambda p: p.update(top1=0.5)), "top-1"),
    "other data": (lambda: edit(FOLDER / "profile.json", lambda p: p.update(data_sha256="c" * 64)), "one data set"),
    "other settings": (lambda: edit(FOLDER / "profile.json", lambda p: p.update(pruner="oto70")), "params.yaml"),
    "other file timed": (other_file_timed, "different runs"),
    "not timed": (not_timed, "edge.json"),
    "no description": (lambda: (FOLDER / "model.json").unlink(), "model.json"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_input_is_refused_with_the_name_of_the_variant_and_the_remedy(bad: str, folder: Path):
    spoil, words = BAD_INPUTS[bad]
    spoil()
    with pytest.raises(UserError) as refusal:
        read()
    message = str(refusal.value)
    assert VARIANT in message
    assert words in message
    assert "dvc repro" in message


def test_a_broken_curve_is_refused(folder: Path):
    path = Path("reports/curves/pruned/atto-oto50.csv")
    path.write_text(path.read_text() + "7,0.001")
    with pytest.raises(UserError, match="atto-oto50"):
        read()


def test_only_listed_variants_and_curves_of_trainings_are_read(folder: Path):
    (folder / "reports/profile/atto-old-fp32").mkdir()
    assert "atto-old-fp32" not in read().variants
    assert list(read().curves) == ["atto", "atto-continued", "atto-oto50", "atto-l1"]
