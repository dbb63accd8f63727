"""Read what the pipeline measured for the listed variants, and refuse what does not belong together."""

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import read_csv, read_json
from stages.params.quantizers import Bits
from stages.params.whole import Params

COUNTS = ("params", "params_nonzero", "params_visible", "macs", "macs_visible", "bops")
BYTES = ("artifact_bytes", "size_bytes", "size_gzip_bytes", "weight_bytes", "scale_bytes", "graph_bytes")
PROFILE_NUMBERS = (
    "seed",
    "n_test",
    "top1",
    "agreement",
    "validation_top1",
    "image_size",
    "input_size",
    *COUNTS,
    *BYTES,
)
PROFILE_TEXTS = ("variant", "model", "pruner", "quantizer", "onnx_sha256", "data_sha256", "data_name", "data_source")
EDGE_NUMBERS = (
    "latency_ms_p50",
    "latency_ms_p95",
    "latency_ms_min",
    "latency_ratio",
    "latency_ratio_low",
    "latency_ratio_high",
    "load_ms",
    "first_inference_ms",
    "peak_rss_bytes",
)
ONNX_RUNTIME, EAGER = "onnxruntime", "torch-eager"
CURVE_COLUMNS = ("epoch", "training_loss", "validation_top1")


@dataclass(frozen=True)
class Corrupted:
    """Of `model.onnx`, for corrupted test images; without cells where the run has none."""

    position: np.ndarray
    """`[n]` integers: which test images."""
    cells: list[tuple[str, int]]
    """Corruption and severity of each cell."""
    predicted: np.ndarray
    """`[cells, n]` integers."""

    def correct(self, labels: np.ndarray) -> np.ndarray:
        """`[cells, n]` bool, from the labels `[n_test]` of the test images."""
        return self.predicted == labels[self.position]

    def top1(self, labels: np.ndarray) -> float | None:
        """Mean over the cells; None without any."""
        return float(self.correct(labels).mean()) if self.predicted.size else None


@dataclass(frozen=True)
class Measured:
    """All that the stages say of one listed variant."""

    profile: dict
    """`profile.json`: flat, deterministic."""
    predicted: np.ndarray
    """`[n_test]` integers: the class that `model.onnx` gives each test image."""
    correct: np.ndarray
    """`[n_test]` bool."""
    confidence: np.ndarray
    """`[n_test]`: the probability that it gives that class."""
    corrupted: Corrupted
    layers: list[dict[str, str]]
    """`layers.csv`, one row for each layer."""
    description: dict
    """`model.json` of the compressed artifact."""
    edge: dict
    """Its row of `edge.json`."""


@dataclass(frozen=True)
class Run:
    """Everything the report is made from, checked to be of one run."""

    params: Params
    variants: dict[str, Measured]
    labels: np.ndarray
    """`[n_test]` integers, the same for all variants."""
    classes: list[str]
    edge: dict
    """`edge.json` without its rows: run id, machine, protocol."""
    timings: list[dict]
    """Every row of `edge.json` of a listed variant, in whatever runtime."""
    baselines: dict[str, dict]
    """For each model, the row that its variants' `latency_ratio` refers to: its dense float network in PyTorch eager,
    or on a device, where there is no PyTorch, in ONNX Runtime."""
    soak: list[dict[str, float | None]]
    """Windows of the soak; empty where there was none."""
    printed: dict | None
    """`printed.json`, where printed samples were made."""
    curves: dict[str, list[dict[str, float]]]
    """Training curves by run, dense models first; runs that trained nothing are left out."""
    benchmarks: list[dict]
    """What `tests/benchmarks/pruning.py` measured, one for each device; a machine and a time of its own."""

    @property
    def run_id(self) -> str:
        return str(self.edge["run_id"])

    @property
    def batch(self) -> int:
        """Images in each timed call."""
        return self.edge["protocol"].get("batch", 1)


