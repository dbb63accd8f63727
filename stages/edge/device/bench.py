"""Time the model on this machine, one image in each call.

    python bench.py [--threads 1] [--seconds 10] [--json out.json]

Import, load and first inference are those of this process. A run is marked busy if other programs used the processor:
repeat it on a quiet machine.
"""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

try:
    from edgewise_model import Model, open_model, run_script, stop, threads_argument
    from edgewise_protocol import Contender, Protocol, measure, random_pixels, start_up, summarize
except ImportError as missing:
    own = str(missing.name).startswith("edgewise_")
    sys.exit(f"error: {missing}: {'copy the whole bundle again' if own else 'pip install -r requirements.txt'}")

WARMUP_RUNS, WINDOWS = 20, 10


def bench(model: Model, threads: int, seconds: float) -> dict[str, object]:
    protocol = Protocol(threads, WARMUP_RUNS, WINDOWS, seconds / WINDOWS, seed=0)
    pixels = random_pixels(protocol.batch, model.image_shape, protocol.seed)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    start = start_up(model.run, pixels, model.import_ms, model.load_ms)
    from edgewise_machine import EnergyMeter, RunWatch, describe_machine  # here, or psutil's memory would be counted

    watch = RunWatch(protocol.quiet_seconds)
    contender = Contender(model.bundle.variant, "onnxruntime", model.run, pixels, 0)
    windows = measure([contender], protocol, EnergyMeter())
    marks, state = watch.finish()
    figures = summarize(windows, 0, 0, protocol).items()
    medians = [window.p50_ms for window in windows]
    return {
        "variant": model.bundle.variant,
        "onnx_sha256": model.bundle.onnx_sha256,
        "started": started,
        **marks,
        **{key: getattr(protocol, key) for key in ("batch", "threads", "warmup_runs", "windows", "window_seconds")},
        **{key: value for key, value in figures if "ratio" not in key and key != "unsteady"},
        "latency_ms_p50_fastest_window": min(medians),
        "latency_ms_p50_slowest_window": max(medians),
        **start,
        "machine": describe_machine(("onnxruntime", "numpy")) | state,
    }


def summary(result: dict) -> str:
    machine = result["machine"]
    known = [f"{machine['usable_cores']} of {machine['cores']} cores"]
    units = {"frequency_mhz": (0, "MHz"), "temperature_c": (0, "°C"), "load_average_1min": (2, "load")}
    for key, (digits, unit) in units.items():
        before, after = machine[f"{key}_before"], machine[f"{key}_after"]
        if before is not None and after is not None:
            known.append(f"{before:.{digits}f} to {after:.{digits}f} {unit}")
    if machine["governor"]:
        known.append(f"governor {machine['governor']}")
    lines = [
        f"{result['variant']}, batch 1, {result['threads']} thread{'s' * (result['threads'] > 1)},"
        f" ONNX Runtime {machine['onnxruntime']}",
        f"latency     p50 {result['latency_ms_p50']:.3f} ms, p95 {result['latency_ms_p95']:.3f} ms,"
        f" p99 {result['latency_ms_p99']:.3f} ms over {result['runs']:,} runs in {result['windows']} windows",
        f"throughput  {result['throughput_per_s']:.1f} images/s",
        f"start-up    import {result['import_ms']:.0f} ms, load {result['load_ms']:.1f} ms,"
        f" first inference {result['first_inference_ms']:.2f} ms",
        f"memory      {result['peak_rss_bytes'] / 1e6:.0f} MB peak resident after the first inference",
        f"machine     {machine['cpu']}, {', '.join(known)}",
    ]
    if result["energy_mj_per_image"] is not None:
        lines.append(f"energy      {result['energy_mj_per_image']:.2f} mJ per image, for the whole processor")
    if result["throttled"]:
        lines.append("throttled   the processor slowed down during the run: let it cool, then measure again")
    if result["busy"]:
        others = max(machine["others_cores_before"], machine["others_cores_during"])
        limit = machine["busy_above_cores"]
        lines.append(f"busy        other programs used {others:.2f} cores, more than {limit}: measure again later")
    return "\n".join(lines)


def write_json(path: Path, value: object) -> None:
    """Write the whole file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        stop(f"cannot write {path}: {error.strerror}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=threads_argument, default=1, help="threads of ONNX Runtime (default: 1)")
    seconds = "duration of the timing, without warm-up (default: 10)"
    parser.add_argument("--seconds", type=float, default=10, help=seconds)
    parser.add_argument("--json", type=Path, metavar="out", help="write all figures and the machine to this file")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds <= 86400:
        parser.error("--seconds: give more than 0 and at most 86400")
    out, threads = arguments.json, arguments.threads
    if out and (out.is_dir() or not out.parent.is_dir()):
        stop(f"cannot write {out}: {'it is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")
    try:
        result = bench(open_model(Path(__file__).parent, threads), threads, arguments.seconds)
    except KeyboardInterrupt:
        stop("interrupted: no result was written")
    print(summary(result))
    if out:
        write_json(out, result)


if __name__ == "__main__":
    run_script(main)
