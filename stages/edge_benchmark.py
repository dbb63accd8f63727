"""Edge benchmark: latency, throughput, energy, memory and start-up of all variants, in one interleaved run. Optionally
also a soak of one variant, and its accuracy on test images that are printed and filmed in simulation.

In:  `params.yaml`, `models/compressed/<variant>/` of every variant; the validation part of `data/images/` for a soak;
     its test part for the printed samples (like the profile stage, it measures a finished model).
Out: `reports/edge/`: `edge.json` (run id, machine, protocol, one flat row for each variant and runtime, and for the
     dense float baseline of each model in PyTorch eager), `windows.csv`, `soak.csv`, `printed.json`. The timings depend
     on the machine and differ between runs.
Run: python -m stages.edge_benchmark
"""

import tempfile
import uuid
from pathlib import Path

from stages.artifacts.description import check_onnx, read_description
from stages.common import paths
from stages.common.cores import usable_cores
from stages.common.errors import UserError, run_stage
from stages.common.files import atomic_folder, read_json, write_csv, write_json
from stages.datasets.store import open_part
from stages.edge.bundle import CAMERA, Params, pinned
from stages.edge.local import Candidate, Soaked, Timing, refuse_many_threads, time_here
from stages.edge.machine import keep_to_cores
from stages.edge.printed import printed_row, sample
from stages.edge.protocol import Protocol
from stages.edge.remote import time_there
from stages.edge.soak import SoakPlan
from stages.edge.stability import drift_of, repeat_of
from stages.params.edge_benchmark import EdgeBenchmark
from stages.params.load import load_params

SOAK_IMAGES = 64  # spread over the validation part; the soak repeats them
PROTOCOL = {"threads", "warmup_runs", "windows", "window_seconds", "seed", "batch", "minimum_runs", "confidence"}


def protocol_of(section: EdgeBenchmark) -> Protocol:
    return Protocol(**section.model_dump(include=PROTOCOL))


def candidates_of(params: Params) -> list[Candidate]:
    """All variants of the params.

    Raises:
        UserError: if the artifact of a variant is missing or broken, or its `model.json` describes another model.
    """
    candidates = []
    for variant in params.variants:
        folder = paths.compressed(variant)
        description = read_description(folder)
        check_onnx(folder, description)
        sha256 = description.onnx["sha256"]
        candidates.append(Candidate(variant, folder, params.baseline_of(variant), description.image_shape, sha256))
    return candidates


def soak_of(params: Params, candidates: list[Candidate]) -> Soaked | None:
    """The variant to soak, its images and the plan; None if the params ask for no soak."""
    if (soak := params.edge_benchmark.soak) is None:
        return None
    plan = SoakPlan(60 * soak.minutes, soak.images_per_second, soak.window_seconds)
    chosen = next(candidate for candidate in candidates if candidate.variant == soak.variant)
    return chosen, open_part(paths.IMAGES, "validation").spread(SOAK_IMAGES), plan


def run_timing(params: Params) -> Timing:
    """Time on this machine, or on the device that `edge_benchmark.target` names."""
    section, candidates = params.edge_benchmark, candidates_of(params)
    soaked, protocol = soak_of(params, candidates), protocol_of(section)
    if section.target != "local":
        return time_there(candidates, section, protocol, soaked, log)
    if section.affinity is not None:
        try:
            keep_to_cores(section.affinity)
        except ValueError as error:
            raise UserError(str(error)) from None
    refuse_many_threads(section.threads, usable_cores())
    return time_here(candidates, section.runtimes, protocol, soaked, log)


def previous_run() -> object:
    """The `edge.json` of the previous run; None if it is missing or unreadable."""
    try:
        return read_json(paths.EDGE / "edge.json")
    except UserError:
        return None


def log(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    params = load_params(Params)
    section, printed = params.edge_benchmark, params.edge_benchmark.printed
    if printed is not None:
        pinned(CAMERA)
        try:
            chosen = sample(len(open_part(paths.IMAGES, "test")), printed.images, printed.seed)
        except ValueError as error:
            raise UserError(f"edge_benchmark.printed.{error}") from None
        with tempfile.TemporaryDirectory() as folder:  # before the timing and the soak, which may take hours
            filmed = printed_row(printed.variant, chosen, printed.seed, section.confidence, Path(folder))
    before = previous_run()
    timing = run_timing(params)
    result = {"run_id": uuid.uuid4().hex[:12], "target": section.target} | timing.result
    result["repeat"] = repeat_of(result, before)
    with atomic_folder(paths.EDGE) as unfinished:
        if section.soak is not None:
            result["soak"] = section.soak.model_dump() | drift_of(timing.soak, section.confidence)
            write_csv(unfinished / "soak.csv", timing.soak)
        if printed is not None:
            write_json(unfinished / "printed.json", filmed)
        write_json(unfinished / "edge.json", result)
        write_csv(unfinished / "windows.csv", timing.windows)
    print_result(result)


def print_result(result: dict) -> None:
    for row in result["rows"]:
        print(
            f"{row['variant']} ({row['runtime']}): {row['latency_ms_p50']:.3f} ms, {row['latency_ratio']:.2f}"
            f" ({row['latency_ratio_low']:.2f} to {row['latency_ratio_high']:.2f}) times as fast as {row['baseline']}"
            f" in {row['baseline_runtime']}{', unsteady' * row['unsteady']}"
        )
    for entry in result["left_out"]:
        print(f"left out: {entry['reason']}")
    if "soak" in result:
        soak = result["soak"]
        reasons = "".join(f"; {reason}" for reason in soak["reasons"])
        print(f"soak of {soak['variant']}: {soak['verdict']} over {soak['soak_seconds'] / 60:.1f} minutes{reasons}")
    if repeat := result["repeat"]:
        apart = f"more than 5 % apart: {', '.join(repeat['apart'])}" if repeat["apart"] else "none more than 5 % apart"
        print(
            f"speed-ups against run {repeat['run_id']}: {repeat['compared']} compared, at most"
            f" {100 * repeat['largest']:.1f} % apart; {apart}"
        )
    if result["busy"]:
        print("busy: other programs used the processor, so the run is marked")
    if result["throttled"]:
        print("throttled: the processor slowed down, so the run is marked")


if __name__ == "__main__":
    run_stage(main)