def read_run(params: Params) -> Run:
    """Read the files of the listed variants, relative to the folder of `params.yaml`.

    Raises:
        UserError: if a file is missing or broken, or belongs to another data set, test set or run; it names the
            variant and the remedy.
    """
    edge = _read_edge(paths.EDGE / "edge.json")
    timed = {(row["variant"], row["runtime"]): row for row in edge["rows"]}
    variants, labels = {}, None
    for variant in params.variants:
        folder = paths.profile(variant)
        profile = _read_profile(folder / "profile.json", variant, params)
        label, predicted, confidence = _read_predictions(folder, variant)
        corrupted = _read_corrupted(folder, variant)
        labels = label if labels is None else labels
        first = next(iter(variants.values()), None)
        _refuse_other_images(variant, profile, label, predicted, labels, first)
        _refuse_other_corruptions(variant, corrupted, len(labels), first)
        row = timed.get((variant, ONNX_RUNTIME))
        if row is None:
            raise UserError(f"{variant}: {paths.EDGE / 'edge.json'} has no {ONNX_RUNTIME} row for it: run `dvc repro`")
        description = _read_description(folder / "model.json", variant)
        _refuse_mixed_runs(variant, profile, row, description)
        variants[variant] = Measured(
            profile,
            predicted,
            predicted == label,
            confidence,
            corrupted,
            _read_layers(folder / "layers.csv", variant),
            description,
            row,
        )
    baselines, runtime = {}, _baseline_runtime(edge)
    for model in params.models:
        row = timed.get((f"{model}-none-fp32", runtime))
        if row is None:
            raise UserError(
                f"{model}-none-fp32: {paths.EDGE / 'edge.json'} has no {runtime} row for it: run `dvc repro`"
            )
        baselines[model] = row
    classes = [str(name) for name in next(iter(variants.values())).profile["classes"]]
    header = {key: value for key, value in edge.items() if key != "rows"}
    return Run(
        params=params,
        variants=variants,
        labels=labels,
        classes=classes,
        edge=header,
        timings=[row for row in edge["rows"] if row["variant"] in params.variants],
        baselines=baselines,
        soak=_read_soak(params, edge),
        printed=_read_printed(params, variants),
        curves=_read_curves(params),
        benchmarks=_read_benchmarks(params),
    )


