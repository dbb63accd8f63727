"""Compare fine-tuning on a few images of each class with a linear probe on the same images.

Run, from a profile's folder with its images; the profile's first model needs `weights`:

    python -m benchmarks.few_images --per-class 40 --seeds 0 1 2

Each seed draws the images of the training part and seeds the training. The probe is logistic regression (scikit-learn)
on what the network gives to its head, with the inverse regularization that is best on the validation images, so it is
an upper bound for a probe; fine-tuning is `stages.finetune` with the profile's recipe. Both are measured on the
validation images. Rows are appended to `reports/few_images.csv`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from sklearn.linear_model import LogisticRegression
from torch import nn

from benchmarks.recipes import ROOT, append
from stages.artifacts.artifact import load_artifact
from stages.artifacts.initial_weights import load_weights, statistics
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_json
from stages.datasets.store import INFO, Part, open_part, read_info
from stages.networks.build import build_network, spec_of
from stages.networks.predict import EVALUATION_BATCH, predict_logits
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.statistics import mcnemar_p

LOG = Path("reports/few_images.csv")
REGULARIZATION = (0.001, 0.01, 0.1, 1.0)


def few(part: Part, per_class: int, seed: int) -> np.ndarray:
    """Indices of `per_class` random images of each class.

    Raises:
        UserError: if a class has fewer.
    """
    if (least := np.bincount(part.labels).min()) < per_class:
        raise UserError(f"--per-class {per_class}: a class has only {least} training images")
    generator = np.random.default_rng(seed)
    chosen = [
        generator.choice(np.flatnonzero(part.labels == label), per_class, replace=False)
        for label in range(part.labels.max() + 1)
    ]
    return np.sort(np.concatenate(chosen))


def probe(params: Params, key: str, chosen: np.ndarray) -> np.ndarray:
    """The validation labels that the best linear probe predicts, `[N]`."""
    info, model = read_info(paths.IMAGES), params.models[key]
    spec = spec_of(model, len(info.classes), info.channels)
    network = build_network(spec)
    loaded, _ = load_weights(network, spec, model, info.classes)
    if not loaded.fresh:
        raise UserError(f"models.{key}.weights has a head for these classes already: a probe would replace it")
    network.set_submodule(loaded.fresh[0].rpartition(".")[0], nn.Identity())
    mean, std = statistics(model, (info.mean, info.std))
    classifier = Classifier(Preprocess(mean, std, model.input_size), network)
    train, validation = (open_part(paths.IMAGES, part) for part in ("train", "validation"))
    device = torch.device("cpu")
    features, held_out = (
        predict_logits(classifier, images, EVALUATION_BATCH, device)
        for images in (train.images[chosen], validation.images)
    )
    fits = (LogisticRegression(C=c, max_iter=2000).fit(features, train.labels[chosen]) for c in REGULARIZATION)
    return max((fit.predict(held_out) for fit in fits), key=lambda found: (found == validation.labels).mean())


def finetuned(key: str, chosen: np.ndarray, seed: int) -> np.ndarray:
    """The validation labels that the network predicts after `stages.finetune` on the chosen images, `[N]`."""
    raw, info = YAML(typ="safe").load(paths.PARAMS), read_info(paths.IMAGES)
    raw["base"]["seed"] = seed
    train, validation = (open_part(paths.IMAGES, part) for part in ("train", "validation"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        YAML().dump(raw, folder / paths.PARAMS)
        (images := folder / paths.IMAGES).mkdir(parents=True)
        for part in ("validation", "test"):
            for kind in ("images", "labels"):
                (images / f"{part}_{kind}.npy").symlink_to((paths.IMAGES / f"{part}_{kind}.npy").resolve())
        np.save(images / "train_images.npy", train.images[chosen])
        np.save(images / "train_labels.npy", train.labels[chosen])
        counts = np.bincount(train.labels[chosen]).tolist()
        few_info = replace(
            info,
            counts=info.counts | {"train": len(chosen)},
            class_counts=info.class_counts | {"train": counts},
            sha256=f"{info.sha256}-{seed}-{len(chosen)}",
        )
        write_json(images / INFO, asdict(few_info))
        for given in Path.cwd().glob("[!.]*"):  # weights that params.yaml names by a relative path
            if given.name not in (str(paths.PARAMS), "data", "models", "reports"):
                (folder / given.name).symlink_to(given)
        command = [sys.executable, "-m", "stages.finetune", key]
        if subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
            raise UserError("the training failed, for the reason above")
        network, description = load_artifact(folder / paths.dense(key))
    classifier = Classifier(description.preprocess(), network)
    return predict_logits(classifier, validation.images, EVALUATION_BATCH, torch.device("cpu")).argmax(1)


def compared(per_class: int, seed: int) -> dict[str, Any]:
    """One row: both accuracies on the validation images and the p-value of the exact paired test (McNemar)."""
    params = load_params(Params)
    key, labels = next(iter(params.models)), open_part(paths.IMAGES, "validation").labels
    chosen = few(open_part(paths.IMAGES, "train"), per_class, seed)
    right = [predicted == labels for predicted in (probe(params, key, chosen), finetuned(key, chosen, seed))]
    gained, lost = (int((one & ~other).sum()) for one, other in (right[::-1], right))
    return {
        "per_class": per_class,
        "seed": seed,
        "validation_images": len(labels),
        "probe_top1": round(float(right[0].mean()), 6),
        "finetuned_top1": round(float(right[1].mean()), 6),
        "p": round(mcnemar_p(gained, lost), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    LOG.parent.mkdir(exist_ok=True)
    for seed in arguments.seeds:
        row = compared(arguments.per_class, seed)
        append(LOG, row)
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    run_stage(main)
