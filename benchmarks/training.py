"""Images per second of a training epoch, beside a plain PyTorch loop, and what its parts cost.

The network and the recipe are those of a profile (or `--architecture` at 64 pixels). Two processes take turns in random
order, one segment of steps at a time:

- `plain`: float32, torchvision's transforms in a DataLoader of two workers that decode JPEG, AdamW, the default
  allocator, the loss read at every step.
- `loop`: steps of the `Trainer` at full size. `small`: those at the size of `progressive_resize`, if the recipe has it;
  `recipe` is the mean over both in the recipe's proportion.
- `bare`: forward, backward and step on one fixed batch. `silent`: the loop without EMA and progress line; `averaged and
  logged` has both; `hesso` prunes on top of `silent`. The ratio of `silent again` to `silent` shows the noise.

Run, from a profile's folder with its images: python -m benchmarks.training --out FILE
"""

import argparse
import copy
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_json
from stages.common.progress import epoch_progress
from stages.datasets.store import open_part, read_info
from stages.edge.machine import describe_machine
from stages.edge.protocol import bootstrap_median
from stages.networks.build import build_network, spec_of
from stages.networks.preprocess import Preprocess
from stages.networks.reparameterize import fold_layer_scale
from stages.params.finetune import Finetune
from stages.params.load import load_params
from stages.params.models import Model
from stages.params.pruners import Oto
from stages.params.whole import Params
from stages.pruning.costs import costs_of
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import channel_groups
from stages.training.batches import steps_per_epoch
from stages.training.host import prepare_host, use_bfloat16
from stages.training.trainer import Trainer, TrainingData

PLAIN = ("plain",)
OURS = ("loop", "bare", "silent", "silent again", "averaged and logged", "hesso")
SMALL = "small"  # one of ours, if the recipe has progressive_resize
WARM_STEPS = 8  # before each timed segment of `plain`: they use up the batches that its workers prepared while waiting
JPEG_IMAGES, JPEG_QUALITY = 10_000, 75
RATIOS = {  # of times in the same round: numerator, denominator
    "plain over loop": ("plain", "loop"),
    "plain over recipe": ("plain", "recipe"),
    "bare over loop": ("bare", "loop"),
    "hesso over silent": ("hesso", "silent"),
    "averaged and logged over silent": ("averaged and logged", "silent"),
    "silent again over silent": ("silent again", "silent"),
}


class Jpegs(Dataset):
    """Training images as encoded JPEG files."""

    def __init__(self, size: int) -> None:
        part, info = open_part(paths.IMAGES, "train"), read_info(paths.IMAGES)
        self.labels, self.files = part.labels[:JPEG_IMAGES].tolist(), []
        for image in part.images[:JPEG_IMAGES]:
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, "JPEG", quality=JPEG_QUALITY)
            self.files.append(file.getvalue())
        stages = [
            transforms.RandomCrop(info.image_size, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.Resize(size),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
        ]
        self.transform = transforms.Compose(stages)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(io.BytesIO(self.files[index]))), self.labels[index]


def plain(network: torch.nn.Module, size: int, recipe: Finetune, device: torch.device, steps: int) -> dict:
    """The segment to time, by name."""
    network.train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    loader = DataLoader(Jpegs(size), recipe.batch_size, shuffle=True, num_workers=2, drop_last=True)

    def forever() -> Iterator:
        while True:
            yield from loader

    batches = forever()

    def step() -> None:
        x, y = (tensor.to(device) for tensor in next(batches))
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y, label_smoothing=recipe.label_smoothing)
        loss.backward()
        optimizer.step()
        loss.item()

    def segment() -> float:
        for _ in range(WARM_STEPS):
            step()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - started

    return {"plain": segment}


