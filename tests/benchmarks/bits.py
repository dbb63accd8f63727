"""How fast bits are packed, and how long the controller searches on ConvNeXt-Small.

Run: python tests/benchmarks/bits.py --out reports/benchmarks/bits.json
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there

import numpy as np
import timm
import torch

from stages.artifacts.packing import pack, unpack
from stages.common.cores import threads_for
from stages.common.files import write_json
from stages.edge.machine import describe_machine
from stages.networks.preprocess import Classifier, Preprocess
from stages.params.quantizers import LearnedBits
from stages.quantization.controller import learn_bits
from stages.quantization.evaluation import Evaluator
from stages.quantization.layers import integer_candidates
from stages.quantization.methods import problem_of
from stages.quantization.rounding import round_nearest

VALUES = 8_000_000
ROUNDS = 7
SETTINGS = LearnedBits(method="learned_bits", average_bits=4.0, evaluations=320, calibration_images=256)


def packing() -> list[dict[str, float]]:
    """Megabytes of unpacked int8 weights a second on one core, the median of some rounds; the round trip is checked."""
    rows = []
    for bits in range(2, 9):
        high = 1 << (bits - 1)
        values = np.random.default_rng(bits).integers(-high, high, VALUES).astype(np.int8)
        packed, there, back = pack(values, bits), [], []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            packed = pack(values, bits)
            middle = time.perf_counter()
            again = unpack(packed, bits, values.shape)
            back.append(time.perf_counter() - middle)
            there.append(middle - started)
        if not np.array_equal(again, values):
            raise SystemExit(f"{bits} bits do not come back")
        speeds = [round(VALUES / 1e6 / statistics.median(seconds)) for seconds in (there, back)]
        rows.append(
            {"bits": bits, "packed_bytes": packed.nbytes, "pack_mb_per_s": speeds[0], "unpack_mb_per_s": speeds[1]}
        )
    return rows


def search() -> dict[str, float]:
    """Seconds of a whole search on ConvNeXt-Small at 32 px, from the float network to the bits of each layer."""
    torch.manual_seed(0)
    network = timm.create_model("convnext_small", num_classes=10).eval()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (SETTINGS.calibration_images, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, len(images))
    started = time.perf_counter()
    layers, _ = integer_candidates(network, 32)
    weights = {layer.name: network.get_submodule(layer.name).weight for layer in layers}
    rounded = {name: {bits: round_nearest(w, bits) for bits in SETTINGS.choices} for name, w in weights.items()}
    rounding = time.perf_counter()
    classifier = Classifier(Preprocess([0.5] * 3, [0.25] * 3, 32), network)
    evaluator = Evaluator(classifier, [layer.name for layer in layers], rounded, images, labels)
    problem = problem_of(layers, rounded, evaluator, SETTINGS, seed=0)
    learn_bits(problem, SETTINGS)
    ended = time.perf_counter()
    return {
        "layers": len(layers),
        "calibration_images": len(images),
        "evaluations": evaluator.evaluations,
        "rounding_seconds": round(rounding - started, 1),
        "search_seconds": round(ended - rounding, 1),
        "seconds": round(ended - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="for the search; 0 = all cores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = packing()
    for row in rows:
        print(f"{row['bits']} bits: pack {row['pack_mb_per_s']} MB/s, unpack {row['unpack_mb_per_s']} MB/s")
    torch.set_num_threads(threads_for(arguments.threads))
    found = search()
    print(
        f"ConvNeXt-Small, 32 px, {found['calibration_images']} images: {found['evaluations']} evaluations in"
        f" {found['seconds']} s, of these {found['rounding_seconds']} s to round {found['layers']} layers to all bits"
    )
    write_json(arguments.out, {"machine": describe_machine(), "packing": rows, "search": found})


if __name__ == "__main__":
    main()
