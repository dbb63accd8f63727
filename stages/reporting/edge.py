"""The run as a whole: its description (`run.json`), warnings about its measurements, and the runtimes compared."""

from collections.abc import Collection
from typing import Any

import numpy as np

from stages.reporting.inputs import EAGER, ONNX_RUNTIME, CompletedRun
from stages.reporting.statistics import recall_interval, wilson_interval
from stages.reporting.wording import FIGURES, ms_text, names_text, percent_text, ratio_text

LEAST_AGREEMENT = 0.995
"""Fraction of the test images on which a float `model.onnx` must predict PyTorch's class."""
LARGEST_DIFFERENCE = 0.002
"""Largest difference of top-1 between `model.onnx` and PyTorch where layers compute on integers."""


def describe_run(run: CompletedRun) -> dict[str, Any]:
    """`run.json`: data, machine, timing protocol, versions and warnings; all that `variants.json` does not say."""
    profile, report = run.first.profile.model_dump(), run.params.report
    runtimes = {ONNX_RUNTIME: "ONNX Runtime", EAGER: "PyTorch eager"}
    return {
        **run.edge,
        **{key: value for key, value in profile.items() if key.startswith("data_")},
        "n_test": len(run.labels),
        "n_validation": profile["n_validation"],
        "baseline_runtime": runtimes[next(iter(run.baselines.values())).runtime],
        "baseline_latency_ms_p50": {model: row.latency_ms_p50 for model, row in run.baselines.items()},
        "printed": run.printed,
        "versions": run.first.artifact.versions,
        "confidence": report.confidence,
        "metric": report.metric,
        "headline_max_drop": report.headline_max_drop,
        "marks": marks_of(run, run.variants),
        "inconclusive": bool(too_few_images(run, run.variants)),
    }


def runtimes_of(run: CompletedRun) -> tuple[list[str], list[tuple[str, ...]]] | None:
    """Heads and lines of a table: for each variant its median latency in each runtime, and the fastest runtime.

    None if only ONNX Runtime and the eager baseline were requested.
    """
    names = list(dict.fromkeys(row.runtime for row in run.timings))
    if set(names) <= {ONNX_RUNTIME, EAGER} and not run.edge.get("left_out"):
        return None
    timed = {(row.variant, row.runtime): row for row in run.timings}
    lines = []
    for variant in run.variants:
        found = {name: timed[variant, name] for name in names if (variant, name) in timed}
        fastest = min(found, key=lambda name: found[name].latency_ms_p50)
        lead = found[ONNX_RUNTIME].latency_ms_p50 / found[fastest].latency_ms_p50
        words = fastest if fastest == ONNX_RUNTIME else f"{fastest} ({ratio_text(lead)} as fast as {ONNX_RUNTIME})"
        cells = (
            f"{ms_text(found[name].latency_ms_p50)} ({ratio_text(found[name].latency_ratio)})"
            if name in found
            else "\N{EN DASH}"
            for name in names
        )
        lines.append((variant, *cells, words))
    return ["Variant", *names, "Fastest"], lines


def marks_of(run: CompletedRun, variants: Collection[str]) -> list[str]:
    """Warnings that a reader of these variants' figures needs; empty for a quiet machine and faithful exports."""
    marks = []
    if run.edge.get("busy"):
        marks.append("Other programs used this machine during the latency measurement: its times may be too long.")
    if run.edge.get("throttled"):
        marks.append("The processor was throttled during the latency measurement: its times may be too long.")
    timings = [row for row in run.timings if row.variant in variants]
    if unsteady := [f"{row.variant} in {row.runtime}" for row in timings if row.unsteady]:
        marks.append(
            "The speed-up differs by more than 5 % between the two halves of the run, so a second run may give another"
            f" value: {', '.join(unsteady)}."
        )
    if repeat := run.edge.get("repeat"):
        names = {f"{row.variant} in {row.runtime}" for row in timings}
        if apart := [name for name in repeat["apart"] if name in names]:
            marks.append(
                f"The previous run ({repeat['run_id']}, same machine and files) measured speed-ups that differ by more"
                f" than 5 % (at most {percent_text(repeat['largest'])}): {', '.join(apart)}."
            )
    if unfaithful := exports_of(run, variants):
        marks.append(f"model.onnx and the PyTorch artifact predict different classes: {', '.join(unfaithful)}.")
    return marks + lost_classes(run, variants) + too_few_images(run, variants)


