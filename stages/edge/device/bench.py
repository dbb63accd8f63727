"""Time the model on this machine: batch 1, one image after the other.

    python bench.py [--threads 1] [--seconds 10] [--json out.json]

Loading and the first inference are those of this process. A run during which others used the processors is marked
busy: repeat it on a quiet machine.
"""

import argparse
import gc
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

try:
    import numpy as np
    from edgewise_machine import (
        BUSY_CORES,
        CpuWatch,
        describe_machine,
        is_busy,
        machine_state,
        others_cores_now,
    )
    from edgewise_memory import peak_rss_bytes
    from edgewise_model import Model, open_model, stop, threads_argument
    from edgewise_window import time_window
except ImportError as missing:
    sys.exit(f"error: {missing}: pip install -r requirements.txt")

WARMUP_RUNS, WINDOWS, MINIMUM_RUNS, UNRECORDED_RUNS = 20, 10, 5, 2


def first_inference(model: Model, pixels: np.ndarray) -> dict[str, object]:
    """What start-up costs; nothing may have run before."""
    started = time.perf_counter_ns()
    model.run(pixels)
    first_ms = (time.perf_counter_ns() - started) / 1e6
    return {
        "import_ms": model.import_ms,
        "load_ms": model.load_ms,
        "first_inference_ms": first_ms,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def latency(model: Model, pixels: np.ndarray, seconds: float) -> dict[str, object]:
    """Percentiles over all calls of all windows; throughput is the mean, calls only."""
    for _ in range(WARMUP_RUNS):
        model.run(pixels)
    gc.collect()
    gc.disable()
    windows = [time_window(model.run, pixels, seconds / WINDOWS, MINIMUM_RUNS, UNRECORDED_RUNS) for _ in range(WINDOWS)]
    gc.enable()
    times = np.concatenate(windows)
    p50, p95, p99 = (np.percentile(times, [50, 95, 99]) / 1e6).tolist()
    medians = [float(np.median(window)) / 1e6 for window in windows]
    return {
        "latency_ms_p50": p50,
        "latency_ms_p95": p95,
        "latency_ms_p99": p99,
        "latency_ms_min": float(times.min()) / 1e6,
        "latency_ms_p50_fastest_window": min(medians),
        "latency_ms_p50_slowest_window": max(medians),
        "throughput_per_s": len(times) / (float(times.sum()) / 1e9),
        "runs": len(times),
    }


def bench(model: Model, threads: int, seconds: float) -> dict[str, object]:
    size = model.bundle.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    start_up = first_inference(model, pixels)
    before, others_before = machine_state(), others_cores_now()
    watch = CpuWatch.start()
    timed = latency(model, pixels, seconds)
    others_during, after = watch.others_cores(), machine_state()
    machine = describe_machine(("onnxruntime", "numpy"))
    machine |= {f"{key}_before": value for key, value in before.items()}
    machine |= {f"{key}_after": value for key, value in after.items()}
    machine |= {
        "others_cores_before": round(others_before, 3),
        "others_cores_during": round(others_during, 3),
        "busy_above_cores": BUSY_CORES,
    }
    return {
        "variant": model.bundle.variant,
        "onnx_sha256": model.bundle.onnx_sha256,
        "started": started,
        "busy": is_busy(others_before, others_during),
        "batch": 1,
        "threads": threads,
        "warmup_runs": WARMUP_RUNS,
        "windows": WINDOWS,
        "window_seconds": seconds / WINDOWS,
        **timed,
        **start_up,
        "machine": machine,
    }


def summary(result: dict) -> str:
    machine = result["machine"]
    known = [
        f"{machine[f'{key}_before']:.{digits}f} to {machine[f'{key}_after']:.{digits}f} {unit}"
        for key, digits, unit in [
            ("frequency_mhz", 0, "MHz"),
            ("temperature_c", 0, "°C"),
            ("load_average_1min", 2, "load"),
        ]
        if machine[f"{key}_before"] is not None and machine[f"{key}_after"] is not None
    ]
    known += [f"governor {machine['governor']}"] if machine["governor"] else []
    lines = [
        f"{result['variant']}, batch 1, {result['threads']} thread{'s' * (result['threads'] > 1)},"
        f" ONNX Runtime {machine['onnxruntime']}",
        f"latency     p50 {result['latency_ms_p50']:.3f} ms, p95 {result['latency_ms_p95']:.3f} ms,"
        f" p99 {result['latency_ms_p99']:.3f} ms over {result['runs']:,} runs in {result['windows']} windows",
        f"throughput  {result['throughput_per_s']:.1f} images/s",
        f"start-up    import {result['import_ms']:.0f} ms, load {result['load_ms']:.1f} ms,"
        f" first inference {result['first_inference_ms']:.2f} ms",
        f"memory      {result['peak_rss_bytes'] / 1e6:.0f} MB peak resident after the first inference",
        f"machine     {machine['cpu']}, {machine['usable_cores']} of {machine['cores']} cores, {', '.join(known)}",
    ]
    if result["busy"]:
        others = max(machine["others_cores_before"], machine["others_cores_during"])
        lines.append(
            f"busy        others used {others:.2f} cores, more than {BUSY_CORES}: measure again when it is quiet"
        )
    return "\n".join(lines)


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        stop(f"cannot write {path}: {error.strerror}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=threads_argument, default=1, help="of ONNX Runtime (default: 1)")
    parser.add_argument("--seconds", type=float, default=10, help="of timing, without warm-up (default: 10)")
    parser.add_argument("--json", type=Path, metavar="out", help="write all figures and the machine to this file")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds <= 86400:
        parser.error("--seconds: more than 0 and at most 86400")
    if arguments.json and not arguments.json.parent.is_dir():
        stop(f"cannot write {arguments.json}: there is no folder {arguments.json.parent}")
    try:
        result = bench(open_model(Path(__file__).parent, arguments.threads), arguments.threads, arguments.seconds)
    except KeyboardInterrupt:
        stop("interrupted: nothing is written")
    print(summary(result))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