def ours(network: torch.nn.Module, size: int, recipe: Finetune, device: torch.device, steps: int) -> dict:
    """The segments to time, by name."""
    info, part = read_info(paths.IMAGES), open_part(paths.IMAGES, "train")
    data = TrainingData(part, open_part(paths.IMAGES, "validation"), Preprocess(info.mean, info.std, size))
    if steps >= (most := steps_per_epoch(recipe, len(part))):
        raise UserError(f"--steps {steps}: an epoch has {most} of {recipe.batch_size} images: lower it or --batch")

    def trainer(recipe: Finetune) -> Trainer:
        return Trainer(copy.deepcopy(network), data, recipe, device)

    def segment(trainer: Trainer, logged: bool, first: int = 0, fixed_batch: bool = False) -> Callable[[], float]:
        at = first

        def timed() -> float:
            nonlocal at
            batches = trainer.batches_of(0)
            x, targets = next(batches)
            trainer.step(at, x, targets)
            _wait(device)
            with open(os.devnull, "w") as silence, epoch_progress("benchmark", 1, trainer.steps_per_epoch) as progress:
                started = time.perf_counter()
                for _ in range(steps):
                    if not fixed_batch:
                        x, targets = next(batches)
                    at += 1
                    trainer.step(at, x, targets)
                    if logged:
                        progress.step()
                if logged:
                    print(f"{at} of {trainer.steps}", file=silence, flush=True)
                _wait(device)
                return time.perf_counter() - started

        return timed

    full = recipe.model_copy(update={"progressive_resize": None})
    silent, averaged = (full.model_copy(update={"ema_decay": decay}) for decay in (0.0, 0.999))
    pruned = copy.deepcopy(network)
    fold_layer_scale(pruned)
    groups = channel_groups(pruned, size)
    pruner = Oto(method="oto", epochs=full.epochs, learning_rate_factor=1.0, group_sparsity=0.5)
    total = full.epochs * steps_per_epoch(full, len(part))
    hesso = Hesso(pruned, groups, costs_of(pruned, groups, size), pruner, total, "pruners.benchmark")
    quiet, pruning = trainer(silent), Trainer(pruned, data, silent, device, constraint=hesso)
    pruning.step(hesso.schedule.start, *next(pruning.batches_of(0)))  # the first period's channels are chosen here
    small = {SMALL: segment(trainer(recipe), True)} if recipe.progressive_resize else {}
    return small | {
        "loop": segment(trainer(full), True),
        "bare": segment(trainer(silent), False, fixed_batch=True),
        "silent": segment(quiet, False),
        "silent again": segment(quiet, False),
        "averaged and logged": segment(trainer(averaged), True),
        "hesso": segment(pruning, False, hesso.schedule.start + 1),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def serve(names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Time a segment for every name that is read from stdin."""
    params = load_params(Params)
    model = next(iter(params.models.values()))
    if arguments.architecture:
        model = Model(library="timm", architecture=arguments.architecture, input_size=64)
    recipe = params.finetune.model_copy(update={"batch_size": arguments.batch})
    if arguments.architecture:
        recipe = recipe.model_copy(update={"progressive_resize": None})
    base = params.base.model_copy(update={"threads": arguments.threads, "device": arguments.device})
    torch.manual_seed(0)
    network = build_network(spec_of(model, len(read_info(paths.IMAGES).classes)))
    if names == PLAIN:
        if base.threads:
            torch.set_num_threads(base.threads)
        device = torch.device(base.device)
    else:
        device = prepare_host(base)
    make = plain if names == PLAIN else ours
    segments = make(network, model.input_size, recipe, device, arguments.steps)
    for segment in segments.values():
        segment()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    precision = "bfloat16" if names != PLAIN and use_bfloat16(recipe.precision, device) else "float32"
    host = {"device": name, "threads": torch.get_num_threads(), "precision": precision}
    if SMALL in segments:
        host |= recipe.model_dump(include={"progressive_resize"})
    print(json.dumps(host), flush=True)
    for line in sys.stdin:
        print(segments[line.strip()](), flush=True)


def ratio_row(of_rounds: np.ndarray, seed: int) -> dict[str, float]:
    low, high = bootstrap_median(of_rounds, 0.95, 2000, seed)
    return {"ratio": float(np.median(of_rounds)), "ratio_ci_low": low, "ratio_ci_high": high}


def start(names: tuple[str, ...], arguments: list[str]) -> tuple[subprocess.Popen, dict[str, Any]]:
    """A process that times segments, and its device, threads and precision."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        *arguments,
        "--serve",
        "plain" if names == PLAIN else "ours",
    ]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return worker, json.loads(answer(worker))


def answer(worker: subprocess.Popen) -> str:
    """The next line that the process prints."""
    if worker.stdout is None or not (line := worker.stdout.readline()):
        raise SystemExit("a process that times segments ended early")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--architecture", help="a timm architecture at 64 pixels instead of the profile's first model")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12, help="steps in a segment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=["plain", "ours"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.steps) < 1 or arguments.threads < 0:
        parser.error("--rounds and --steps must be at least 1, --threads at least 0")
    if not 0 < arguments.batch <= JPEG_IMAGES:
        parser.error(f"--batch {arguments.batch}: must be from 1 to {JPEG_IMAGES}, the images that `plain` reads")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no usable CUDA device")
    if arguments.batch > (images := read_info(paths.IMAGES).counts["train"]):
        parser.error(f"--batch {arguments.batch}: the training part of {paths.IMAGES} has only {images} images")
    if arguments.serve:
        serve(PLAIN if arguments.serve == "plain" else OURS, arguments)
        return
    machine = describe_machine()
    (theirs, _), (own, host) = (start(names, sys.argv[1:]) for names in (PLAIN, OURS))
    small = (host.get("progressive_resize") or {}).get("fraction")
    workers = dict.fromkeys(PLAIN, theirs) | dict.fromkeys(OURS if small is None else (*OURS, SMALL), own)
    generator = random.Random(arguments.seed)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(arguments.rounds):
        for name in generator.sample(list(workers), len(workers)):
            print(name, file=workers[name].stdin, flush=True)
            times[name].append(float(answer(workers[name])))
    for worker in (theirs, own):
        worker.communicate()  # closes its input, which ends it
    images = arguments.steps * arguments.batch
    seconds = {name: np.array(of_rounds) for name, of_rounds in times.items()}
    if small is not None:
        seconds["recipe"] = small * seconds[SMALL] + (1 - small) * seconds["loop"]
    speeds = {name: images / float(np.median(of_rounds)) for name, of_rounds in seconds.items()}
    ratios = {name: seconds[top] / seconds[below] for name, (top, below) in RATIOS.items() if below in seconds}
    rows = {name: ratio_row(of_rounds, arguments.seed) for name, of_rounds in ratios.items()}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "serve")}
    result = {"machine": machine, **host, "settings": settings}
    result |= {"images_per_second": speeds, "ratios": rows}
    for name, speed in speeds.items():
        print(f"{name:22} {speed:8,.0f} images/s")
    for name, row in rows.items():
        print(f"{name:32} {row['ratio']:.3f} [{row['ratio_ci_low']:.3f}, {row['ratio_ci_high']:.3f}]")
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    run_stage(main)
