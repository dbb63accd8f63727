"""Edge benchmark: latency, throughput, memory and start-up of all listed variants, in one interleaved run.

In:  `params.yaml`, `models/compressed/<variant>/` of every listed variant.
Out: `reports/edge/`: `edge.json` (run id, machine, protocol, one flat row for each variant in ONNX Runtime and for each
     model's dense float baseline in PyTorch eager) and `windows.csv`. Nothing here is the same in a second run.
Run: python -m stages.edge_benchmark
"""

import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.artifacts.artifact import check_onnx, read_description
from stages.common import paths
from stages.common.errors import UserError, run_stage
from stages.common.files import atomic_folder, write_csv, write_json
from stages.common.params import Params, load_params
from stages.edge.fresh import measure_fresh
from stages.edge.machine import BUSY_CORES, CpuWatch, describe_machine, is_busy, machine_state, others_cores_now
from stages.edge.protocol import Protocol, Window, measure, protocol_of, random_pixels, summarise
from stages.edge.runtimes import ONNXRUNTIME, TORCH_EAGER, Runtime
from stages.export.session import usable_cores


@dataclass(frozen=True)
class Contender:
    variant: str
    runtime: Runtime
    baseline: str
    """The variant whose time in PyTorch eager this one's is compared with."""
    folder: Path
    image_size: int
    onnx_sha256: str


def refuse_many_threads(threads: int, cores: int) -> None:
    """Raise a `UserError` where threads would take turns on a core: their times would be the scheduler's."""
    if threads > cores:
        raise UserError(
            f"edge_benchmark.threads = {threads}: this process may use {cores} core{'s' * (cores != 1)}: lower it"
        )


def contenders_of(params: Params) -> list[Contender]:
    """Every listed variant in ONNX Runtime, then each model's baseline in PyTorch eager.

    Raises:
        UserError: if a variant's artifact is missing, broken or not the one that its `model.json` describes.
    """
    wanted = [(variant, ONNXRUNTIME) for variant in params.variants]
    wanted += [(f"{model}-none-fp32", TORCH_EAGER) for model in params.models]
    contenders = []
    for variant, runtime in wanted:
        folder = paths.compressed(variant)
        description = read_description(folder)
        check_onnx(folder, description)
        sha256 = description.onnx["sha256"]
        contenders.append(
            Contender(variant, runtime, params.baseline_of(variant), folder, description.image_size, sha256)
        )
    return contenders


def benchmark(contenders: list[Contender], protocol: Protocol) -> tuple[list[dict[str, object]], list[Window]]:
    """One row for each contender, and all windows."""
    fresh = [measure_fresh(c.runtime, c.folder, protocol.threads) for c in contenders]
    opened = [
        (c.runtime.open(c.folder, protocol.threads), random_pixels(c.image_size, protocol.seed)) for c in contenders
    ]
    windows = measure(opened, protocol)
    eager = {c.variant: index for index, c in enumerate(contenders) if c.runtime is TORCH_EAGER}
    rows: list[dict[str, object]] = []
    for index, contender in enumerate(contenders):
        latency = summarise(windows, index, eager[contender.baseline], protocol)
        row = {"variant": contender.variant, "runtime": contender.runtime.name, "baseline": contender.baseline}
        rows.append(row | asdict(latency) | asdict(fresh[index]) | {"onnx_sha256": contender.onnx_sha256})
    return rows, windows


def window_rows(contenders: list[Contender], windows: list[Window]) -> list[dict[str, object]]:
    return [
        {
            "variant": contenders[window.contender].variant,
            "runtime": contenders[window.contender].runtime.name,
            "round": window.round,
            "order": window.order,
            "runs": len(window.times_ns),
            "p50_ms": window.p50_ms,
            "p95_ms": float(np.percentile(window.times_ns, 95)) / 1e6,
            "min_ms": float(window.times_ns.min()) / 1e6,
        }
        for window in windows
    ]


def main() -> None:
    params = load_params()
    refuse_many_threads(params.edge_benchmark.threads, usable_cores())
    contenders, protocol = contenders_of(params), protocol_of(params.edge_benchmark)
    seconds = len(contenders) * protocol.windows * protocol.window_seconds
    print(f"timing {len(contenders)} contenders, {protocol.windows} rounds, at least {seconds:.0f} s", flush=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    before, others_before = machine_state(), others_cores_now()
    watch = CpuWatch.start()
    rows, windows = benchmark(contenders, protocol)
    others_during, after = watch.others_cores(), machine_state()
    busy = is_busy(others_before, others_during)
    machine = describe_machine()
    machine |= {f"{key}_before": value for key, value in before.items()} | {
        f"{key}_after": value for key, value in after.items()
    }
    machine |= {
        "others_cores_before": round(others_before, 3),
        "others_cores_during": round(others_during, 3),
        "busy_above_cores": BUSY_CORES,
    }
    result = {
        "run_id": uuid.uuid4().hex[:12],
        "started": started,
        "busy": busy,
        "machine": machine,
        "protocol": asdict(protocol),
        "rows": rows,
    }
    with atomic_folder(paths.EDGE) as unfinished:
        write_json(unfinished / "edge.json", result)
        write_csv(unfinished / "windows.csv", window_rows(contenders, windows))
    for row in rows:
        print(
            f"{row['variant']} ({row['runtime']}): {row['latency_ms_p50']:.3f} ms, {row['latency_ratio']:.2f}"
            f" ({row['latency_ratio_low']:.2f} to {row['latency_ratio_high']:.2f}) times as fast as {row['baseline']}"
            " in PyTorch eager"
        )
    if busy:
        others = max(others_before, others_during)
        print(f"busy: others used {others:.2f} cores, more than {BUSY_CORES}: the run is marked")


if __name__ == "__main__":
    run_stage(main)
