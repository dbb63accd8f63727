"""What the report of 40 variants with 10,000 predictions each takes: time, memory, size, and time until it can be used.

Run: python tests/benchmarks/report_page.py --out reports/benchmarks/report_page.json
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a script's own folder is all that Python puts there
sys.path.insert(0, str(Path(__file__).parents[1] / "reporting"))

from synthetic_run import params_of, write_run

from stages.common.files import write_json
from stages.edge.machine import describe_machine

VARIANTS, IMAGES, ROUNDS = 40, 10_000, 5
CLASSES = [f"class {number}" for number in range(10)]
STAGE = "import sys, stages.report as r; r.main(); print('torch' in sys.modules)"


def params() -> dict:
    training = {"epochs": 4, "learning_rate_factor": 0.5}
    pruners = {
        "none": {"method": "none"},
        "continued": training | {"method": "continued"},
        **{f"l1_{s}": training | {"method": "l1_unstructured", "sparsity": s / 100} for s in range(50, 86, 2)},
    }
    variants = [(pruner, quantizer) for pruner in pruners for quantizer in ("fp32", "int8")]
    return params_of(pruners=pruners, variants=variants)


def run_stage(folder: Path) -> dict[str, float | bool]:
    """One run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", STAGE], cwd=folder, env=environment, stdout=subprocess.PIPE)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit("the report stage failed")
    return {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024, "torch": printed.strip() != b"False"}


def interactive_ms(page: Path) -> float | None:
    """From navigation until Chromium has the page ready for input; None without Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        return None
    tell = "document.title = performance.getEntriesByType('navigation')[0].domInteractive"
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("</body>", f"<script>addEventListener('load', () => {tell})</script>"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    done = subprocess.run([chromium, *flags, f"file://{probed}"], capture_output=True, text=True, check=True)
    return float(re.search(r"<title>([\d.]+)</title>", done.stdout)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, wanted = Path(name), params()
        if len(wanted["variants"]) != VARIANTS:
            raise SystemExit(f"{len(wanted['variants'])} variants, not {VARIANTS}")
        write_run(folder, wanted, n=IMAGES, classes=CLASSES)
        runs = [run_stage(folder) for _ in range(ROUNDS)]
        page = folder / "reports/index.html"
        ready = [ms for _ in range(ROUNDS) if (ms := interactive_ms(page)) is not None]
        result = {
            "variants": VARIANTS,
            "images": IMAGES,
            "rounds": ROUNDS,
            "seconds": statistics.median(run["seconds"] for run in runs),
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "imports_torch": any(run["torch"] for run in runs),
            "page_bytes": page.stat().st_size,
            "page_interactive_ms": statistics.median(ready) if ready else None,
            "machine": describe_machine(("numpy", "matplotlib", "jinja2")),
        }
    print(json.dumps(result, indent=2))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
