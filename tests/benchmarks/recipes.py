"""Try a change of a profile's recipe: train a model with it and append what came out to `reports/recipes.csv`.

Run, from a profile's folder with its images, one process for each core that is free:

    python ../../tests/benchmarks/recipes.py finetune.epochs=20 finetune.random_erasing=0.25 --seeds 0 1
    python ../../tests/benchmarks/recipes.py --pruning convnext-oto50 'pruners.*.learning_rate_factor=0.2'

The first trains the profile's first model, or that of `--model`. The second prunes the dense network that
`dvc repro -s finetune@<model>` made in the profile; `*` stands for all pruners that have this key, as one budget is
asked of them and their control. Without changes the recipe is tried as it stands. Figures are those of validation
images: recipes are chosen by them.
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

from stages.artifacts.artifact import read_description
from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import UserError, run_stage
from stages.common.files import read_csv
from stages.datasets.store import read_info
from stages.edge.machine import describe_machine
from stages.params.load import load_params
from stages.params.whole import Params

ROOT = Path(__file__).parents[2]
LOG = Path("reports/recipes.csv")
TRAINING, PRUNING = ("base", "models", "finetune"), ("base", "finetune", "pruners")
"""The sections that a training reads, and a pruning; the images are those that the profile has."""
COLUMNS = (
    *("change", "epochs", "seed", "validation_images", "validation_top1", "seconds", "images_per_second", "threads"),
    *("cpu", "commit"),
)


def commit() -> str:
    """The commit of the code, with "-dirty" if stages/ or the params have changes that it does not hold."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True).stdout.strip()

    changes = git("status", "--porcelain", "stages", str(paths.PARAMS.resolve()))
    return git("rev-parse", "HEAD") + ("-dirty" if changes else "")


def changed(raw: dict, changes: list[str], seed: int, sections_read: tuple[str, ...]) -> dict:
    """The params with `key.of.a.setting=value` set, or `key.*.setting=value` wherever it is; the value is YAML.

    Raises:
        UserError: for a change of another form, of a seed or of what is not read, or to what is no value.
    """
    if seeds := [change for change in changes if change.partition("=")[0].endswith(".seed")]:
        raise UserError(f"{seeds[0]}: seeds are given by --seeds")
    if idle := [change for change in changes if change.partition("=")[0].partition(".")[0] not in sections_read]:
        raise UserError(f"{idle[0]}: what is tried does not depend on it: only on {', '.join(sections_read)}")
    for change in [*changes, f"base.seed={seed}", f"root={ROOT}"]:
        key, equals, value = change.partition("=")
        *sections, name = key.split(".")
        if not equals:
            raise UserError(f"{change}: is no change: write key=value, as in finetune.epochs=20")
        places = [raw]
        for section in sections:
            places = [inner for place in places for inner in _within(place, section, name)]
        if not places or not all(isinstance(place, dict) for place in places):
            raise UserError(f"{change}: {paths.PARAMS} has no section {'.'.join(sections)}, or none with this key")
        try:
            for place in places:
                place[name] = YAML(typ="safe").load(value)
        except YAMLError:
            raise UserError(f"{change}: {value} is no YAML value") from None
    return raw


def _within(place: object, section: str, name: str) -> list[object]:
    """What `section` of a place is; `*` is each that has the key `name`."""
    if not isinstance(place, dict):
        return [None]
    if section == "*":
        return [inner for inner in place.values() if isinstance(inner, dict) and name in inner]
    return [place.setdefault(section, {})]


def tried(changes: list[str], seed: int, model: str | None, pruning: str | None) -> dict[str, object]:
    """One training, or one pruning of the profile's dense network, in a folder of its own, which goes when it is done.

    Raises:
        UserError: for an unknown model or pruning, or one whose dense network is not there; if the stage ends with an
            error.
    """
    own = load_params(Params)  # tells what is wrong without the changes
    for option, key, known in [("--model", model, own.models), ("--pruning", pruning, own.pruned)]:
        if key is not None and key not in known:
            raise UserError(f"{option} {key}: {paths.PARAMS} has no such key: it has {', '.join(known)}")
    which = ["--pruning", pruning] if pruning else ["--model", model] if model else []
    model = own.pruned[pruning].model if pruning else model or next(iter(own.models))
    if pruning:
        read_description(paths.dense(model))
    raw = changed(YAML(typ="safe").load(paths.PARAMS), changes, seed, PRUNING if pruning else TRAINING)
    raw["models"][model].pop("seed", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        YAML().dump(raw, folder / paths.PARAMS)
        for given in [paths.IMAGES, *([paths.dense(model)] if pruning else [])]:
            (folder / given).parent.mkdir(parents=True)
            (folder / given).symlink_to(given.resolve())
        try:
            params = load_params(Params, folder / paths.PARAMS)
        except UserError as error:
            told = str(error).replace(str(folder / paths.PARAMS), f"{paths.PARAMS} with these changes")
            raise UserError(told) from None
        if pruning:
            stage, key, artifact, curve = "prune", pruning, paths.pruned(pruning), paths.pruned_curve(pruning)
        else:
            stage, key, artifact, curve = "finetune", model, paths.dense(model), paths.dense_curve(model)
        command = [sys.executable, "-m", f"stages.{stage}", key]
        if subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
            raise UserError(f"{' '.join(changes) or 'the recipe'}: did not train, for the reason above")
        top1 = read_description(folder / artifact).metrics["validation_top1"]
        rows = read_csv(folder / curve)
    if not rows:
        raise UserError(f"--pruning {pruning}: trains nothing: there is no recipe to try")
    return {
        "change": " ".join([*which, *changes]) or "none",
        "epochs": len(rows),
        "seed": seed,
        "validation_images": read_info(paths.IMAGES).counts["validation"],
        "validation_top1": top1,
        "seconds": round(sum(float(row["seconds"]) for row in rows)),
        "images_per_second": round(sum(float(row["images_per_second"]) for row in rows) / len(rows)),
        "threads": threads_for(params.base.threads),
        "cpu": describe_machine(())["cpu"],
        "commit": commit(),
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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="KEY", help="of models, to train instead of the first")
    what.add_argument("--pruning", metavar="KEY", help="of pruned: prune the dense network instead of training one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log", type=Path, default=LOG)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the training and removes its folder
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    written(arguments.log)  # refuses another file before hours of training
    for seed in arguments.seeds:
        append(arguments.log, tried(arguments.changes, seed, arguments.model, arguments.pruning))


if __name__ == "__main__":
    run_stage(main)
