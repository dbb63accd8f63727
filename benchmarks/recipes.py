"""Try a change of a profile's recipe: train a model with it and append the result to `reports/recipes.csv`.

Run, from a profile's folder with its images, one process for each free core:

    python -m benchmarks.recipes finetune.epochs=20 finetune.random_erasing=0.25 --seeds 0 1
    python -m benchmarks.recipes --pruned convnext-oto50 'pruners.*.learning_rate_factor=0.2'

The first trains the profile's first model, or that of `--model`. The second prunes the dense network that
`dvc repro -s finetune@<model>` made in the profile; `*` stands for all pruners that have this key, since they share one
budget with their control. Without changes, the recipe of params.yaml is tried. Figures are of the validation images,
since they choose the recipe.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from stages.artifacts.description import read_description
from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import UserError, run_stage
from stages.common.files import read_csv
from stages.datasets.store import read_info
from stages.edge.machine import describe_machine
from stages.params.load import load_params
from stages.params.whole import Params

ROOT = Path(__file__).parents[1]
LOG = Path("reports/recipes.csv")
SECTIONS = {"finetune": ("base", "models", "finetune"), "prune": ("base", "finetune", "pruners")}
"""The sections that a stage reads beside those that only name its entry; the images are those of the profile."""


def apply(raw: dict, change: str, sections: tuple[str, ...]) -> None:
    """Set `key.of.a.setting=value`, or `key.*.setting=value` wherever it is; the value is YAML.

    Raises:
        UserError: if the change has another form, sets a seed or a section that the stage does not read.
    """
    key, equals, value = change.partition("=")
    *parents, name = key.split(".")
    if not equals or not parents:
        raise UserError(f"{change}: write key=value, as in finetune.epochs=20")
    if name == "seed":
        raise UserError(f"{change}: give seeds with --seeds")
    if parents[0] not in sections:
        raise UserError(f"{change}: the training reads only {', '.join(sections)}")
    places = [raw]
    for parent in parents:
        if parent == "*":
            places = [
                inner for place in places for inner in place.values() if isinstance(inner, dict) and name in inner
            ]
        else:
            places = [place.setdefault(parent, {}) for place in places]
        if not places or not all(isinstance(place, dict) for place in places):
            raise UserError(f"{change}: {paths.PARAMS} has no section {'.'.join(parents)}, or none with this key")
    try:
        for place in places:
            place[name] = YAML(typ="safe").load(value)
    except YAMLError:
        raise UserError(f"{change}: {value} is not valid YAML") from None


def tried(changes: list[str], seed: int, model: str | None, pruned: str | None) -> dict[str, Any]:
    """One training, or one pruning of the profile's dense network, in a temporary folder.

    Raises:
        UserError: for an unknown model or entry of `pruned`, if the dense network is missing, or if the stage fails.
    """
    own = load_params(Params)  # names problems of the file before those of the changes
    for option, named, known in [("--model", model, list(own.models)), ("--pruned", pruned, list(own.pruned))]:
        if named is not None and named not in known:
            raise UserError(f"{option} {named}: {paths.PARAMS} has no such key: it has {', '.join(known)}")
    which = ["--pruned", pruned] if pruned else ["--model", model] if model else []
    model = own.pruned[pruned].model if pruned else model or next(iter(own.models))
    if pruned:
        read_description(paths.dense(model))
        stage, key, artifact, curve = "prune", pruned, paths.pruned(pruned), paths.pruned_curve(pruned)
    else:
        stage, key, artifact, curve = "finetune", model, paths.dense(model), paths.dense_curve(model)
    raw = YAML(typ="safe").load(paths.PARAMS)
    for change in changes:
        apply(raw, change, SECTIONS[stage])
    raw["base"]["seed"] = seed
    raw["models"][model].pop("seed", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        YAML().dump(raw, folder / paths.PARAMS)
        for given in [paths.IMAGES, *([paths.dense(model)] if pruned else [])]:
            (folder / given).parent.mkdir(parents=True)
            (folder / given).symlink_to(given.resolve())
        try:
            params = load_params(Params, folder / paths.PARAMS)
        except UserError as error:
            raise UserError(
                str(error).replace(str(folder / paths.PARAMS), f"{paths.PARAMS} with the changes")
            ) from None
        command = [sys.executable, "-m", f"stages.{stage}", key]
        if subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
            raise UserError(f"{' '.join(changes) or 'the recipe'}: the training failed, for the reason above")
        top1 = read_description(folder / artifact).metrics["validation_top1"]
        rows = read_csv(folder / curve)
    if not rows:
        raise UserError(f"--pruned {pruned}: its pruner does not train, so it has no recipe")
    described = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip()
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
        "commit": commit or None,
    }


def append(log: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file with its keys as the columns; one write, since several processes may write."""
    new = not log.exists()
    with log.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="KEY", help="train this entry of models instead of the first")
    what.add_argument("--pruned", metavar="KEY", help="prune the dense network as this entry of pruned says")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--log", type=Path, default=LOG)
    arguments = parser.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        append(arguments.log, tried(arguments.changes, seed, arguments.model, arguments.pruned))


if __name__ == "__main__":
    run_stage(main)
