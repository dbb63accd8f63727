"""What pruning adds to a training step, and what graph, partition and cut take: a script, never collected by pytest.

A step of ConvNeXt-Tiny (timm, 64 px, batch 16, 10 classes; forward, backward, torch's fused AdamW) is timed alone, with
HESSO and with DHSPG around AdamW (group sparsity 0.5), in their pruning periods and in recovery. All share one network
and one optimizer and take turns in random order, so that the machine's moods and the memory's layout hit all alike:
each turn is one step untimed and a few timed ones. `adamw again` is AdamW once more: how far its ratio is from 1 is the
noise. `ratio by parts` leaves out the noise of forward and backward, the same work for all: 1 + what the optimizer's
part takes more / AdamW's whole step. Budget: 1.05 in pruning periods, 1.01 in recovery; nothing fails if it is not met.

    python tests/benchmarks/pruning.py [--device cpu|cuda] [--out FILE]
"""

import argparse
import functools
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; --threads sets more
sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there

import numpy as np
import torch
import torch.nn.functional as F

from stages.networks.build import NetworkSpec, build_network
from stages.networks.layer_scale import fold_layer_scale
from stages.params.finetune import Finetune
from stages.params.pruners import Oto
from stages.pruning.costs import costs_of
from stages.pruning.dhspg import FORGETTING_SHARE, Dhspg
from stages.pruning.groups import cut_channels
from stages.pruning.hesso import Hesso
from stages.pruning.only_train_once_adapter import channel_groups
from stages.training.optimizers import Optimizers

BATCH, SIZE, CLASSES, STEPS = 16, 64, 10, 1000
TURN = 2  # timed steps in a row
BASELINE = "adamw"


class Untouched:
    """No constraint."""

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass


def training_steps(device: torch.device, bfloat16: bool, rounds: int, seed: int) -> dict[str, Any]:
    """Times in seconds of whole steps and of their optimizer's part, `[rounds]` by variant (the least of each turn)."""
    torch.manual_seed(seed)
    network = build_network(NetworkSpec("timm", "convnext_tiny", {}, CLASSES))
    fold_layer_scale(network)
    groups = channel_groups(network, SIZE)
    costs = costs_of(network, groups, SIZE)
    network.train().to(device, memory_format=torch.channels_last)
    optimizers = Optimizers(
        network, Finetune(epochs=1, batch_size=BATCH, optimizer="adamw", learning_rate=1e-4, weight_decay=0.05)
    )
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, CLASSES, (BATCH,), device=device)
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def backward() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y)
        network.zero_grad(set_to_none=True)
        loss.backward()

    def timed(constraint: Any, step: int) -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        backward()
        wait()
        middle = time.perf_counter()
        constraint.before_step(step)
        optimizers.step()
        constraint.after_step(step)
        wait()
        end = time.perf_counter()
        return end - start, end - middle

    backward()
    settings = {"method": "oto", "epochs": 1, "learning_rate_factor": 1.0, "group_sparsity": 0.5}
    hesso, dhspg = (Oto(**settings, optimizer=name) for name in ("hesso", "dhspg"))
    choices: dict[str, float] = {}

    def hesso_after(periods: int) -> Hesso:
        """HESSO with so many periods behind it."""
        constraint = Hesso(network, groups, costs, hesso, STEPS, "pruners.benchmark")
        for period in range(periods):
            first = constraint.schedule.start + period * constraint.schedule.length
            choices["hesso"] = took(lambda first=first: constraint.before_step(first), wait)
            constraint.after_step(first + constraint.schedule.length - 1)
        return constraint

    def dhspg_chosen() -> Dhspg:
        constraint = Dhspg(network, groups, costs, dhspg, STEPS, "pruners.benchmark", lambda step: 1e-4)
        choices["dhspg"] = took(lambda: constraint.before_step(constraint.schedule.start), wait)
        return constraint

    variants: dict[str, tuple[Any, int]] = {BASELINE: (Untouched(), 0), "adamw again": (Untouched(), 0)}
    middle = hesso_after(2)
    first = middle.schedule.start + 2 * middle.schedule.length
    middle.before_step(first)
    variants["hesso, pruning period 3 of 5"] = middle, first + 1
    chosen = dhspg_chosen()
    variants["dhspg, penalty"] = chosen, chosen.schedule.start + 1
    variants["hesso, recovery"] = hesso_after(5), middle.schedule.end
    ended = dhspg_chosen()
    ended.after_step(ended.schedule.end - 1)
    variants["dhspg, recovery"] = ended, ended.schedule.end
    assert (1 - FORGETTING_SHARE) * chosen.schedule.length > TURN + 2

    generator = random.Random(seed)
    whole: dict[str, list[float]] = {name: [] for name in variants}
    optimizer: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name in generator.sample(list(variants), len(variants)):
            constraint, step = variants[name]
            if constraint is chosen:  # others have moved the weights since its last turn
                constraint.load_state_dict(constraint.state_dict())
            timed(constraint, step)
            times = [timed(constraint, step + 1 + turn) for turn in range(TURN)]
            if round_number:  # the first round warms up
                whole[name].append(min(total for total, _ in times))
                optimizer[name].append(min(part for _, part in times))
    return {"whole": whole, "optimizer": optimizer, "choice_ms": {name: 1e3 * t for name, t in choices.items()}}


