"""Stability of timings: does a soak drift, and does a run reproduce the speed-ups of the run before it?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.edge.protocol import STEADY

DRIFTS = 0.05  # change over the whole soak, as a fraction of the median latency, from which on it matters
LARGEST_GROWTH = 0.05  # growth of resident memory over the whole soak, as a fraction
POINTS = 200  # the slope is a median over all pairs of points, so longer soaks are averaged down to about this many
SAME = ("target", "protocol")
SAME_MACHINE = ("cpu", "architecture", "instruction_sets", "usable_cores", "affinity", "python", "onnxruntime", "torch")
"""Two runs are comparable if these entries of `edge.json` and of its `machine` agree."""


def drift_of(windows: Sequence[dict], confidence: float) -> dict[str, Any]:
    """Judge a soak by its windows (rows of `soak`).

    It drifts if the change of latency exceeds `DRIFTS` and its interval excludes 0, if memory grows by more than
    `LARGEST_GROWTH`, or if an answer changed. It is stable only if the interval excludes a larger change.

    Returns:
        Flat figures and the `reasons` for the `verdict`: `stable`, `drifts`, or `cannot tell` (the soak was too short
        or too noisy). The slope is that of the window medians, in percent of their median; `change_percent` is the
        slope times the duration. Memory is compared between the last and the second quarter, since the first fills
        caches. `late` and `wrong` are sums over windows.
    """
    hours = np.array([window["seconds"] for window in windows]) / 3600
    latency = np.array([window["latency_ms_p50"] for window in windows])
    middle = float(np.median(latency))
    low, slope, high = slope_interval(hours, latency / middle * 100, confidence)
    length = float(hours[-1])
    quarters = np.array_split(np.array([window["rss_bytes"] for window in windows], float), 4)
    early_rss, late_rss = float(np.median(quarters[1])), float(np.median(quarters[3]))
    wrong = int(sum(window["wrong"] for window in windows))
    reasons = []
    if (low > 0 or high < 0) and abs(slope) * length > 100 * DRIFTS:
        reasons.append(f"latency changes by {slope * length:+.1f} % [{low * length:+.1f}, {high * length:+.1f}]")
    if late_rss - early_rss > LARGEST_GROWTH * early_rss:
        reasons.append(f"memory grows by {(late_rss - early_rss) / 1e6:.1f} MB")
    if wrong:
        reasons.append(f"{wrong} answers changed")
    inconclusive = max(-low, high) * length > 100 * DRIFTS
    figures = {
        "soak_seconds": windows[-1]["seconds"],
        "soak_runs": int(sum(window["runs"] for window in windows)),
        "latency_ms_p50": middle,
        "latency_ms_p99": float(np.median([window["latency_ms_p99"] for window in windows])),
    }
    for name, factor in (("slope_percent_per_hour", 1.0), ("change_percent", length)):
        figures |= {name: slope * factor, f"{name}_low": low * factor, f"{name}_high": high * factor}
    return figures | {
        "rss_growth_bytes": int(late_rss - early_rss),
        "late": int(sum(window["late"] for window in windows)),
        "wrong": wrong,
        "verdict": "drifts" if reasons else "cannot tell" if inconclusive else "stable",
        "reasons": reasons,
    }


def slope_interval(times: np.ndarray, values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Lower end, Theil-Sen slope and upper end, in values per unit of time; both arrays are `[N]`.

    Sen's interval (1968) assumes independent neighbors. It is widened by sqrt((1 + r) / (1 - r)), where r is the
    lag-one autocorrelation of the residuals (effective sample size, Santer et al. 2000).
    """
    from scipy.stats import theilslopes  # here, because only a soak needs its import time

    groups = min(len(times), POINTS)
    times, values = (np.array([part.mean() for part in np.array_split(x, groups)]) for x in (times, values))
    slope, intercept, low, high = theilslopes(values, times, confidence)
    residuals = values - intercept - slope * times
    residuals -= residuals.mean()
    squares = float(residuals @ residuals)
    r = float(residuals[1:] @ residuals[:-1]) / squares if squares > 0 else 0.0
    factor = np.sqrt((1 + r) / (1 - r)) if r > 0 else 1.0
    return float(slope - factor * (slope - low)), float(slope), float(slope + factor * (high - slope))


def repeat_of(result: dict[str, Any], before: object) -> dict[str, Any] | None:
    """Compare the `latency_ratio` of each row with that of the previous run; both are contents of `edge.json`.

    A process may have another memory layout than the last one, and so may its baseline. No single run shows that.

    Returns:
        The `run_id` of the previous run; the number of `compared` rows, which have the same model.onnx, runtime and
        baseline; the `largest` change of a speed-up, as a fraction; the rows that are `apart` by more than `STEADY`.
        None if the previous run is missing, or has other files, another machine or another protocol.
    """
    if not isinstance(before, dict) or any(before.get(key) != result[key] for key in SAME):
        return None
    machines = [run.get("machine") or {} for run in (before, result)]
    if any(machines[0].get(key) != machines[1].get(key) for key in SAME_MACHINE):
        return None
    previous = {_key(row): row["latency_ratio"] for row in before.get("rows", ()) if "latency_ratio" in row}
    changes = {
        f"{row['variant']} in {row['runtime']}": abs(row["latency_ratio"] / previous[_key(row)] - 1)
        for row in result["rows"]
        if _key(row) in previous and (row["variant"], row["runtime"]) != (row["baseline"], row["baseline_runtime"])
    }
    if not changes:
        return None
    apart = [name for name, change in changes.items() if change > STEADY]
    largest = max(changes.values())
    return {"run_id": str(before["run_id"]), "compared": len(changes), "largest": largest, "apart": apart}


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("variant", "runtime", "onnx_sha256", "baseline", "baseline_runtime"))
