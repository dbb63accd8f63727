"""Time variants on this machine, in each of the chosen runtimes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.common.errors import UserError
from stages.edge.machine import EnergyMeter, RunWatch, describe_machine, process_state
from stages.edge.protocol import Contender, Log, Protocol, random_pixels, timed_run
from stages.edge.runtimes import ONNXRUNTIME, RUNTIMES, TORCH_EAGER, measure_fresh, not_installed
from stages.edge.soak import SoakPlan, soak


@dataclass(frozen=True)
class Candidate:
    """A variant to time."""

    variant: str
    folder: Path  # its artifact
    baseline: str  # the dense float variant to compare with
    image_shape: tuple[int, int, int]  # height, width, channels
    onnx_sha256: str


@dataclass(frozen=True)
class Timing:
    """The result of a run on this machine or on a device."""

    result: dict[str, object]
    """The contents of `edge.json`; `left_out` has each requested timing that was not possible, with the reason."""
    windows: list[dict]
    soak: list[dict]  # empty if the params ask for no soak


Soaked = tuple[Candidate, np.ndarray, SoakPlan]
"""The candidate of a soak, its images uint8 `[N, H, W, C]`, and the plan."""


def time_here(
    candidates: Sequence[Candidate], runtimes: Sequence[str], protocol: Protocol, soaked: Soaked | None, log: Log
) -> Timing:
    """Time every candidate in every runtime, and each baseline in PyTorch eager, in one interleaved run.

    Raises a `UserError` if a model does not run in a required runtime.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    requested, opened, starts, left_out = [], [], [], []
    dense = [candidate for candidate in candidates if candidate.variant == candidate.baseline]
    for runtime in (RUNTIMES[name] for name in dict.fromkeys((*runtimes, TORCH_EAGER.name))):
        if reason := not_installed(runtime):
            left_out.append({"variant": None, "runtime": runtime.name, "reason": reason})
        else:
            requested += [(candidate, runtime) for candidate in (dense if runtime.dense_only else candidates)]
    for candidate, runtime in requested:
        try:
            run = runtime.open(candidate.folder, protocol.threads, protocol.batch)
        except UserError as error:
            if runtime.required:
                raise
            left_out.append({"variant": candidate.variant, "runtime": runtime.name, "reason": str(error)})
            log(f"left out: {error}")
            continue
        opened.append((candidate, runtime, run))
        repeats = protocol.start_up_runs if runtime is ONNXRUNTIME else 1  # others take seconds, and nobody ships them
        start = measure_fresh(runtime, candidate.folder, protocol.threads, protocol.batch, repeats)
        starts.append(start | {"onnx_sha256": candidate.onnx_sha256})
    eager = {c.variant: index for index, (c, runtime, _) in enumerate(opened) if runtime is TORCH_EAGER}
    contenders = []
    for c, runtime, run in opened:
        pixels = random_pixels(protocol.batch, c.image_shape, protocol.seed)
        contenders.append(Contender(c.variant, runtime.name, run, pixels, eager[c.baseline]))
    watch = RunWatch(protocol.quiet_seconds)
    timed, state, windows = timed_run(contenders, starts, protocol, watch, EnergyMeter(), log)
    machine = describe_machine(sorted({runtime.package for _, runtime, _ in opened} | {"numpy"})) | state
    result = {"started": started, **timed, "machine": machine, "left_out": left_out}
    soak_windows = []
    if soaked is not None:
        candidate, images, plan = soaked
        log(f"soak: {candidate.variant}, {plan.seconds / 60:g} minutes")
        run = ONNXRUNTIME.open(candidate.folder, protocol.threads, 1)
        soak_windows = soak(run, list(images[:, None]), plan, process_state)
    return Timing(result, windows, soak_windows)


def refuse_many_threads(threads: int, cores: int) -> None:
    """Raise a `UserError` if there are more threads than cores: the scheduler would decide their times."""
    if threads > cores:
        plural = "s" * (cores != 1)
        raise UserError(f"edge_benchmark.threads = {threads}: this process may use {cores} core{plural}: lower it")