def took(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def summary(times: dict[str, list[float]], ratios: dict[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """For each variant the median and the least time, and the median over rounds of its ratio to the baseline in the
    same round, with 95 % of 2,000 bootstrap resamples of the rounds."""
    generator, rows = np.random.default_rng(seed), {}
    for name, values in times.items():
        of_round = ratios[name]
        medians = np.median(of_round[generator.integers(0, len(of_round), (2000, len(of_round)))], axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        rows[name] = {
            "median_ms": 1e3 * float(np.median(values)),
            "min_ms": 1e3 * min(values),
            "ratio": float(np.median(of_round)),
            "ratio_ci_low": float(low),
            "ratio_ci_high": float(high),
            "ratio_of_minima": min(values) / min(times[BASELINE]),
        }
    return rows


def summaries(
    whole: dict[str, list[float]], optimizer: dict[str, list[float]], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    steps, parts = np.array(whole[BASELINE]), np.array(optimizer[BASELINE])
    by_parts = {name: 1 + (np.array(values) - parts) / steps for name, values in optimizer.items()}
    rows = {
        "whole_step": summary(whole, {name: np.array(values) / steps for name, values in whole.items()}, seed),
        "optimizer_only": summary(optimizer, {n: np.array(values) / parts for n, values in optimizer.items()}, seed),
    }
    for name, row in summary(whole, by_parts, seed).items():
        least = min(optimizer[name]) - min(optimizer[BASELINE])
        more = {
            "ratio_by_parts" + key.removeprefix("ratio"): row[key] for key in ("ratio", "ratio_ci_low", "ratio_ci_high")
        }
        rows["whole_step"][name] |= more | {"ratio_by_parts_of_minima": 1 + least / min(whole[BASELINE])}
    return rows


def cut_once() -> dict[str, float]:
    """Graph, partition and cut of half of ConvNeXt-Small's channels, in this process."""
    spec = NetworkSpec("timm", "convnext_small", {}, CLASSES)
    network = build_network(spec).eval()
    fold_layer_scale(network)
    before = peak_rss_bytes()
    start = time.perf_counter()
    groups = channel_groups(network, SIZE)
    middle = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    pruned = {g.name: torch.rand(g.channels, generator=generator).argsort() < g.channels // 2 for g in groups}
    cut_channels(network, NetworkSpec(spec.library, spec.architecture, {}, CLASSES, True), groups, pruned)
    end = time.perf_counter()
    return {
        "groups_seconds": middle - start,
        "cut_seconds": end - middle,
        "total_seconds": end - start,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_before_bytes": before,
    }


def peak_rss_bytes() -> int:
    """Of this process alone: `ru_maxrss` starts at the parent's."""
    return 1024 * int(_field("/proc/self/status", "VmHWM").split()[0])


def cpu_name() -> str:
    return _field("/proc/cpuinfo", "model name") or platform.processor()


def _field(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def table(rows: dict[str, dict[str, float]], title: str, ratio: str = "ratio") -> str:
    lines = [f"{title:32} median ms    min ms   {ratio.replace('_', ' ')} [95 % interval], of minima"]
    lines += [
        f"{name:32} {row['median_ms']:9.1f} {row['min_ms']:9.1f}   {row[ratio]:.3f} [{row[f'{ratio}_ci_low']:.3f},"
        f" {row[f'{ratio}_ci_high']:.3f}], {row[f'{ratio}_of_minima']:.3f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cut-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.cut_only:
        print(json.dumps(cut_once()))
        return
    device = torch.device(arguments.device)
    load = os.getloadavg()[0]
    times = training_steps(device, arguments.precision == "bfloat16", arguments.rounds, arguments.seed)
    command = [sys.executable, __file__, "--cut-only", "--threads", str(arguments.threads)]
    cut = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    result = {
        "machine": {
            "cpu": cpu_name(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": arguments.threads,
            "torch": torch.__version__,
            "load_before": load,
            "load_after": os.getloadavg()[0],
        },
        "step": {"batch": BATCH, "input_size": SIZE, "precision": arguments.precision, "group_sparsity": 0.5},
        "n": arguments.rounds,
        **summaries(times["whole"], times["optimizer"], arguments.seed),
        "choice_ms": times["choice_ms"],
        "convnext_small_cut": cut,
    }
    print(" ".join(f"{key} {value}," for key, value in result["machine"].items()), f"n {arguments.rounds}\n")
    print(table(result["whole_step"], "whole step") + "\n")
    print(table(result["whole_step"], "whole step", "ratio_by_parts") + "\n")
    print(table(result["optimizer_only"], "optimizer and constraint") + "\n")
    print("choice of channels: " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in times["choice_ms"].items()))
    print(
        f"ConvNeXt-Small: groups {cut['groups_seconds']:.2f} s, cut {cut['cut_seconds']:.2f} s,"
        f" peak {cut['peak_rss_bytes'] / 1e9:.2f} GB ({cut['peak_rss_before_bytes'] / 1e9:.2f} GB before)"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