def lost_classes(run: CompletedRun, variants: Collection[str]) -> list[str]:
    """Warnings about variants that answer one class only, or that give up classes that the dense network knows."""
    constant: dict[int, list[str]] = {}
    lost: dict[tuple[str, ...], list[str]] = {}
    for variant in variants:
        answers = np.unique(run.variants[variant].predicted)
        known = run.variants[run.params.baseline_of(variant)].profile.validation_never_right
        given_up = tuple(name for name in run.variants[variant].profile.validation_never_right if name not in known)
        if len(answers) == 1 and len(np.unique(run.labels)) > 1:
            constant.setdefault(int(answers[0]), []).append(variant)
        elif given_up:
            lost.setdefault(given_up, []).append(variant)
    return [
        *(f"Every test image is classified as {run.classes[k]} by {names_text(v)}." for k, v in constant.items()),
        *(
            f"Recall on validation images fell to 0, where the dense network's is above, for {names_text(names)} in"
            f" {names_text(which)}."
            for names, which in lost.items()
        ),
    ]


def too_few_images(run: CompletedRun, variants: Collection[str]) -> list[str]:
    """Warnings that the data or the dense network cannot support the report's conclusions."""
    found, report = [], run.params.report
    balanced = report.metric == "balanced_accuracy"
    for dense in dict.fromkeys(run.params.baseline_of(variant) for variant in variants):
        right, images = run.variants[dense].by_class
        right, images = right[images > 0], images[images > 0]
        if balanced:
            accuracy, constant = float((right / images).mean()), 1 / len(images)
            low, _ = recall_interval(right, images, report.confidence)
        else:
            accuracy, constant = float(right.sum() / images.sum()), float(images.max() / images.sum())
            low, _ = wilson_interval(int(right.sum()), int(images.sum()), report.confidence)
        if low <= constant:
            found.append(
                f"{dense} is not measurably better than always predicting the most frequent class"
                f" ({FIGURES[report.metric]} {percent_text(accuracy)}, lower end of its interval {percent_text(low)}; a"
                f" constant answer has {percent_text(constant)}): the cost of compression cannot be measured with it."
            )
    first = run.first.profile
    n = first.n_validation_smallest_class if balanced else first.n_validation
    weight = 1 / (n * len(run.classes) if balanced else n)
    if variants and weight > report.headline_max_drop:
        which = f"{n} validation images" + (" of the smallest class" if balanced else "")
        found.append(
            f"One of the {which} is {percent_text(weight)} of {FIGURES[report.metric]}, more than the allowed drop"
            f" ({percent_text(report.headline_max_drop)}): chance decides which variants are within it."
        )
    return found


def exports_of(run: CompletedRun, variants: Collection[str]) -> list[str]:
    """Variants whose `model.onnx` disagrees with the PyTorch artifact on the test images; empty if all agree.

    Integer layers may round a value to either side, so their top-1 is compared; all other variants must predict the
    same class. One differing image is always allowed.
    """
    unfaithful = []
    for variant in variants:
        profile, n = run.variants[variant].profile, len(run.labels)
        if profile.quantized_operators:
            apart = abs(profile.top1 - (profile.top1 if profile.top1_torch is None else profile.top1_torch))
            if apart > LARGEST_DIFFERENCE and round(apart * n) > 1:
                unfaithful.append(f"{variant} (top-1 differs by {percent_text(apart, 2)})")
        elif profile.agreement < LEAST_AGREEMENT and round((1 - profile.agreement) * n) > 1:
            unfaithful.append(f"{variant} (the same class on {percent_text(profile.agreement, 2)})")
    return unfaithful
