"""Paths of inputs and outputs, relative to the folder of `params.yaml` (the top or `profiles/<name>`)."""

from pathlib import Path

PARAMS = Path("params.yaml")
IMAGES = Path("data/images")
REPORTS = Path("reports")
EDGE = REPORTS / "edge"
PLOTS = REPORTS / "plots"
SCRATCH = Path(".scratch")  # downloads, and checkpoints of unfinished work; ignored by git and DVC


def dense(model: str) -> Path:
    return Path("models/dense") / model


def pruned(key: str) -> Path:
    return Path("models/pruned") / key


def compressed(variant: str) -> Path:
    return Path("models/compressed") / variant


def dense_curve(model: str) -> Path:
    return REPORTS / "curves/dense" / f"{model}.csv"


def pruned_curve(key: str) -> Path:
    return REPORTS / "curves/pruned" / f"{key}.csv"


def compressed_curve(variant: str) -> Path:
    return REPORTS / "curves/compressed" / f"{variant}.csv"


def profile(variant: str) -> Path:
    return REPORTS / "profile" / variant
