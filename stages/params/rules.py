"""Rules that join several keys of a section, and the message of each.

The rules only refuse; they change no value. So no stage's result depends on this module, and `dvc.yaml` does not list
it: a better message retrains nothing.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from stages.params.base import Base
from stages.params.budget import Budget
from stages.params.data import Data
from stages.params.edge_benchmark import SSH_TARGET, EdgeBenchmark, Soak
from stages.params.finetune import Finetune
from stages.params.models import Model
from stages.params.pruners import Depgraph, Importance, Oto, Scheduled, SmallDense, Structured, Unstructured
from stages.params.quantizers import AllocatedBits, Bits, Int8Static, LearnedBits, UniformBits
from stages.params.section import Section


def problems_in(section: Section, where: str = "") -> list[str]:
    """One line for each broken rule of a section and the sections within it.

    Args:
        where: the section's path in the file.
    """
    prefix = f"{where}: " if where else ""
    problems = [
        f"{where}.{problem}" if isinstance(problem, _Idle) else f"{prefix}{problem}"
        for kind, rule in RULES.items()
        if isinstance(section, kind)
        for problem in rule(section)
    ]
    for name, value in section:
        path = f"{where}.{name}" if where else name
        if isinstance(value, Section):
            problems += problems_in(value, path)
        elif isinstance(value, dict):
            for key, entry in value.items():
                problems += problems_in(entry, f"{path}.{key}") if isinstance(entry, Section) else []
    return problems


class _Idle(str):
    """A problem that begins with its key instead of standing for the whole section."""


def _idle(section: Section, beside: str, *keys: str) -> Iterator[str]:
    """Refuse keys that are given and would do nothing beside another setting."""
    for key in keys:
        if key in section.model_fields_set:
            yield _Idle(f"{key} = {getattr(section, key)!r}: does nothing with {beside}: leave it out")


def _joins(section: Section) -> Iterator[str]:
    """Refuse entries that name what another section does not list, and keys that are not their joined parts."""
    for place, value, target in _names(section):
        known = getattr(section, target, None)
        if known is not None and value not in known:
            yield f"{place} = {value!r}: not listed under {target} ({', '.join(known) or 'which is empty'})"
    for owner, names in JOINS.items():
        for key, entry in _entries(section, owner):
            if key != (joined := "-".join(getattr(entry, name) for name in names)):
                yield f"{owner}.{key}: the key must be its joined parts, {joined!r}"


def _names(section: Section) -> Iterator[tuple[str, str, str]]:
    """Each name of an entry of another section: its place, the name, and the section that has to list it."""
    for owner, names in JOINS.items():
        for key, entry in _entries(section, owner):
            for name, target in names.items():
                yield f"{owner}.{key}.{name}", getattr(entry, name), target
    if isinstance(edge := getattr(section, "edge_benchmark", None), EdgeBenchmark):
        for key, test in (("soak", edge.soak), ("printed", edge.printed)):
            if test is not None:
                yield f"edge_benchmark.{key}.variant", test.variant, "variants"


def _entries(section: Section, owner: str) -> Iterable[tuple[str, Any]]:
    entries = getattr(section, owner, None)
    return entries.items() if isinstance(entries, dict) else ()


JOINS = {
    "pruned": {"model": "models", "pruner": "pruners"},
    "variants": {"pruned": "pruned", "quantizer": "quantizers"},
}
"""Keys of entries that name an entry of another section."""


def _base(section: Base) -> Iterator[str]:
    try:
        program, *options = shlex.split(section.launcher) or [""]
    except ValueError as error:
        yield _Idle(f"launcher = {section.launcher!r}: {str(error).lower()}")
        return
    if not (program == "torchrun" or (program == "python" and not options)):
        yield _Idle(
            f"launcher = {section.launcher!r}: must be python, or torchrun with its options"
            " (torchrun --nproc-per-node 2)"
        )


def _data(section: Data) -> Iterator[str]:
    if section.source in ("parquet", "folder") and not section.location:
        yield f"source: {section.source} needs a location (a folder, a file or a URL)"
    if section.levels and section.levels[0] >= section.levels[1]:
        yield _Idle(f"levels = {section.levels}: black must be less than white")
    if section.source == "digits" and section.location is not None:
        yield from _idle(section, "source: digits", "location")


def _finetune(section: Finetune) -> Iterator[str]:
    if (section.mixup or section.cutmix) and section.batch_size % 2:
        yield f"batch_size = {section.batch_size}: mixup and cutmix pair images, so it must be even"
    if section.random_resized_crop:
        yield from _idle(section, f"random_resized_crop: {section.random_resized_crop}", "crop_padding")
    if section.optimizer != "muon":
        muon = ("muon_learning_rate", "muon_weight_decay", "muon_iterations")
        yield from _idle(section, f"optimizer: {section.optimizer}", *muon)


def _model(section: Model) -> Iterator[str]:
    if section.weights != "pretrained":
        yield from _idle(section, f"weights: {section.weights}", "weights_tag")
    if section.weights == "none" and section.normalization == "weights":
        yield "normalization = 'weights': there are none (weights: none)"
    if section.weights == "none" and section.epochs == 0:
        yield "epochs = 0: weights: none leaves nothing to take as it is"


def _budget(section: Budget) -> Iterator[str]:
    if section.epochs and not section.distillation:
        yield from _idle(section, "distillation: 0", "distillation_temperature")


def _importance(section: Importance) -> Iterator[str]:
    if not any(section.model_dump().values()):
        yield "at least one weight must be above 0"


def _structured(section: Structured) -> Iterator[str]:
    if len(section.target) != 1:
        given = ", ".join(section.target) or "none"
        yield f"give one of group_sparsity, params_reduction and macs_reduction (given: {given})"


def _scheduled(section: Scheduled) -> Iterator[str]:
    if section.start_fraction >= section.end_fraction:
        yield "start_fraction must be less than end_fraction"


def _needs_recovery(section: Oto | Depgraph) -> Iterator[str]:
    """Refuse settings that leave no whole epoch after a cut that changes the output, whatever the number of steps."""
    if section.epochs == 1 or section.end_fraction == 1:
        yield (
            f"{section.inexact} changes the output when channels are cut, and end_fraction {section.end_fraction} of"
            f" epochs {section.epochs} leaves no whole epoch to recover: set epochs: 2 or more and end_fraction below 1"
        )


def _oto(section: Oto) -> Iterator[str]:
    others = ("penalty", "penalty_limit", "half_space") if section.optimizer == "hesso" else ("pruning_periods",)
    yield from _idle(section, f"optimizer: {section.optimizer}", *others)
    if section.inexact and any(section.target.values()):
        yield from _needs_recovery(section)
    if section.optimizer == "dhspg" and section.penalty > section.penalty_limit:
        yield (
            f"penalty {section.penalty} is above penalty_limit {section.penalty_limit}: lower the penalty or raise the"
            " limit"
        )


def _small_dense(section: SmallDense) -> Iterator[str]:
    yield from _idle(section, "method: small_dense", "layer_norm")


def _depgraph(section: Depgraph) -> Iterator[str]:
    yield from _idle(section, "method: depgraph", "allow_partial")
    if section.importance == "magnitude":
        yield from _idle(section, "importance: magnitude", "penalty", "start_fraction", "end_fraction")
    else:
        yield from _needs_recovery(section)


def _unstructured(section: Unstructured) -> Iterator[str]:
    if section.schedule == "one_shot":
        yield from _idle(section, "schedule: one_shot", "pruning_periods", "start_fraction", "end_fraction")
    if section.pattern == "2:4" and (section.sparsity != 0.5 or section.scope != "layer"):
        yield "pattern 2:4 zeroes half of every layer: set sparsity: 0.5 and scope: layer"
    elif section.pattern == "2:4" and section.schedule == "gradual":
        yield "pattern 2:4 is chosen at once: set schedule: one_shot, or pattern: none"


def _int8_static(section: Int8Static) -> Iterator[str]:
    if section.calibration != "percentile":
        yield from _idle(section, f"calibration: {section.calibration}", "percentile")


def _bits(section: Bits) -> Iterator[str]:
    if not section.epochs:
        yield from _idle(section, "epochs: 0", "learning_rate_factor", "distillation", "distillation_temperature")
    elif section.rounding == "gptq":
        yield (
            f"rounding: gptq with epochs: {section.epochs}: recovery rounds to nearest in every step, so the result of"
            " gptq would be lost: leave out one of the two"
        )


def _uniform_bits(section: UniformBits) -> Iterator[str]:
    if section.rounding == "nearest":
        yield from _idle(section, "rounding: nearest", "calibration_images", "calibration_seed")


def _allocated_bits(section: AllocatedBits) -> Iterator[str]:
    lowest, highest = section.choices[0], section.choices[-1]
    if sorted(set(section.choices)) != section.choices:
        yield "choices must rise, each once"
    elif section.average_bits < lowest:
        yield (
            f"average_bits = {section.average_bits} is under the {lowest} bits that every layer needs by choices: raise"
            " it, or allow fewer bits"
        )
    elif section.average_bits >= highest:
        yield (
            f"average_bits = {section.average_bits} leaves nothing to choose, since every layer may have {highest}"
            " bits, the most in choices: lower it, or use uniform_bits"
        )


def _learned_bits(section: LearnedBits) -> Iterator[str]:
    if section.evaluations < 2 * section.samples:
        yield (
            f"evaluations = {section.evaluations} leaves the controller nothing to try after its first step, which"
            f" takes samples = {section.samples}: set it to {2 * section.samples} or more, or lower samples"
        )


def _soak(section: Soak) -> Iterator[str]:
    seconds, window, rate = 60 * section.minutes, section.window_seconds, section.images_per_second
    if seconds < section.FEWEST_WINDOWS * window:
        yield (
            f"{seconds:g} s in windows of {window:g} s: it needs at least {section.FEWEST_WINDOWS} windows: raise"
            " minutes, or lower window_seconds"
        )
    if rate and rate * window < 1:
        yield f"at {rate:g} images_per_second windows of {window:g} s would be empty: raise window_seconds"


def _edge_benchmark(section: EdgeBenchmark) -> Iterator[str]:
    found = SSH_TARGET.fullmatch(section.target)
    if section.target != "local" and not (found and (found["port"] is None or 0 < int(found["port"]) < 65536)):
        yield _Idle(
            f"target = {section.target!r}: must be local or ssh://user@host[:port] with a port from 1 to 65535 (give an"
            " IPv6 address a name in ~/.ssh/config)"
        )
    if "onnxruntime" not in section.runtimes:
        yield "runtimes must hold onnxruntime, the runtime of the bundle"
    if len(set(section.runtimes)) < len(section.runtimes):
        yield "runtimes: each once"
    if section.affinity is not None:
        if len(set(section.affinity)) < len(section.affinity):
            yield "affinity: each core once"
        elif len(section.affinity) < section.threads:
            yield (f"affinity names {len(section.affinity)} cores for {section.threads} threads: they would take turns")


RULES: dict[type[Section], Callable[..., Iterator[str]]] = {
    Section: _joins,
    Base: _base,
    Data: _data,
    Finetune: _finetune,
    Model: _model,
    Budget: _budget,
    Importance: _importance,
    Structured: _structured,
    Scheduled: _scheduled,
    Oto: _oto,
    SmallDense: _small_dense,
    Depgraph: _depgraph,
    Unstructured: _unstructured,
    Int8Static: _int8_static,
    Bits: _bits,
    UniformBits: _uniform_bits,
    AllocatedBits: _allocated_bits,
    LearnedBits: _learned_bits,
    Soak: _soak,
    EdgeBenchmark: _edge_benchmark,
}
