"""Compares our static int8 model.onnx in ONNX Runtime with NNCF's quantization of the same float network in OpenVINO.

Both use the same calibration images. The edge benchmark's protocol times them interleaved, one image at a time, on one
thread. Run it where the pipeline has made the variants (install NNCF first: uv pip install nncf):

    python -m benchmarks.static_int8 convnext-none-int8_static convnext-oto50-int8_static --out FILE
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stages.artifacts.description import read_description
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import write_json
from stages.datasets.store import Part, open_part
from stages.edge.machine import EnergyMeter, RunWatch, describe_machine
from stages.edge.protocol import Classify, Contender, Protocol, measure, random_pixels, timed_rows
from stages.edge.runtimes import ONNXRUNTIME, OPENVINO, TORCH_EAGER
from stages.params.load import load_params
from stages.params.quantizers import Int8Static
from stages.params.whole import Params
from stages.quantization.calibration import calibration_images

PROTOCOL = Protocol(threads=1, warmup_runs=50, windows=30, window_seconds=0.3, seed=0)


def quantize_by_nncf(float_onnx: Path, images: np.ndarray, out: Path) -> None:
    """Quantize `float_onnx` with NNCF's defaults on images uint8 `[N, H, W, 3]`; write OpenVINO's files to `out`."""
    import nncf
    import openvino

    model = openvino.Core().read_model(float_onnx)
    first, *image = model.input(0).get_partial_shape()
    if first.is_dynamic:
        model.reshape([1, *image])
    dataset = nncf.Dataset(images, lambda pixels: pixels[None])
    openvino.save_model(nncf.quantize(model, dataset, subset_size=len(images)), out, compress_to_fp16=False)


def open_openvino(xml: Path) -> Classify:
    """Open OpenVINO's own files with the settings that `OPENVINO` uses for a model.onnx."""
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(xml, "CPU", settings | {"INFERENCE_PRECISION_HINT": "f32"})
    request, output = compiled.create_infer_request(), compiled.output(0)
    return lambda pixels: request.infer([pixels], share_inputs=True)[output]


def classes_of(run: Classify, part: Part) -> np.ndarray:
    """Predicted classes, int64 `[N]`, one image at a time."""
    return np.array([run(np.ascontiguousarray(image[None])).argmax() for image in part.images])


def compare(params: Params, variant: str, scratch: Path) -> dict[str, Any]:
    """Times and validation top-1 of each runtime, and the ratio of its time to ours (above 1: ours is faster).

    Raises:
        UserError: if the variant is not static int8.
    """
    entry = params.variants[variant]
    settings = params.quantizers[entry.quantizer]
    if not isinstance(settings, Int8Static):
        raise UserError(f"{variant}: its quantizer is {settings.method}: give one of int8_static")
    folder, parent = paths.compressed(variant), paths.compressed(f"{entry.pruned}-fp32")
    images, _ = calibration_images(open_part(paths.IMAGES, "train"), settings, f"quantizers.{entry.quantizer}")
    quantize_by_nncf(parent / "model.onnx", images, scratch / f"{variant}.xml")
    runs = {
        "ours int8, ONNX Runtime": ONNXRUNTIME.open(folder, 1, 1),
        "NNCF int8, OpenVINO": open_openvino(scratch / f"{variant}.xml"),
        "float, ONNX Runtime": ONNXRUNTIME.open(parent, 1, 1),
        "float, OpenVINO": OPENVINO.open(parent, 1, 1),
        "dense float, PyTorch eager": TORCH_EAGER.open(paths.compressed(params.baseline_of(variant)), 1, 1),
    }
    pixels = random_pixels(1, read_description(folder).image_shape, PROTOCOL.seed)
    ours = list(runs).index("ours int8, ONNX Runtime")
    contenders = [Contender(variant, name, run, pixels, ours) for name, run in runs.items()]
    watch = RunWatch()
    rows = timed_rows(contenders, measure(contenders, PROTOCOL, EnergyMeter()), PROTOCOL)
    marks, state = watch.finish()
    validation = open_part(paths.IMAGES, "validation")
    predicted = {name: classes_of(run, validation) for name, run in runs.items()}
    float_classes = predicted["float, ONNX Runtime"]
    for row in rows:  # the protocol's ratio is the baseline's time over the contender's
        row["time_over_ours"] = 1 / row.pop("latency_ratio")
        row["time_over_ours_high"] = 1 / row.pop("latency_ratio_low")
        row["time_over_ours_low"] = 1 / row.pop("latency_ratio_high")
        row["validation_top1"] = float((predicted[row["runtime"]] == validation.labels).mean())
        row["agreement_with_float"] = float((predicted[row["runtime"]] == float_classes).mean())
    return {"variant": variant, "n_validation": len(validation), **marks, **state, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="variant")
    parser.add_argument("--out", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    params = load_params(Params)
    if unknown := sorted(set(arguments.variants) - params.variants.keys()):
        raise UserError(f"{unknown[0]!r}: give entries of variants: {', '.join(params.variants)}")
    with tempfile.TemporaryDirectory() as scratch:
        found = [compare(params, variant, Path(scratch)) for variant in arguments.variants]
    for one in found:
        print(f"{one['variant']}{', busy' * one['busy']}, n = {one['n_validation']:,} validation images")
        for row in one["rows"]:
            print(
                f"  {row['runtime']}: {row['latency_ms_p50']:.3f} ms, {row['time_over_ours']:.2f}"
                f" [{row['time_over_ours_low']:.2f}, {row['time_over_ours_high']:.2f}] of ours; top-1"
                f" {100 * row['validation_top1']:.2f} %, as the float network on"
                f" {100 * row['agreement_with_float']:.2f} %"
            )
    if arguments.out:
        packages = ("onnxruntime", "openvino", "nncf", "torch", "numpy")
        write_json(arguments.out, {"machine": describe_machine(packages), "results": found})


if __name__ == "__main__":
    run_stage(main)
