"""Profile: the figures of one variant that do not depend on the machine: counts, sizes, accuracy, predictions.

In:  `params.yaml`, `models/compressed/<variant>/`, the test part of `data/images/` (no other stage reads it).
Out: `reports/profile/<variant>/`: `profile.json` (one flat row), `layers.csv`, `predictions.npz` (`Predictions`),
     `corruptions.npz` (`Corrupted`) and a copy of `model.json`. The same inputs give the same bytes.
Run: python -m stages.profile <variant>
"""

import shutil
from dataclasses import asdict

import numpy as np
import torch

from stages.artifacts.description import DESCRIPTION
from stages.common import paths
from stages.common.cores import threads_for
from stages.common.errors import run_stage
from stages.common.files import atomic_folder, write_csv, write_json
from stages.params.base import Base
from stages.params.load import key_argument, load_params
from stages.params.profile import Profile
from stages.params.variants import Joins
from stages.profiling.measure import measure


class Params(Joins):
    base: Base
    profile: Profile = Profile()


def main() -> None:
    params = load_params(Params)
    variant = key_argument("variants", params.variants)
    threads = threads_for(params.base.threads)
    torch.set_num_threads(threads)
    folder = paths.compressed(variant)
    measured = measure(folder, paths.IMAGES, params.profile, threads)
    row = {
        "variant": variant,
        "model": params.model_of(variant),
        "pruner": params.pruner_of(variant),
        "quantizer": params.variants[variant].quantizer,
        **measured.row,
    }
    with atomic_folder(paths.profile(variant)) as unfinished:
        write_json(unfinished / "profile.json", row)
        write_csv(unfinished / "layers.csv", [asdict(layer) for layer in measured.layers])
        np.savez_compressed(unfinished / "predictions.npz", **asdict(measured.predictions))  # numpy dates entries 1980
        np.savez_compressed(unfinished / "corruptions.npz", **asdict(measured.corrupted))
        shutil.copyfile(folder / DESCRIPTION, unfinished / DESCRIPTION)
    print(
        f"{variant}: top-1 {100 * row['top1']:.2f} % (n = {row['n_test']}), balanced accuracy"
        f" {100 * row['balanced_accuracy']:.2f} %, {row['params']:,} parameters,"
        f" {row['macs']:,} MACs, model.onnx {row['size_bytes'] / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    run_stage(main)
