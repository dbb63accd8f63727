"""Time variants on this machine, each in the runtimes asked for."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from stages.common.errors import UserError
from stages.edge.fresh import measure_fresh
from stages.edge.machine import EnergyMeter, RunWatch, describe_machine, machine_state
from stages.edge.memory import rss_bytes
from stages.edge.protocol import Contender, Protocol, random_pixels, timed_run
from stages.edge.runtimes import ONNXRUNTIME, RUNTIMES, TORCH_COMPILE, TORCH_EAGER, Runtime, not_installed
from stages.edge.soak import SoakPlan, soak

TORCH = (TORCH_EAGER, TORCH_COMPILE)
"""The baselines' runtimes: they time the dense float networks only."""
SURE = (ONNXRUNTIME, TORCH_EAGER)
"""What every row is compared in: a model that one of them refuses ends the run; another runtime's refusal is told."""


@dataclass(frozen=True)
class Candidate:
    """A variant that is to be timed."""

    variant: str
    folder: Path
    """Its artifact."""
    baseline: str
    """The variant whose dense float network it is compared with."""
    image_size: int
    onnx_sha256: str


@dataclass(frozen=True)
class Timing:
    """What a machine, this one or a device, tells of a run."""

    result: dict[str, object]
    """`started`, the marks `busy` and `throttled`, `machine`, `protocol`, `overhead_ns`, `rows`, and `left_out`: what
    was asked for and could not be timed, each with its reason."""
    windows: list[dict]
    soak: list[dict]
    """Empty where none was asked for."""


def time_here(
    candidates: Sequence[Candidate],
    runtimes: Sequence[str],
    protocol: Protocol,
    soaked: tuple[Candidate, np.ndarray, SoakPlan] | None,
    say: Callable[[str], None],
) -> Timing:
    """Time every candidate in every runtime, and each baseline in PyTorch eager, in one interleaved run.

    Args:
        soaked: which candidate to soak, on which images uint8 `[N, H, W, 3]`.
        say: gets lines on the progress.

    Raises:
        UserError: if a model does not run in ONNX Runtime, or a baseline in PyTorch.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    wanted, left_out = _wanted(candidates, runtimes)
    opened, runs, starts = [], [], []
    for candidate, runtime in wanted:
        try:
            run = runtime.open(candidate.folder, protocol.threads, protocol.batch)
        except UserError as error:
            if runtime in SURE:
                raise
            left_out.append({"variant": candidate.variant, "runtime": runtime.name, "reason": str(error)})
            say(f"left out: {error}")
            continue
        opened.append((candidate, runtime))
        runs.append(run)
        repeats = 3 if runtime in SURE else 1
        start = measure_fresh(runtime, candidate.folder, protocol.threads, protocol.batch, repeats)
        starts.append(asdict(start) | {"onnx_sha256": candidate.onnx_sha256})
    eager = {c.variant: index for index, (c, runtime) in enumerate(opened) if runtime is TORCH_EAGER}
    contenders = [
        Contender(
            c.variant,
            runtime.name,
            run,
            random_pixels(protocol.batch, c.image_size, protocol.seed),
            eager[c.baseline],
        )
        for (c, runtime), run in zip(opened, runs, strict=True)
    ]
    timed, state, windows = timed_run(contenders, starts, protocol, RunWatch.start, EnergyMeter(), say)
    machine = describe_machine(_packages(opened)) | state
    result = {"started": started, **timed, "machine": machine, "left_out": left_out}
    soak_windows = []
    if soaked is not None:
        candidate, images, plan = soaked
        say(f"soak: {candidate.variant}, {plan.seconds / 60:g} minutes")
        run = ONNXRUNTIME.open(candidate.folder, protocol.threads, 1)
        soak_windows = soak(run, list(images[:, None]), plan, lambda: machine_state() | {"rss_bytes": rss_bytes()})
    return Timing(result, windows, soak_windows)


def refuse_many_threads(threads: int, cores: int) -> None:
    """Raise a `UserError` where threads would take turns on a core: their times would be the scheduler's."""
    if threads > cores:
        raise UserError(
            f"edge_benchmark.threads = {threads}: this process may use {cores} core{'s' * (cores != 1)}: lower it"
        )


def _wanted(candidates: Sequence[Candidate], runtimes: Sequence[str]) -> tuple[list[tuple[Candidate, Runtime]], list]:
    """What to open, and what cannot be for want of the runtime."""
    wanted, left_out = [], []
    dense = [candidate for candidate in candidates if candidate.variant == candidate.baseline]
    for runtime in (RUNTIMES[name] for name in dict.fromkeys((*runtimes, TORCH_EAGER.name))):
        if reason := not_installed(runtime):
            left_out.append({"variant": None, "runtime": runtime.name, "reason": reason})
            continue
        wanted += [(candidate, runtime) for candidate in (dense if runtime in TORCH else candidates)]
    return wanted, left_out


def _packages(opened: Sequence[tuple[Candidate, Runtime]]) -> tuple[str, ...]:
    """Whose versions go with the numbers."""
    return tuple(sorted({runtime.package for _, runtime in opened} | {"numpy"}))
