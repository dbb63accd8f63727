"""What the edge benchmark says beside the variant table: runtimes, a soak, printed samples."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from stages.reporting.inputs import EAGER, ONNX_RUNTIME, Run
from stages.reporting.statistics import wilson_interval
from stages.reporting.text import ms_text, percent_text, ratio_text, share_text, signed_text

LEAST_AGREEMENT = 0.995  # share of test images on which model.onnx must give PyTorch's class, where it is float
LARGEST_DIFFERENCE = 0.002  # of top-1 between model.onnx and PyTorch, where layers compute on integers


@dataclass(frozen=True)
class Runtimes:
    """A table: a line for each variant, a column for each runtime."""

    names: list[str]
    lines: list[tuple[str, ...]]
    """The variant, its median latency in each runtime, and the fastest with its lead over ONNX Runtime."""
    missing: list[str]
    """Runtimes that were asked for and are not there, each with its reason."""
    refused: list[str]
    """Variants that a runtime did not run, each with its reason."""


def runtimes_of(run: Run) -> Runtimes | None:
    """None where ONNX Runtime and the eager baseline were all that was asked for."""
    left_out = run.edge.get("left_out", [])
    missing = [entry["reason"] for entry in left_out if entry["variant"] is None]
    refused = [entry["reason"] for entry in left_out if entry["variant"] is not None]
    names = list(dict.fromkeys(row["runtime"] for row in run.timings))
    if set(names) <= {ONNX_RUNTIME, EAGER} and not left_out:
        return None
    timed = {(row["variant"], row["runtime"]): row for row in run.timings}
    lines = []
    for variant in run.variants:
        found = {name: timed[variant, name] for name in names if (variant, name) in timed}
        fastest = min(found, key=lambda name: found[name]["latency_ms_p50"])
        lead = found[ONNX_RUNTIME]["latency_ms_p50"] / found[fastest]["latency_ms_p50"]
        words = fastest if fastest == ONNX_RUNTIME else f"{fastest} ({ratio_text(lead)} as fast as {ONNX_RUNTIME})"
        cells = (
            f"{ms_text(found[name]['latency_ms_p50'])} ({ratio_text(found[name]['latency_ratio'])})"
            if name in found
            else "\N{EN DASH}"
            for name in names
        )
        lines.append((variant, *cells, words))
    return Runtimes(names, lines, missing, refused)


def marks_of(run: Run, variants: Collection[str]) -> list[str]:
    """What has to be said before the figures of these variants are read; empty for a quiet and faithful run."""
    marks = []
    if run.edge.get("busy"):
        marks.append("Other programs were using this machine while latency was measured: take its times with care.")
    if run.edge.get("throttled"):
        marks.append("The processor was slowed down while latency was measured: take its times with care.")
    timings = [row for row in run.timings if row["variant"] in variants]
    unsteady = [f"{row['variant']} in {row['runtime']}" for row in timings if row.get("unsteady")]
    if unsteady:
        marks.append(
            "The speed-up differs by more than 5 % between the two halves of the run, so that a second run may tell"
            f" another: {', '.join(unsteady)}."
        )
    if repeat := run.edge.get("repeat"):
        names = {f"{row['variant']} in {row['runtime']}" for row in timings}
        if apart := [name for name in repeat["apart"] if name in names]:
            marks.append(
                f"The run before ({repeat['run_id']}, same machine and files) told speed-ups that differ by more than"
                f" 5 % (at most {percent_text(repeat['largest'])}): {', '.join(apart)}."
            )
    if unfaithful := exports_of(run, variants):
        marks.append(f"model.onnx does not do what the PyTorch artifact does: {', '.join(unfaithful)}.")
    return marks + too_few_images(run, variants)


def too_few_images(run: Run, variants: Collection[str]) -> list[str]:
    """Where the data or the dense network are too little for what the report would say of them."""
    found, params = [], run.params
    largest = float(np.bincount(run.labels).max() / len(run.labels))
    for dense in dict.fromkeys(params.baseline_of(variant) for variant in variants):
        row = run.variants[dense].profile
        low, _ = wilson_interval(round(row["top1"] * len(run.labels)), len(run.labels), params.report.confidence)
        if low <= largest:
            found.append(
                f"{dense} is not surely better than always giving the most frequent class (top-1"
                f" {percent_text(row['top1'])}, its interval from {percent_text(low)}; the class has"
                f" {percent_text(largest)} of the test images): what compression costs cannot be told from it."
            )
    n = min((run.variants[variant].profile["n_validation"] for variant in variants), default=0)
    if n and 1 / n > params.report.headline_max_drop:
        found.append(
            f"With {n} validation images one of them is {percent_text(1 / n)}, more than report.headline_max_drop"
            f" ({percent_text(params.report.headline_max_drop)}): which variant is within it is chance."
        )
    return found


def exports_of(run: Run, variants: Collection[str]) -> list[str]:
    """Those whose model.onnx is not faithful to the PyTorch artifact on the test images; empty where all are.

    Layers that compute on integers may fall to either side of a rounding edge, so that their top-1 counts; all else has
    to give the same class. One image is always allowed.
    """
    unfaithful = []
    for variant in variants:
        row, n = run.variants[variant].profile, len(run.labels)
        if row.get("quantized_operators"):
            apart = abs(row["top1"] - row.get("top1_torch", row["top1"]))
            if apart > LARGEST_DIFFERENCE and round(apart * n) > 1:
                unfaithful.append(f"{variant} (top-1 {percent_text(apart, 2)} apart)")
        elif row["agreement"] < LEAST_AGREEMENT and round((1 - row["agreement"]) * n) > 1:
            unfaithful.append(f"{variant} (the same class on {percent_text(row['agreement'], 2)})")
    return unfaithful


def soak_lines(run: Run) -> list[tuple[str, str]]:
    """Name and value of what the soak found; empty where there was none."""
    if (soak := run.edge.get("soak")) is None:
        return []

    def interval(key: str, unit: str) -> str:
        value, low, high = (signed_text(soak[name], 2) for name in (key, f"{key}_low", f"{key}_high"))
        return f"{value} {unit} [{low}, {high}]"

    rate = f"{soak['images_per_second']:g} images/s" if soak["images_per_second"] else "one inference after the other"
    growth = soak["rss_growth_bytes"]
    lines = [
        ("variant", f"{soak['variant']}, {rate}"),
        ("length", f"{soak['soak_seconds'] / 60:.1f} minutes, {soak['soak_runs']:,} inferences"),
        ("latency", f"median {ms_text(soak['latency_ms_p50'])}, 99th percentile {ms_text(soak['latency_ms_p99'])}"),
        ("change over the soak", interval("change_percent", "%")),
        *(
            [("slope", f"{interval('slope_percent_per_hour', '% an hour')}")]
            if soak["verdict"] != "cannot tell"
            else []
        ),
        ("growth of memory", "not known" if growth is None else f"{signed_text(growth / 1e6, 1)} MB"),
        ("answers that changed", f"{soak['wrong']} of {soak['soak_runs']:,}"),
    ]
    if soak["images_per_second"]:
        lines.append(("images that came too early", f"{soak['late']:,}"))
    reasons = f": {'; '.join(soak['reasons'])}" if soak["reasons"] else ""
    return [*lines, ("verdict", f"{soak['verdict']}{reasons}")]


def printed_lines(run: Run) -> list[tuple[str, str]]:
    """Name and value of the accuracy on printed samples; empty where none were made."""
    if (printed := run.printed) is None:
        return []

    def share(key: str) -> str:
        return share_text(printed[key], printed[f"{key}_ci_low"], printed[f"{key}_ci_high"])

    return [
        ("variant", printed["variant"]),
        ("test images", f"{printed['n_images']:,}, seed {printed['seed']}"),
        ("top-1, printed and filmed", share("top1_printed")),
        ("top-1 on the same images as they are", share("top1_clean")),
        ("the same class on both", percent_text(printed["agreement"], 2)),
    ]
