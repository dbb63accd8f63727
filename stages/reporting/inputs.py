"""Read what the stages measured for the listed variants, and refuse files that do not belong together."""

import csv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import read_csv, read_json
from stages.params.edge_benchmark import EdgeBenchmark
from stages.params.models import Model
from stages.params.pruners import Pruner
from stages.params.quantizers import Bits, Quantizer
from stages.params.report import Report
from stages.params.section import Name
from stages.params.variants import Joins

ONNX_RUNTIME, EAGER = "onnxruntime", "torch-eager"
CURVE_COLUMNS = ("epoch", "training_loss", "validation_top1", "validation_balanced_accuracy")
Text = Annotated[str, Field(min_length=1)]
Number = int | float


class Params(Joins):
    """The sections of `params.yaml` that the report reads."""

    models: Annotated[dict[Name, Model], Field(min_length=1)]
    pruners: dict[Name, Pruner]
    quantizers: dict[Name, Quantizer]
    edge_benchmark: EdgeBenchmark = EdgeBenchmark()
    report: Report = Report()


class StoredFile(BaseModel):
    """A JSON file of another stage. Keys that the report does not read may be there too."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class ProfileFile(StoredFile):
    """`profile.json`: counts and accuracy of one variant; deterministic."""

    variant: Text
    model: Text
    pruner: Text
    quantizer: Text
    seed: int
    n_test: int
    n_validation: int
    n_validation_smallest_class: int
    top1: Number
    agreement: Number
    validation_top1: Number
    validation_balanced_accuracy: Number
    validation_never_right: list[str]
    params: int
    params_nonzero: int
    params_visible: int
    macs: Number
    macs_visible: Number
    bops: Number
    artifact_bytes: int
    size_bytes: int
    size_gzip_bytes: int
    weight_bytes: int
    scale_bytes: int
    graph_bytes: int
    image_size: int
    geometry: Text
    channels: int
    onnx_sha256: Text
    data_sha256: Text
    data_name: Text
    data_source: Text
    data_licence: str | None = None
    data_unreadable: int = 0
    classes: Annotated[list[str], Field(min_length=1)]
    top1_torch: Number | None = None
    quantized_operators: int = 0


class TimedRow(StoredFile):
    """A row of `edge.json`: one variant in one runtime."""

    variant: Text
    runtime: Text
    latency_ms_p50: Annotated[float, Field(gt=0)]
    latency_ms_p95: float
    latency_ratio: float
    latency_ratio_low: float
    latency_ratio_high: float
    load_ms: float
    peak_rss_bytes: Number
    onnx_sha256: str | None = None
    baseline_runtime: str = EAGER
    unsteady: bool = False


class EdgeFile(StoredFile):
    """`edge.json`: one interleaved run of all variants on one machine."""

    run_id: Text
    machine: dict[str, Any]
    protocol: dict[str, Any]
    rows: list[dict[str, Any]]


class PrintedFile(StoredFile):
    """`printed.json`: accuracy on simulated prints of test images, filmed by a simulated camera."""

    variant: Text
    onnx_sha256: Text
    n_images: int
    seed: int
    agreement: Number
    top1_printed: Number
    top1_printed_ci_low: Number
    top1_printed_ci_high: Number
    top1_clean: Number
    top1_clean_ci_low: Number
    top1_clean_ci_high: Number


class ArtifactFile(StoredFile):
    """`model.json` of a compressed artifact."""

    parent: dict[str, Any] | None
    versions: dict[str, Any]
    tensors: dict[str, Any]
    onnx: dict[str, Any] | None = None
    float_layers: list[str] = []
    search: dict[str, Any] = {}


@dataclass(frozen=True)
class Corrupted:
    """What `model.onnx` predicts for corrupted test images; without cells if the run tried no corruptions."""

    position: np.ndarray
    """`[n]` integers: the positions of the test images."""
    cells: list[tuple[str, int]]
    """Corruption and severity of each cell."""
    predicted: np.ndarray
    """`[cells, n]` integers."""

    def correct(self, labels: np.ndarray) -> np.ndarray:
        """`[cells, n]` bool, given the labels `[n_test]` of the test images."""
        return self.predicted == labels[self.position]

    def top1(self, labels: np.ndarray) -> float | None:
        """Mean over the cells; None without any."""
        return float(self.correct(labels).mean()) if self.predicted.size else None


@dataclass(frozen=True)
class Measured:
    """Everything the stages measured for one variant."""

    profile: ProfileFile
    label: np.ndarray
    """`[n_test]` integers: the true class of each test image."""
    predicted: np.ndarray
    """`[n_test]` integers: the class that `model.onnx` predicts."""
    confidence: np.ndarray
    """`[n_test]`: the probability of the predicted class."""
    corrupted: Corrupted
    layers: list[dict[str, str]]
    """`layers.csv`, one row for each layer."""
    artifact: ArtifactFile
    edge: TimedRow
    """The variant in ONNX Runtime."""

    @cached_property
    def correct(self) -> np.ndarray:
        """`[n_test]` bool."""
        return self.predicted == self.label

    @cached_property
    def by_class(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays `[classes]` of integers: test images that are classified correctly, and all test images."""
        classes = len(self.profile.classes)
        right = np.bincount(self.label[self.correct], minlength=classes)
        return right, np.bincount(self.label, minlength=classes)

    @property
    def worst_classes(self) -> list[int]:
        """The classes that have test images, those with the lowest recall first; ties go to more images."""
        right, images = self.by_class
        order = np.lexsort((-images, right / np.maximum(images, 1)))
        return order[images[order] > 0].tolist()


