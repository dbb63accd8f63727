"""Load a model and classify one image in a process of its own: what a device feels at start-up.

In:  an artifact's folder. Under ONNX Runtime neither torch nor anything else of training is imported.
Out: one line of JSON (see `Fresh`).
Run: python -m stages.edge.fresh <runtime> <folder> <threads> <batch>
"""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import read_json
from stages.edge.memory import peak_rss_bytes
from stages.edge.protocol import median_start, random_pixels
from stages.edge.runtimes import RUNTIMES, Runtime


@dataclass(frozen=True)
class Fresh:
    import_ms: float
    """Importing the runtime."""
    load_ms: float
    """From the file to a session that can run."""
    first_inference_ms: float
    peak_rss_bytes: int
    """Largest resident memory of the process, Python and numpy included."""


def measure_fresh(runtime: Runtime, folder: Path, threads: int, batch: int = 1, repeats: int = 3) -> Fresh:
    """Each figure's median over `repeats` new processes.

    Raises:
        UserError: if the process fails, with the last line of what it says.
    """
    command = [sys.executable, "-m", "stages.edge.fresh", runtime.name, str(folder), str(threads), str(batch)]
    results = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"{folder} does not run in a new process under {runtime.name}: {reason.removeprefix('error: ')}"
            )
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return Fresh(**median_start(results))


def first_run(runtime: Runtime, folder: Path, threads: int, batch: int, image_size: int) -> Fresh:
    """In this process, which must not have imported the runtime before."""
    pixels = random_pixels(batch, image_size, 0)
    times = [time.perf_counter_ns()]
    for module in runtime.modules:
        importlib.import_module(module)
    times.append(time.perf_counter_ns())
    run = runtime.open(folder, threads, batch)
    times.append(time.perf_counter_ns())
    run(pixels)
    times.append(time.perf_counter_ns())
    import_ms, load_ms, first_ms = (np.diff(times) / 1e6).tolist()
    return Fresh(import_ms, load_ms, first_ms, peak_rss_bytes())


def main() -> None:
    names = "|".join(RUNTIMES)
    if len(sys.argv) != 5 or sys.argv[1] not in RUNTIMES or not all(text.isdigit() for text in sys.argv[3:]):
        raise UserError(f"usage: python -m stages.edge.fresh <{names}> <artifact folder> <threads> <batch>")
    folder, (threads, batch) = Path(sys.argv[2]), map(int, sys.argv[3:])
    image_size = read_json(folder / "model.json")["image_size"]
    print(json.dumps(asdict(first_run(RUNTIMES[sys.argv[1]], folder, threads, batch, image_size))))


if __name__ == "__main__":
    run_stage(main)
