"""What even widths are worth in model.onnx: a profile's networks without as many channels, chosen at random in units of
1, 4, 8 and 16 (`divisible_by`), as hold a share of their MACs; with LayerNorms that count their original width and with
plain ones; against the whole network. Random weights: times do not depend on them. Interleaved by the edge benchmark's
protocol, one image at a time, one thread, in ONNX Runtime.

Run: python tests/benchmarks/even_widths.py profiles/cifar10:convnext profiles/cifar10-pruning:small-s0 --out FILE
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there

import torch
from interleaved import timed_over
from torch import nn

from stages.common.errors import UserError, run_stage
from stages.common.files import write_json
from stages.edge.machine import describe_machine
from stages.edge.protocol import Contender, Protocol, random_pixels
from stages.edge.runtimes import ONNXRUNTIME
from stages.export.onnx_file import export_onnx
from stages.networks.build import build_network, spec_of
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.load import load_params
from stages.params.models import Model
from stages.params.pruners import RandomStructured
from stages.params.whole import Params
from stages.pruning.costs import costs_of
from stages.pruning.groups import by_group, cut_channels, with_layer_norm
from stages.pruning.only_train_once_adapter import exact_groups
from stages.pruning.targets import choose_channels

PROTOCOL = Protocol(threads=1, warmup_runs=50, windows=20, window_seconds=0.2, seed=0)
CLASSES = 10
UNITS = (1, 4, 8, 16)
FORMS = ("exact", "plain")
DENSE = 0  # the first contender


def chosen_model(given: str) -> tuple[str, Params, str]:
    """The profile's folder, its params and the model's name in `folder:model`.

    Raises:
        UserError: if there is none of that name.
    """
    profile, _, name = given.rpartition(":")
    params = load_params(Params, Path(profile) / "params.yaml")
    if name not in params.models:
        raise UserError(f"{given}: give a profile's folder and one of its models: {', '.join(params.models)}")
    return profile, params, name


def cut_networks(model: Model, reduction: float, unit: int, seed: int) -> tuple[dict[str, nn.Module], float]:
    """The narrower network, by the form of its LayerNorms, and its share of the whole one's MACs."""
    torch.manual_seed(seed)
    spec = replace(spec_of(model, CLASSES), layer_scale_folded=True)
    network = build_network(spec).eval()
    groups, _ = exact_groups(network, spec, model.input_size, allow_partial=False)
    costs = costs_of(network, groups, model.input_size)
    target = {"macs_reduction": reduction, "divisible_by": unit}
    pruner = RandomStructured(method="random_structured", epochs=1, learning_rate_factor=1, **target)
    scores = torch.rand(sum(group.channels for group in groups))
    pruned = by_group(groups, choose_channels(scores, groups, costs, pruner, key=f"units of {unit}: prune"))
    widths = torch.tensor([group.channels - int(pruned[group.name].sum()) for group in groups])
    subnet, spec = cut_channels(network, spec, groups, pruned)
    forms = {form: with_layer_norm(subnet, spec, form)[0] for form in FORMS}
    return forms, float(costs.macs(widths)) / costs.macs_dense


def compare(params: Params, name: str, reduction: float, seeds: int, folder: Path) -> dict[str, object]:
    """Times of every network cut, each over that of the whole one, which is the first row."""
    model, image = params.models[name], params.data.image_size
    preprocess = Preprocess([0.5] * 3, [0.25] * 3, model.input_size)
    pixels = random_pixels(1, image, PROTOCOL.seed)
    contenders: list[Contender] = []

    def enter(label: str, network: nn.Module) -> None:
        (made := folder / str(len(contenders))).mkdir()
        export_onnx(Classifier(preprocess, network).eval(), image, made / "model.onnx")
        contenders.append(Contender(label, "onnxruntime", ONNXRUNTIME.open(made, 1, 1), pixels, DENSE))

    torch.manual_seed(0)
    enter("dense", build_network(spec_of(model, CLASSES)).eval())
    told: list[dict[str, object]] = [{"divisible_by": None, "layer_norm": None, "seed": None, "macs_share": 1.0}]
    for unit in UNITS:
        for seed in range(seeds):
            networks, share = cut_networks(model, reduction, unit, seed)
            for form, network in networks.items():
                enter(f"divisible_by {unit}, {form}, seed {seed}", network)
                told.append({"divisible_by": unit, "layer_norm": form, "seed": seed, "macs_share": share})
    rows, marks = timed_over(contenders, PROTOCOL, "time_over_dense")
    rows = [row | words for row, words in zip(rows, told, strict=True)]
    return {"model": name, "input_size": model.input_size, "macs_reduction": reduction, **marks, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="profile:model", help="a profile's folder, and one of its models")
    parser.add_argument("--macs-reduction", type=float, default=0.43, metavar="SHARE", help="that goes at least (0.43)")
    parser.add_argument("--seeds", type=int, default=3, help="choices of channels for each unit")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or not 0 < arguments.macs_reduction < 1:
        parser.error("--seeds must be at least 1, --macs-reduction between 0 and 1")
    if arguments.out and arguments.out.is_dir():
        parser.error(f"--out {arguments.out}: is a folder: name a file")
    chosen = {given: chosen_model(given) for given in arguments.models}
    found = []
    for given, (profile, params, name) in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = arguments.macs_reduction, arguments.seeds
            found.append({"profile": profile} | compare(params, name, *settings, Path(folder)))
        print(f"{given}{', busy' * found[-1]['busy']}")
        for row in found[-1]["rows"]:
            print(
                f"  {row['variant']}: {100 * row['macs_share']:.1f} % of the MACs, {row['latency_ms_p50']:.3f} ms,"
                f" {row['time_over_dense']:.3f} [{row['time_over_dense_low']:.3f}, {row['time_over_dense_high']:.3f}]"
                " of dense"
            )
    if arguments.out:
        write_json(arguments.out, {"machine": describe_machine(), "results": found})


if __name__ == "__main__":
    run_stage(main)