@dataclass(frozen=True)
class CompletedRun:
    """Everything the report is made from; all files belong to one run."""

    params: Params
    variants: dict[str, Measured]
    labels: np.ndarray
    """`[n_test]` integers, the same for all variants."""
    classes: list[str]
    edge: dict[str, Any]
    """`edge.json` without its rows: run id, machine, protocol."""
    timings: list[TimedRow]
    """The rows of the listed variants in every runtime."""
    baselines: dict[str, TimedRow]
    """For each model, its dense float network in the runtime that every `latency_ratio` refers to: PyTorch eager, or
    ONNX Runtime on a device without PyTorch."""
    soak: list[dict[str, Any]]
    """Time windows of the soak test; empty without one."""
    printed: dict[str, Any] | None
    """`printed.json`, if the params ask for printed samples."""
    curves: dict[str, list[dict[str, Any]]]
    """Training curves by name, dense models first; without those that trained nothing."""

    @property
    def run_id(self) -> str:
        return str(self.edge["run_id"])

    @property
    def batch(self) -> int:
        """Images in each timed call."""
        return self.edge["protocol"].get("batch", 1)

    @property
    def first(self) -> Measured:
        return next(iter(self.variants.values()))


def read_run(params: Params) -> CompletedRun:
    """Read the files of the listed variants, relative to the folder of `params.yaml`.

    Raises:
        UserError: if a file is missing or broken, or belongs to another data set, test set or run. The message names
            the variant and the remedy.
    """
    path = paths.EDGE / "edge.json"
    edge = _parsed(EdgeFile, path, "edge")
    timings = [_parsed(TimedRow, path, str(row.get("variant", "a row")), row) for row in edge.rows]
    timed = {(row.variant, row.runtime): row for row in timings}

    def timing(variant: str, runtime: str) -> TimedRow:
        if (variant, runtime) not in timed:
            raise UserError(f"{variant}: {path} has no {runtime} row for it: run `dvc repro`")
        return timed[variant, runtime]

    variants: dict[str, Measured] = {}
    for variant in params.variants:
        measured = _read_variant(variant, timing(variant, ONNX_RUNTIME))
        first = next(iter(variants.values()), measured)
        for reason in _mismatches(variant, params, measured, first):
            raise UserError(
                f"{variant}: {reason}: delete {paths.profile(variant)} if this repeats, and run `dvc repro`"
            )
        variants[variant] = measured
    runtime = next((row.baseline_runtime for row in timings if "baseline_runtime" in row.model_fields_set), EAGER)
    stored = read_json(path)
    return CompletedRun(
        params=params,
        variants=variants,
        labels=first.label,
        classes=first.profile.classes,
        edge={key: value for key, value in stored.items() if key != "rows"},
        timings=[row for row in timings if row.variant in params.variants],
        baselines={model: timing(f"{model}-none-fp32", runtime) for model in params.models},
        soak=_read_soak(params, stored),
        printed=_read_printed(params, variants),
        curves=_read_curves(params),
    )


def _read_variant(variant: str, edge: TimedRow) -> Measured:
    folder = paths.profile(variant)
    label, predicted, confidence = _arrays(folder, "predictions.npz", variant, ("label", "predicted", "confidence"))
    keys = ("position", "corruption", "severity", "predicted")
    position, corruption, severity, answers = _arrays(folder, "corruptions.npz", variant, keys)
    cells = [(str(name), int(level)) for name, level in zip(corruption, severity, strict=False)]
    return Measured(
        _parsed(ProfileFile, folder / "profile.json", variant),
        label.astype(np.int64),
        predicted.astype(np.int64),
        confidence.astype(np.float64),
        Corrupted(position.astype(np.int64), cells, answers.astype(np.int64)),
        _csv(folder / "layers.csv", variant, {}),
        _parsed(ArtifactFile, folder / "model.json", variant),
        edge,
    )


def _arrays(folder: Path, name: str, variant: str, keys: tuple[str, ...]) -> list[np.ndarray]:
    path = folder / name
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [np.asarray(stored[key]) for key in keys]
    except FileNotFoundError:
        raise UserError(f"{variant}: {path} is missing: run `dvc repro`") from None
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{variant}: {path} cannot be read ({error}): delete {folder} and run `dvc repro`") from None


