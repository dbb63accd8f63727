"""Whether a soak drifted: the slope of its windows' latency, with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

DRIFTS = 0.05  # change over the whole soak, as a share of the median latency, from which on it matters
LARGEST_GROWTH = 0.05  # of resident memory over the whole soak, as a share
POINTS = 200  # the slope is the median over all pairs: longer soaks are averaged down to about as many points


@dataclass(frozen=True)
class Drift:
    soak_seconds: float
    soak_runs: int
    latency_ms_p50: float
    """Median over windows."""
    latency_ms_p99: float
    slope_percent_per_hour: float
    """Of the windows' median latency, by Theil and Sen (the median over all pairs of windows), of its median."""
    slope_percent_per_hour_low: float
    slope_percent_per_hour_high: float
    """See `slope_interval`."""
    change_percent: float
    """The slope over the whole soak."""
    change_percent_low: float
    change_percent_high: float
    rss_growth_bytes: int | None
    """Of the last quarter's median over the second quarter's: the first fills caches."""
    late: int
    """Images that a set rate would have dropped."""
    wrong: int
    """Answers that differed from the first one on the same image."""
    verdict: str
    """`stable`, `drifts`, or `cannot tell`: too short or too noisy a soak."""
    reasons: list[str]


def drift_of(windows: Sequence[dict], confidence: float) -> Drift:
    """Judge a soak by its windows (rows of `soak`).

    It drifts where the latency's change over the soak is, with its interval, away from 0 and larger than `DRIFTS`,
    where memory grows by more than `LARGEST_GROWTH`, or where an answer changed. It is stable only where the interval
    leaves no room for a larger change.
    """
    hours = np.array([window["seconds"] for window in windows]) / 3600
    latency = np.array([window["latency_ms_p50"] for window in windows])
    middle = float(np.median(latency))
    low, slope, high = slope_interval(hours, latency / middle * 100, confidence)
    length = float(hours[-1])
    growth, share = memory_growth([window["rss_bytes"] for window in windows])
    wrong = int(sum(window["wrong"] for window in windows))
    reasons = []
    if (low > 0 or high < 0) and abs(slope) * length > 100 * DRIFTS:
        reasons.append(f"latency changes by {slope * length:+.1f} % [{low * length:+.1f}, {high * length:+.1f}]")
    if share > LARGEST_GROWTH:
        reasons.append(f"memory grows by {growth / 1e6:.1f} MB")
    if wrong:
        reasons.append(f"{wrong} answers changed")
    room = max(-low, high) * length > 100 * DRIFTS
    return Drift(
        soak_seconds=windows[-1]["seconds"],
        soak_runs=int(sum(window["runs"] for window in windows)),
        latency_ms_p50=middle,
        latency_ms_p99=float(np.median([window["latency_ms_p99"] for window in windows])),
        slope_percent_per_hour=slope,
        slope_percent_per_hour_low=low,
        slope_percent_per_hour_high=high,
        change_percent=slope * length,
        change_percent_low=low * length,
        change_percent_high=high * length,
        rss_growth_bytes=growth,
        late=int(sum(window["late"] for window in windows)),
        wrong=wrong,
        verdict="drifts" if reasons else "cannot tell" if room else "stable",
        reasons=reasons,
    )


def slope_interval(times: np.ndarray, values: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Low end, slope (Theil-Sen) and high end: values per unit of time, both `[N]`.

    The interval is Sen's (1968), which takes neighbours to be independent; it is widened by the residuals' lag-one
    autocorrelation r, by the square root of (1 + r) / (1 - r) (effective sample size, Santer et al. 2000).
    """
    groups = min(len(times), POINTS)
    times, values = (np.array([part.mean() for part in np.array_split(x, groups)]) for x in (times, values))
    slope, intercept, low, high = theilslopes(values, times, confidence)
    residuals = values - intercept - slope * times
    residuals -= residuals.mean()
    spread = float(residuals @ residuals)
    r = float(residuals[1:] @ residuals[:-1]) / spread if spread > 0 else 0.0
    wider = np.sqrt((1 + r) / (1 - r)) if r > 0 else 1.0
    return float(slope - wider * (slope - low)), float(slope), float(slope + wider * (high - slope))


def memory_growth(rss_bytes: Sequence[int | None]) -> tuple[int | None, float]:
    """In bytes, None where the system does not tell, and as a share of what it was."""
    if None in rss_bytes:
        return None, 0.0
    quarters = np.array_split(np.array(rss_bytes, float), 4)
    early, late = float(np.median(quarters[1])), float(np.median(quarters[3]))
    return int(late - early), (late - early) / early
