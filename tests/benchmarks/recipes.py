"""Try a change of a profile's recipe: train its first model with it and append what came out to `reports/recipes.csv`.

Run, from a profile's folder with its images, one process for each core that is free:

    python ../../tests/benchmarks/recipes.py finetune.epochs=20 finetune.random_erasing=0.25 --seeds 0 1

Without changes it trains the recipe as it stands. Figures are those of validation images: recipes are chosen by them.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there

from ruamel.yaml import YAML, YAMLError

from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import UserError, run_stage
from stages.common.params import load_params
from stages.common.without_dvc import TERMINATED, commit
from stages.datasets.store import read_info
from stages.edge.machine import describe_machine

ROOT = Path(__file__).parents[2]
LOG = Path("reports/recipes.csv")
SECTIONS = ("base", "models", "finetune")
"""What a training reads; the images are those that the profile has."""
COLUMNS = (
    *("change", "epochs", "seed", "validation_images", "validation_top1", "seconds", "images_per_second", "threads"),
    *("cpu", "commit"),
)


def changed(raw: dict, changes: list[str], seed: int) -> dict:
    """The params with `key.of.a.setting=value` set; the value is YAML.

    Raises:
        UserError: for a change of another form, of a seed or of what no training reads, or to what is no value.
    """
    if seeds := [change for change in changes if change.partition("=")[0].endswith(".seed")]:
        raise UserError(f"{seeds[0]}: seeds are given by --seeds")
    if idle := [change for change in changes if change.partition("=")[0].partition(".")[0] not in SECTIONS]:
        raise UserError(f"{idle[0]}: a training does not depend on it: only on {', '.join(SECTIONS)}")
    for change in [*changes, f"base.seed={seed}", f"root={ROOT}"]:
        key, equals, value = change.partition("=")
        *sections, name = key.split(".")
        if not equals:
            raise UserError(f"{change}: is no change: write key=value, as in finetune.epochs=20")
        place = raw
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise UserError(f"{change}: {'.'.join(sections)} is no section of {paths.PARAMS}")
        try:
            place[name] = YAML(typ="safe").load(value)
        except YAMLError:
            raise UserError(f"{change}: {value} is no YAML value") from None
    return raw


def train(changes: list[str], seed: int) -> dict[str, object]:
    """One training in a folder of its own, which goes when it is done."""
    load_params()  # tells what is wrong without the changes
    raw = changed(YAML(typ="safe").load(paths.PARAMS), changes, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        YAML().dump(raw, folder / paths.PARAMS)
        (folder / "data").mkdir()
        (folder / paths.IMAGES).symlink_to(paths.IMAGES.resolve())
        try:
            params = load_params(folder / paths.PARAMS)
        except UserError as error:
            told = str(error).replace(str(folder / paths.PARAMS), f"{paths.PARAMS} with these changes")
            raise UserError(told) from None
        key = next(iter(params.models))
        command = [sys.executable, "-m", "stages.finetune", key]
        if subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
            raise UserError(f"{' '.join(changes) or 'the recipe'}: did not train, for the reason above")
        with (folder / paths.dense_curve(key)).open() as file:
            curve = list(csv.DictReader(file))
    seconds = sum(float(row["seconds"]) for row in curve)
    return {
        "change": " ".join(changes) or "none",
        "epochs": params.finetune.epochs,
        "seed": seed,
        "validation_images": read_info(paths.IMAGES).counts["validation"],
        "validation_top1": max(float(row["validation_top1"]) for row in curve),
        "seconds": round(seconds),
        "images_per_second": round(sum(float(row["images_per_second"]) for row in curve) / len(curve)),
        "threads": threads_for(params.base.threads),
        "cpu": describe_machine(())["cpu"],
        "commit": commit(paths.PARAMS),
    }


def written(log: Path) -> str:
    """What the log holds.

    Raises:
        UserError: if the file has other columns.
    """
    text = log.read_text() if log.exists() else ""
    header = ",".join(COLUMNS)
    if text and text.partition("\n")[0] != header:
        raise UserError(f"{log}: is no log of recipes, which begins with {header}: name another file by --log")
    return text


def append(log: Path, row: dict[str, object]) -> None:
    """Add a line to the log, or make it."""
    text = written(log)
    with log.open("a", newline="") as file:  # one line at once: several processes may write
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not text:
            writer.writeheader()
        elif not text.endswith("\n"):
            file.write("\n")
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log", type=Path, default=LOG)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # which ends the training and its folder too
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    written(arguments.log)  # refuses another file before hours of training
    for seed in arguments.seeds:
        append(arguments.log, train(arguments.changes, seed))


if __name__ == "__main__":
    run_stage(main)
