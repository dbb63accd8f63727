"""Time several models on this device, interleaved. The edge benchmark copies this script here and runs it over SSH.

    python timing.py plan.json result.json

The script ends when its input is closed, so nothing keeps running after the connection is lost. With `--fresh` and a
model, threads and batch, it loads the model, classifies once, and prints the start-up cost.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from edgewise_model import load_onnx, run_script, sha256_of, stop
from edgewise_protocol import Contender, Protocol, median_start, random_pixels, start_up, timed_run
from edgewise_soak import SoakPlan, soak


def check_models(models: list[dict]) -> None:
    """Removes a damaged model file and ends the program."""
    for model in models:
        path = Path(model["file"])
        if not path.is_file() or sha256_of(path) != model["onnx_sha256"]:
            path.unlink(missing_ok=True)
            stop(f"{path} was not the model.onnx of {model['variant']}, so it was removed: run again")


def time_models(plan: dict, log: Callable[[str], None]) -> dict:
    """The fields of `Timing` in the edge benchmark: `result`, `windows` and `soak`."""
    # here, because the processes that measure their own memory do without psutil
    from edgewise_machine import EnergyMeter, RunWatch, describe_machine, keep_to_cores, process_state

    started = datetime.now(UTC).isoformat(timespec="seconds")
    models, protocol = plan["models"], Protocol(**plan["protocol"])
    check_models(models)
    log(f"start-up of {len(models)} models")
    starts = []
    try:
        if plan["affinity"] is not None:
            keep_to_cores(plan["affinity"])
        for model in models:
            settings = [model["file"], protocol.threads, protocol.batch]
            command = [sys.executable, __file__, "--fresh", *map(str, settings)]
            start = median_start(model["variant"], command, protocol.start_up_runs)
            starts.append(start | {"onnx_sha256": model["onnx_sha256"]})
    except ValueError as error:
        stop(error)
    opened = {model["variant"]: load_onnx(Path(model["file"]), protocol.threads) for model in models}
    contenders = []
    for model in models:
        loaded = opened[model["variant"]]
        pixels = random_pixels(protocol.batch, loaded.image_shape, protocol.seed)
        baseline = list(opened).index(model["baseline"])
        contenders.append(Contender(model["variant"], "onnxruntime", loaded.run, pixels, baseline))
    watch = RunWatch(protocol.quiet_seconds)
    timed, state, windows = timed_run(contenders, starts, protocol, watch, EnergyMeter(), log)
    result = {"started": started, **timed, "machine": describe_machine(("onnxruntime", "numpy")) | state}
    soaked = []
    if plan["soak"] is not None:
        images, wanted = np.load(plan["soak"]["file"]), SoakPlan(**plan["soak"]["plan"])
        log(f"soak: {plan['soak']['variant']}, {wanted.seconds / 60:g} minutes")
        soaked = soak(opened[plan["soak"]["variant"]].run, list(images[:, None]), wanted, process_state)
    return {"result": result, "windows": windows, "soak": soaked}


def end_with_the_connection() -> None:
    """SSH closes the input when the connection is lost."""

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would still be held at the exit
            pass
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    if sys.argv[1] == "--fresh":
        path, (threads, batch) = Path(sys.argv[2]), map(int, sys.argv[3:])
        loaded = load_onnx(path, threads)
        pixels = random_pixels(batch, loaded.image_shape, 0)
        print(json.dumps(start_up(loaded.run, pixels, loaded.import_ms, loaded.load_ms)))
        return
    plan, out = map(Path, sys.argv[1:])
    end_with_the_connection()
    timed = time_models(json.loads(plan.read_text(encoding="utf-8")), lambda line: print(line, flush=True))
    out.write_text(json.dumps(timed, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