def _read_predictions(folder: Path, variant: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, predicted class and its probability of every test image, as the profile stage stored them."""
    arrays = _arrays(folder, "predictions.npz", variant, ("label", "predicted", "confidence"))
    label, predicted, confidence = (array.ravel() for array in arrays)
    if len(confidence) != len(predicted):
        raise UserError(
            f"{variant}: {folder / 'predictions.npz'} holds {len(predicted)} predictions and {len(confidence)}"
            f" probabilities: delete {folder} and run `dvc repro`"
        )
    return label.astype(np.int64), predicted.astype(np.int64), confidence.astype(np.float64)


def _read_corrupted(folder: Path, variant: str) -> Corrupted:
    keys = ("position", "corruption", "severity", "predicted")
    position, corruption, severity, predicted = _arrays(folder, "corruptions.npz", variant, keys)
    cells = [(str(name), int(level)) for name, level in zip(corruption, severity, strict=False)]
    return Corrupted(position.astype(np.int64), cells, predicted.astype(np.int64))


def _arrays(folder: Path, name: str, variant: str, keys: tuple[str, ...]) -> list[np.ndarray]:
    path = folder / name
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [np.asarray(stored[key]) for key in keys]
    except FileNotFoundError:
        raise UserError(f"{variant}: {path} is missing: run `dvc repro` to make it") from None
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise UserError(f"{variant}: {path} cannot be read ({error}): delete {folder} and run `dvc repro`") from None


def _read_layers(path: Path, variant: str) -> list[dict[str, str]]:
    try:
        layers = read_csv(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{variant}: {path} cannot be read ({error}): delete it and run `dvc repro`") from None
    if not layers:
        raise UserError(f"{variant}: {path} holds no layers: delete it and run `dvc repro`")
    return layers


def _read_profile(path: Path, variant: str, params: Params) -> dict:
    profile = _mapping(path, variant)
    _require(path, variant, profile, PROFILE_NUMBERS, PROFILE_TEXTS)
    if not isinstance(profile.get("classes"), list) or not profile["classes"]:
        raise UserError(f"{variant}: {path} lacks its class names: delete it and run `dvc repro`")
    expected = {
        "variant": variant,
        "model": params.model_of(variant),
        "pruner": params.pruner_of(variant),
        "quantizer": params.variants[variant].quantizer,
    }
    for key, value in expected.items():
        if profile[key] != value:
            raise UserError(f"{variant}: {path} says {key} = {profile[key]!r}, params.yaml {value!r}: run `dvc repro`")
    return profile


def _refuse_other_images(
    variant: str,
    profile: dict,
    label: np.ndarray,
    predicted: np.ndarray,
    labels: np.ndarray,
    first: Measured | None,
) -> None:
    n = profile["n_test"]
    if len(label) != n or len(predicted) != n:
        raise UserError(
            f"{variant}: {len(predicted)} predictions and {len(label)} labels stored, profile.json says n_test = {n}:"
            f" delete {paths.profile(variant)} and run `dvc repro`"
        )
    if abs(float((predicted == label).mean()) - profile["top1"]) > 0.5 / n:
        raise UserError(
            f"{variant}: the stored predictions give top-1 {(predicted == label).mean():.4f}, profile.json says"
            f" {profile['top1']:.4f}: delete {paths.profile(variant)} and run `dvc repro`"
        )
    if first is None:
        return
    if profile["data_sha256"] != first.profile["data_sha256"]:
        raise UserError(
            f"{variant}: measured on images {profile['data_sha256'][:12]}, {first.profile['variant']} on"
            f" {first.profile['data_sha256'][:12]}: a table holds one data set; run `dvc repro`"
        )
    if profile["classes"] != first.profile["classes"]:
        raise UserError(f"{variant}: other class names than {first.profile['variant']}: run `dvc repro`")
    if len(label) != len(labels):
        raise UserError(
            f"{variant}: {len(label)} test images, {first.profile['variant']} has {len(labels)}: run `dvc repro`"
        )
    if not np.array_equal(label, labels):
        raise UserError(
            f"{variant}: its test labels stand in another order than {first.profile['variant']}'s, so predictions"
            " cannot be paired: run `dvc repro`"
        )


def _refuse_other_corruptions(variant: str, corrupted: Corrupted, n_test: int, first: Measured | None) -> None:
    position, shape = corrupted.position, (len(corrupted.cells), len(corrupted.position))
    if corrupted.predicted.shape != shape or not ((position >= 0) & (position < n_test)).all():
        raise UserError(
            f"{variant}: corruptions.npz holds answers {list(corrupted.predicted.shape)} for {shape[0]} cells of"
            f" {shape[1]} test images: delete {paths.profile(variant)} and run `dvc repro`"
        )
    if first is None:
        return
    if corrupted.cells != first.corrupted.cells or not np.array_equal(position, first.corrupted.position):
        raise UserError(
            f"{variant}: answers to other corrupted images than {first.profile['variant']}'s: run `dvc repro`"
        )


def _refuse_mixed_runs(variant: str, profile: dict, row: dict, description: dict) -> None:
    stored = (description.get("onnx") or {}).get("sha256", profile["onnx_sha256"])
    for where, other in (("edge.json timed", row["onnx_sha256"]), ("model.json describes", stored)):
        if other != profile["onnx_sha256"]:
            raise UserError(
                f"{variant}: profile.json measured model.onnx {profile['onnx_sha256'][:12]}, {where} {str(other)[:12]}:"
                " mixing of runs is refused; run `dvc repro` so that all figures come from the same files"
            )


def _read_edge(path: Path) -> dict:
    edge = read_json(path)
    kinds = {"rows": list, "run_id": str, "machine": dict, "protocol": dict}
    if not isinstance(edge, dict) or not all(isinstance(edge.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} lacks one of {', '.join(kinds)}: delete it and run `dvc repro`")
    for row in edge["rows"]:
        variant = str(row.get("variant", "a row without a name")) if isinstance(row, dict) else "a broken row"
        _require(path, variant, row if isinstance(row, dict) else {}, EDGE_NUMBERS, ("variant", "runtime"))
        if row["latency_ms_p50"] <= 0:
            raise UserError(f"{variant}: {path} has a latency of {row['latency_ms_p50']} ms: delete it, `dvc repro`")
        if row["runtime"] == ONNX_RUNTIME:
            _require(path, variant, row, (), ("onnx_sha256",))
    return edge


def _baseline_runtime(edge: dict) -> str:
    """The one of the run: rows of before there were devices do not name it."""
    return next((row["baseline_runtime"] for row in edge["rows"] if "baseline_runtime" in row), EAGER)


def _read_soak(params: Params, edge: dict) -> list[dict[str, float | None]]:
    if params.edge_benchmark.soak is None:
        return []
    path, variant = paths.EDGE / "soak.csv", params.edge_benchmark.soak.variant
    if not isinstance(edge.get("soak"), dict) or edge["soak"].get("variant") != variant:
        raise UserError(f"{variant}: {paths.EDGE / 'edge.json'} holds no soak of it: run `dvc repro`")
    try:
        return [{key: float(value) if value else None for key, value in row.items()} for row in read_csv(path)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{variant}: {path} has a broken line ({error}): delete {paths.EDGE}, `dvc repro`") from None


def _read_printed(params: Params, variants: dict[str, Measured]) -> dict | None:
    if params.edge_benchmark.printed is None:
        return None
    path, variant = paths.EDGE / "printed.json", params.edge_benchmark.printed.variant
    printed = _mapping(path, variant)
    shares = (f"{key}{end}" for key in ("top1_printed", "top1_clean") for end in ("", "_ci_low", "_ci_high"))
    _require(path, variant, printed, ("n_images", "seed", "agreement", *shares), ("variant", "onnx_sha256"))
    profile = variants[variant].profile
    if printed["variant"] != variant or printed["onnx_sha256"] != profile["onnx_sha256"]:
        raise UserError(
            f"{variant}: {path} is about {printed['variant']}, model.onnx {printed['onnx_sha256'][:12]}, the profile"
            f" about {profile['onnx_sha256'][:12]}: run `dvc repro`"
        )
    return printed


def _read_description(path: Path, variant: str) -> dict:
    description = _mapping(path, variant)
    for key in ("name", "parent", "seed", "classes", "versions", "tensors"):
        if key not in description:
            raise UserError(f"{variant}: {path} lacks {key}: delete it and run `dvc repro`")
    return description


def _read_curves(params: Params) -> dict[str, list[dict[str, float]]]:
    files = {model: paths.dense_curve(model) for model in params.models}
    files |= {pruning: paths.pruned_curve(pruning) for pruning in params.pruned}
    recovered = [variant for variant in params.variants if _recovers(params, variant)]
    files |= {variant: paths.compressed_curve(variant) for variant in recovered}
    curves = {}
    for name, path in files.items():
        rows = read_csv(path)
        try:
            curves[name] = [{column: float(row[column]) for column in CURVE_COLUMNS} for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{name}: {path} has a broken line or column ({error}): delete it and run `dvc repro`"
            ) from None
    return {name: rows for name, rows in curves.items() if rows}


def _recovers(params: Params, variant: str) -> bool:
    quantizer = params.quantizers[params.variants[variant].quantizer]
    return isinstance(quantizer, Bits) and quantizer.epochs > 0


def _read_benchmarks(params: Params) -> list[dict]:
    found = [(path, read_json(path)) for path in sorted(params.pruning_benchmarks().glob("*.json"))]
    for path, benchmark in found:
        if not isinstance(benchmark, dict) or not {"machine", "step", "n", "whole_step"} <= benchmark.keys():
            raise UserError(f"{path} is not what tests/benchmarks/pruning.py writes: run it again with --out {path}")
    return [benchmark for _, benchmark in found]


def _mapping(path: Path, variant: str) -> dict:
    try:
        value = read_json(path)
    except UserError as error:
        raise UserError(f"{variant}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{variant}: {path} must hold an object: delete it and run `dvc repro`")
    return value


def _require(path: Path, variant: str, value: dict, numbers: tuple[str, ...], texts: tuple[str, ...]) -> None:
    for key in numbers:
        number = value.get(key)
        if isinstance(number, bool) or not isinstance(number, int | float) or not np.isfinite(number):
            raise UserError(f"{variant}: {path} has {key} = {number!r}, not a number: delete it and run `dvc repro`")
    for key in texts:
        if not isinstance(value.get(key), str) or not value[key]:
            raise UserError(f"{variant}: {path} lacks {key}: delete it and run `dvc repro`")