def _mismatches(variant: str, params: Params, measured: Measured, first: Measured) -> Iterator[str]:
    """Reasons why the files of a variant contradict each other, the params, or the first variant."""
    ours, theirs, name = measured.profile, first.profile, first.profile.variant
    expected = {"variant": variant, "model": params.model_of(variant), "pruner": params.pruner_of(variant)}
    for key, value in (expected | {"quantizer": params.variants[variant].quantizer}).items():
        if getattr(ours, key) != value:
            yield f"profile.json says {key} = {getattr(ours, key)!r}, params.yaml {value!r}"
    counts = [len(array) for array in (measured.label, measured.predicted, measured.confidence)]
    if counts != [ours.n_test] * 3:
        yield f"labels, predictions and probabilities are of {counts} test images, profile.json says {ours.n_test}"
    if abs(float(measured.correct.mean()) - ours.top1) > 0.5 / ours.n_test:
        yield f"the predictions give top-1 {measured.correct.mean():.4f}, profile.json says {ours.top1:.4f}"
    if ours.data_sha256 != theirs.data_sha256 or ours.classes != theirs.classes:
        yield f"measured on images {ours.data_sha256[:12]}, {name} on {theirs.data_sha256[:12]}, not on one data set"
    if ours.n_test != theirs.n_test:
        yield f"{ours.n_test} test images, {name} has {theirs.n_test}"
    if not np.array_equal(measured.label, first.label):
        yield f"its test labels are in another order than {name}'s, so predictions cannot be paired"
    corrupted, other = measured.corrupted, first.corrupted
    position, shape = corrupted.position, (len(corrupted.cells), len(corrupted.position))
    if corrupted.predicted.shape != shape or not ((position >= 0) & (position < ours.n_test)).all():
        yield (
            f"corruptions.npz holds predictions {list(corrupted.predicted.shape)} for {shape[0]} cells of {shape[1]}"
            " test images"
        )
    if corrupted.cells != other.cells or not np.array_equal(position, other.position):
        yield f"tested on other corrupted images than {name}"
    described = (measured.artifact.onnx or {}).get("sha256", ours.onnx_sha256)
    for where, found in (("edge.json timed", measured.edge.onnx_sha256), ("model.json describes", described)):
        if found != ours.onnx_sha256:
            yield (
                f"profile.json measured model.onnx {ours.onnx_sha256[:12]}, {where} {str(found)[:12]}: these files are"
                " of different runs"
            )


def _csv(path: Path, name: str, columns: dict[str, Callable[[str], Any]]) -> list[dict[str, Any]]:
    """All rows of a file, with the values of the given columns converted."""
    try:
        rows = read_csv(path)
        return [row | {column: convert(row[column]) for column, convert in columns.items()} for row in rows]
    except (UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: {path} cannot be read ({error!r}): delete it and run `dvc repro`") from None


def _read_soak(params: Params, edge: dict[str, Any]) -> list[dict[str, Any]]:
    if params.edge_benchmark.soak is None:
        return []
    variant = params.edge_benchmark.soak.variant
    if not isinstance(edge.get("soak"), dict) or edge["soak"].get("variant") != variant:
        raise UserError(f"{variant}: {paths.EDGE / 'edge.json'} holds no soak test of it: run `dvc repro`")
    return _csv(paths.EDGE / "soak.csv", variant, dict.fromkeys(("seconds", "latency_ms_p50", "latency_ms_p99"), float))


def _read_printed(params: Params, variants: dict[str, Measured]) -> dict[str, Any] | None:
    if params.edge_benchmark.printed is None:
        return None
    path, variant = paths.EDGE / "printed.json", params.edge_benchmark.printed.variant
    printed, profiled = _parsed(PrintedFile, path, variant), variants[variant].profile.onnx_sha256
    if printed.variant != variant or printed.onnx_sha256 != profiled:
        raise UserError(
            f"{variant}: {path} describes {printed.variant}, model.onnx {printed.onnx_sha256[:12]}, the profile"
            f" {profiled[:12]}: run `dvc repro`"
        )
    return printed.model_dump()


def _read_curves(params: Params) -> dict[str, list[dict[str, Any]]]:
    files = {model: paths.dense_curve(model) for model in params.models}
    files |= {name: paths.pruned_curve(name) for name in params.pruned}
    for name, variant in params.variants.items():
        quantizer = params.quantizers[variant.quantizer]
        if isinstance(quantizer, Bits) and quantizer.epochs > 0:
            files[name] = paths.compressed_curve(name)
    curves = {name: _csv(path, name, dict.fromkeys(CURVE_COLUMNS, float)) for name, path in files.items()}
    return {name: rows for name, rows in curves.items() if rows}


Parsed = TypeVar("Parsed", bound=StoredFile)


def _parsed(kind: type[Parsed], path: Path, variant: str, value: object = None) -> Parsed:
    """The file (or a part of it, where `value` is given), checked; errors name variant, file and key."""
    try:
        return kind.model_validate(read_json(path) if value is None else value)
    except UserError as error:
        raise UserError(f"{variant}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "its content"
        raise UserError(f"{variant}: {path}: {key}: {first['msg'].lower()}: delete it and run `dvc repro`") from None
