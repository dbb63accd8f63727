"""What LayerNorms that count their original width cost in model.onnx: a ConvNeXt at half of its widths, all of whose
norms count, against the same network with plain norms, in float and in static int8. Random weights: times do not
depend on them. Interleaved by the edge benchmark's protocol, one image at a time, one thread, in ONNX Runtime.

Run: python tests/benchmarks/layer_norm.py --out FILE
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there

import numpy as np
import torch
from interleaved import timed_over
from torch import nn

from stages.common.errors import run_stage
from stages.common.files import write_json
from stages.edge.machine import describe_machine
from stages.edge.protocol import Contender, Protocol, random_pixels
from stages.edge.runtimes import ONNXRUNTIME
from stages.export.onnx_file import export_onnx
from stages.networks.build import NetworkSpec, build_network
from stages.networks.layer_norm import FORMS, FixedDivisorLayerNorm, counting, is_channels_first
from stages.networks.pointwise import replace_module
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.quantizers import Int8Static
from stages.quantization.static import int8_static

PROTOCOL = Protocol(threads=1, warmup_runs=50, windows=30, window_seconds=0.2, seed=0)
IMAGE = 32
NETWORKS = {
    "profiles/cifar10": (64, {"depths": [2, 3, 3, 2], "dims": [24, 48, 96, 128], "kernel_sizes": 3}),
    "ConvNeXt-Tiny": (32, {"depths": [3, 3, 9, 3], "dims": [48, 96, 192, 384]}),
}
"""The side in pixels that the network sees, and its arguments at half of the widths."""


def network_with(arguments: dict, form: str) -> nn.Module:
    """A network whose norms all have lost half of their channels, and count in one of `layer_norm.FORMS`."""
    torch.manual_seed(0)
    fixed = {"conv_mlp": False, "ls_init_value": None}
    network = build_network(NetworkSpec("timm", "convnext_atto", arguments | fixed, 10)).eval()
    for name, norm in list(network.named_modules()):
        if isinstance(norm, nn.LayerNorm) and form != "plain":
            replace_module(network, name, _counting(norm, form))
    return network


def _counting(norm: nn.LayerNorm, form: str) -> FixedDivisorLayerNorm:
    width = norm.normalized_shape[0]
    whole = nn.LayerNorm(2 * width, norm.eps)
    new = counting(whole, width, form == "exact_matmul")
    new.channels_first = is_channels_first(norm)
    return new


def compare(name: str, folder: Path) -> dict[str, object]:
    """Times of every form in float and in int8, each over that of the plain norms."""
    input_size, arguments = NETWORKS[name]
    images = np.random.default_rng(0).integers(0, 256, (64, IMAGE, IMAGE, 3), np.uint8)
    contenders = []
    for quantizer, form in itertools.product(("fp32", "int8_static"), ("plain", *(f for f in FORMS if f != "plain"))):
        classifier = Classifier(Preprocess([0.5] * 3, [0.25] * 3, input_size), network_with(arguments, form)).eval()
        if quantizer == "int8_static":
            classifier, *_ = int8_static(classifier, Int8Static(method=quantizer), images)
        (made := folder / f"{quantizer}-{form}").mkdir()
        export_onnx(classifier, IMAGE, made / "model.onnx")
        plain = len(contenders) if form == "plain" else contenders[-1].baseline
        run, pixels = ONNXRUNTIME.open(made, 1, 1), random_pixels(1, IMAGE, PROTOCOL.seed)
        contenders.append(Contender(f"{quantizer}, {form}", "onnxruntime", run, pixels, plain))
    rows, marks = timed_over(contenders, PROTOCOL, "time_over_plain")
    return {"network": name, "input_size": input_size, "arguments": arguments, **marks, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    found = []
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(compare(name, Path(folder)))
        print(f"{name} at half of its widths{', busy' * found[-1]['busy']}")
        for row in found[-1]["rows"]:
            print(
                f"  {row['variant']}: {row['latency_ms_p50']:.3f} ms, {row['time_over_plain']:.3f}"
                f" [{row['time_over_plain_low']:.3f}, {row['time_over_plain_high']:.3f}] of plain"
            )
    if arguments.out:
        write_json(arguments.out, {"machine": describe_machine(), "results": found})


if __name__ == "__main__":
    run_stage(main)
