"""Start-up cost: load a model and classify once, in a process of its own.

In:  the folder of an artifact. With ONNX Runtime, the process imports neither torch nor any training code.
Out: one line of JSON: `import_ms` (the runtime), `load_ms` (from the file to a session that can run),
     `first_inference_ms` and `peak_rss_bytes` (the whole process, Python and NumPy included).
Run: python -m stages.edge.fresh <runtime> <folder> <threads> <batch>
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import read_json
from stages.edge.protocol import median_start, random_pixels, start_up
from stages.edge.runtimes import RUNTIMES, Runtime


def measure_fresh(runtime: Runtime, folder: Path, threads: int, batch: int, repeats: int) -> dict[str, float]:
    """The median of each figure over `repeats` new processes.

    Raises:
        UserError: if a process fails, with the last line of its error output.
    """
    command = [sys.executable, "-m", "stages.edge.fresh", runtime.name, str(folder), str(threads), str(batch)]
    try:
        return median_start(command, repeats)
    except ValueError as error:
        raise UserError(f"{folder} under {runtime.name} {error}") from None


def first_run(runtime: Runtime, folder: Path, threads: int, batch: int, image_size: int) -> dict[str, float]:
    """Measure in this process, which must not have imported the runtime before."""
    times = [time.perf_counter_ns()]
    for module in runtime.modules:
        importlib.import_module(module)
    times.append(time.perf_counter_ns())
    run = runtime.open(folder, threads, batch)
    times.append(time.perf_counter_ns())
    return start_up(run, random_pixels(batch, image_size, 0), *(np.diff(times) / 1e6).tolist())


def main() -> None:
    runtime, folder, threads, batch = RUNTIMES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    print(json.dumps(first_run(runtime, folder, threads, batch, read_json(folder / "model.json")["image_size"])))


if __name__ == "__main__":
    run_stage(main)
