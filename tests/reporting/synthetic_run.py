"""The files that the report stage reads, with made-up figures, written in a second."""

import hashlib
import json
from pathlib import Path

import numpy as np
import yaml
from sklearn.metrics import balanced_accuracy_score

from stages.params.load import load_params
from stages.reporting.edge import describe_run
from stages.reporting.inputs import CompletedRun, Params, read_run
from stages.reporting.page import render_page
from stages.reporting.rows import assemble_rows, choose, headline_metrics

CLASSES = ["plane", "car", "bird", "cat", "deer"]
ACCURACY = {"none": 0.8, "continued": 0.82, "oto50": 0.79, "l1": 0.6}
"""Fraction of images classified correctly, by pruner."""
SHRINK = {"none": 1.0, "continued": 1.0, "oto": 0.25, "l1_unstructured": 1.0, "random_unstructured": 1.0}
"""Fraction of the parameters that each pruning method leaves."""
SOAK = {
    **{"soak_seconds": 60.2, "soak_runs": 10_800, "latency_ms_p50": 1.21, "latency_ms_p99": 1.5, "late": 0, "wrong": 0},
    **{"slope_percent_per_hour": 3.0, "slope_percent_per_hour_low": -60.0, "slope_percent_per_hour_high": 66.0},
    **{"change_percent": 0.05, "change_percent_low": -1.0, "change_percent_high": 1.1, "rss_growth_bytes": 4096},
    **{"verdict": "stable", "reasons": [], "images_per_second": 0.0},
}
PRINTED = {
    **{"n_images": 1000, "seed": 0, "agreement": 0.91},
    **{"top1_printed": 0.842, "top1_printed_ci_low": 0.818, "top1_printed_ci_high": 0.863},
    **{"top1_clean": 0.861, "top1_clean_ci_low": 0.838, "top1_clean_ci_high": 0.881},
}
EDGE = {
    "runtimes": ["onnxruntime", "openvino", "torch-compile"],
    "soak": {"variant": "atto-oto50-int8", "minutes": 1.0},
    "printed": {"variant": "atto-oto50-int8"},
}
"""The section `edge_benchmark` with everything that it can measure."""


def params_of(
    seeds: int = 1,
    pruners: dict | None = None,
    variants: list[tuple[str, str]] | None = None,
    models: dict | None = None,
) -> dict:
    """A params file with one model under several seeds and the study's pruners and quantizers."""
    if pruners is None:
        pruners = {
            "none": {"method": "none"},
            "continued": {"method": "continued", "epochs": 4, "learning_rate_factor": 0.5},
            "oto50": {"method": "oto", "epochs": 4, "learning_rate_factor": 0.5, "group_sparsity": 0.5},
            "l1": {"method": "l1_unstructured", "epochs": 4, "learning_rate_factor": 0.5, "sparsity": 0.8},
        }
    if variants is None:
        variants = [(p, "fp32") for p in pruners] + [(p, "int8") for p in ("none", "oto50") if p in pruners]
    if models is None:
        network = {"library": "timm", "architecture": "convnext_atto", "input_size": 16}
        models = {"atto" + (f"-s{s}" if s else ""): network | {"seed": s} for s in range(seeds)}
    return {
        "base": {"seed": 0},
        "data": {"name": "toys", "source": "digits", "image_size": 16, "validation_fraction": 0.2},
        "finetune": {"epochs": 6, "batch_size": 32, "optimizer": "adamw", "learning_rate": 0.001},
        "models": models,
        "pruners": pruners,
        "quantizers": {"fp32": {"method": "fp32"}, "int8": {"method": "int8_dynamic"}},
        "pruned": {
            f"{m}-{p}": {"model": m, "pruner": p} for m in models for p in dict.fromkeys(p for p, _ in variants)
        },
        "variants": {f"{m}-{p}-{q}": {"pruned": f"{m}-{p}", "quantizer": q} for m in models for p, q in variants},
    }


def read() -> CompletedRun:
    """The run in the working folder."""
    return read_run(load_params(Params))


def page_of(run: CompletedRun, pictures: dict | None = None) -> str:
    """The page, by default without pictures, which take seconds to draw."""
    rows = assemble_rows(run)
    choices = choose(run, rows)
    return render_page(run, rows, describe_run(run), headline_metrics(rows, choices), choices, pictures or {})


def change_edge(folder: Path, **values) -> None:
    """Overwrite single values of edge.json."""
    path = folder / "reports/edge/edge.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_profile(folder: Path, variant: str, **values) -> None:
    """Overwrite single values of a variant's profile.json."""
    path = folder / "reports/profile" / variant / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_arrays(path: Path, change) -> None:
    """Rewrite a file of arrays with what `change` returns for the mapping of its arrays."""
    with np.load(path) as stored:
        np.savez_compressed(path, **change(dict(stored)))


def write_run(
    folder: Path,
    params: dict,
    n: int = 400,
    accuracy: dict[str, float] | None = None,
    classes: list[str] = CLASSES,
    threads: int = 1,
    left: dict[str, float] | None = None,
) -> None:
    """Write params.yaml and everything the report stage reads under `folder`.

    Args:
        accuracy: fraction of images classified correctly, by pruner name (default 0.8). The images that two variants
            get wrong overlap, as real ones do.
        left: fraction of parameters and MACs that is left, by pruner name (default: that of its method).
    """
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    labels = np.arange(n) % len(classes)
    hardness = np.random.default_rng(0).random(n)
    rows = []
    for number, (variant, entry) in enumerate(params["variants"].items()):
        pruning, quantizer = params["pruned"][entry["pruned"]], params["quantizers"][entry["quantizer"]]["method"]
        method, random = params["pruners"][pruning["pruner"]]["method"], np.random.default_rng(number + 1)
        wanted = (accuracy or {}).get(pruning["pruner"], 0.8)
        right = hardness + random.normal(0, 0.08, n) < np.quantile(hardness, wanted)
        predicted = np.where(right, labels, (labels + 1 + random.integers(0, len(classes) - 1, n)) % len(classes))
        onnx = hashlib.sha256(variant.encode()).hexdigest()
        share = (left or {}).get(pruning["pruner"], SHRINK.get(method, 1.0))
        int8 = quantizer == "int8_dynamic"
        parameters, macs = int(2_400_000 * share), int(90_000_000 * share)
        size = int(parameters * (1.1 if int8 else 4)) + 40_000 + 1_000 * number
        profile = {
            "variant": variant,
            "model": pruning["model"],
            "pruner": pruning["pruner"],
            "quantizer": entry["quantizer"],
            "seed": params["models"][pruning["model"]].get("seed", 0),
            "n_test": n,
            "top1": float((predicted == labels).mean()),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "agreement": 0.999 if int8 else 1.0,
            "n_validation": 200,
            "n_validation_smallest_class": 40,
            "params": parameters,
            "params_nonzero": int(parameters * (0.2 if "unstructured" in method else 1)),
            "params_visible": int(parameters * (0.06 if int8 else 1)),
            "macs": macs,
            "macs_visible": int(macs * (0.05 if int8 else 1)),
            "bops": macs * (64 if int8 else 1024),
            "artifact_bytes": size - 30_000,
            "size_bytes": size,
            "size_gzip_bytes": int(size * (0.4 if "unstructured" in method else 0.92)),
            **{"weight_bytes": size - 30_000, "scale_bytes": 4_000 if int8 else 0},
            "graph_bytes": 26_000 if int8 else 30_000,
            "validation_top1": round(float(wanted), 4),
            "validation_balanced_accuracy": round(float(wanted), 4),
            "validation_never_right": [],
            "onnx_sha256": onnx,
            "data_name": "toys",
            "data_source": "digits",
            "data_licence": "CC0",
            "data_sha256": "d" * 64,
            **{"image_size": 16, "geometry": "crop", "channels": 3},
            "input_size": 16,
            "classes": classes,
        }
        target = folder / "reports/profile" / variant
        target.mkdir(parents=True, exist_ok=True)
        (target / "profile.json").write_text(json.dumps(profile))
        np.savez_compressed(
            target / "predictions.npz",
            label=labels.astype(np.int32),
            predicted=predicted.astype(np.int32),
            confidence=np.clip(1 - 0.5 * hardness, 0.2, 1),
        )
        _write_corrupted(target / "corruptions.npz", labels, predicted, hardness, len(classes))
        (target / "layers.csv").write_text(f"layer,params,weight_bits\nstem,1200,{8 if int8 else 32}\nhead,64000,32\n")
        description = {
            "name": variant,
            "parent": {"name": entry["pruned"], "sha256": "a" * 64, "metrics": _cut_metrics(method, wanted)},
            "seed": profile["seed"],
            "classes": classes,
            "versions": {"torch": "2.11.0", "timm": "1.0.31"},
            "tensors": {"sha256": "b" * 64, "bytes": size - 30_000},
            "onnx": {"sha256": onnx, "bytes": size},
            "layers": {},
            "search": {},
        }
        (target / "model.json").write_text(json.dumps(description))
        rows.append(_timed(variant, "onnxruntime", 1.2 * share * (0.8 if int8 else 1) + 0.01 * number, onnx))
    asked = params.get("edge_benchmark", {}).get("runtimes", [])
    if "openvino" in asked:  # it runs all variants but the last
        openvino = [row | {"runtime": "openvino", "latency_ms_p50": row["latency_ms_p50"] / 2} for row in rows[:-1]]
        left_out = [{"variant": rows[-1]["variant"], "runtime": "openvino", "reason": "openvino does not run it: why"}]
        rows += openvino
    else:
        left_out = []
    left_out += [
        {"variant": None, "runtime": name, "reason": f"{name} is not installed: do this"}
        for name in asked
        if name not in ("onnxruntime", "openvino")
    ]
    rows += [_timed(f"{model}-none-fp32", "torch-eager", 8.0, "") for model in params["models"]]
    edge = {
        "run_id": "20240902-120000-abcdef",
        "started": "2024-09-02T12:00:00+00:00",
        "busy": False,
        "machine": {"cpu": "A CPU of the tests", "cores": 2, "onnxruntime": "1.20.0", "torch": "2.11.0"},
        "protocol": {"threads": threads, "windows": 10},
        "rows": rows,
        "left_out": left_out,
    }
    (folder / "reports/edge").mkdir(parents=True, exist_ok=True)
    _write_edge(folder / "reports/edge", edge, params)
    for kind, names in (
        ("dense", params["models"]),
        ("pruned", params["pruned"]),
        ("compressed", params["variants"]),
    ):
        for number, name in enumerate(names):
            epochs = 0 if kind == "compressed" or name.endswith("-none") else 6
            _write_curve(folder / f"reports/curves/{kind}/{name}.csv", epochs, number)


def _write_corrupted(path: Path, labels: np.ndarray, predicted: np.ndarray, hardness: np.ndarray, count: int) -> None:
    """Three corruptions of every second image; more of the hardest images fail with each severity."""
    position = np.arange(0, len(labels), 2)
    cells = [(name, severity) for name in ("noise", "blur", "JPEG") for severity in (1, 2, 3)]
    answers = [
        np.where(hardness[position] < 0.9 - 0.1 * severity, predicted[position], (labels[position] + 1) % count)
        for _, severity in cells
    ]
    np.savez_compressed(
        path,
        position=position,
        corruption=np.array([name for name, _ in cells]),
        severity=np.array([severity for _, severity in cells]),
        predicted=np.array(answers),
    )


def _write_edge(folder: Path, edge: dict, params: dict) -> None:
    """With the soak test and the printed samples that the params ask for."""
    wanted = params.get("edge_benchmark", {})
    if soak := wanted.get("soak"):
        windows = [
            {"seconds": 5.0 * (index + 1), "runs": 900, "latency_ms_p50": 1.2 + 0.01 * (index % 3)}
            | {"latency_ms_p95": 1.4, "latency_ms_p99": 1.5, "latency_ms_max": 2.0, "late": 0, "wrong": 0}
            | {"temperature_c": None, "rss_bytes": 90_000_000}
            for index in range(12)
        ]
        edge["soak"] = {**SOAK, **soak}
        lines = [",".join(windows[0])]
        lines += [",".join("" if value is None else str(value) for value in window.values()) for window in windows]
        (folder / "soak.csv").write_text("\n".join(lines) + "\n")
    if printed := wanted.get("printed"):
        row = next(row for row in edge["rows"] if row["variant"] == printed["variant"])
        (folder / "printed.json").write_text(json.dumps(PRINTED | printed | {"onnx_sha256": row["onnx_sha256"]}))
    (folder / "edge.json").write_text(json.dumps(edge))


def _cut_metrics(method: str, top1: float) -> dict[str, float]:
    """Metrics of the prune stage: an exact removal for `oto`, a costly one for the other structured pruners."""
    if method not in ("oto", "depgraph", "random_structured"):
        return {"validation_top1": top1}
    lost, difference = (0.0, 2e-7) if method == "oto" else (0.4, 0.9)
    return {
        "validation_top1": top1,
        "validation_top1_uncut": top1 - 0.02,
        "validation_top1_cut": top1 - 0.02 - lost,
        "cut_difference": difference,
    }


def _timed(variant: str, runtime: str, milliseconds: float, onnx: str) -> dict:
    ratio = 8.0 / milliseconds
    return {
        "variant": variant,
        "runtime": runtime,
        "latency_ms_p50": milliseconds,
        "latency_ms_p95": milliseconds * 1.2,
        "latency_ms_min": milliseconds * 0.9,
        "throughput_per_s": 1000 / milliseconds,
        "latency_ratio": ratio,
        "latency_ratio_low": ratio * 0.95,
        "latency_ratio_high": ratio * 1.05,
        "load_ms": 30.0,
        "first_inference_ms": 4.0,
        "peak_rss_bytes": 90_000_000,
        "onnx_sha256": onnx or None,
        "runs": 500,
    }


def _write_curve(path: Path, epochs: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    validation = "validation_loss,validation_top1,validation_balanced_accuracy"
    lines = [f"epoch,learning_rate,training_loss,{validation},images_per_second,seconds"]
    for epoch in range(1, epochs + 1):
        top1 = 0.8 - 0.5 / (epoch + number)
        lines.append(f"{epoch},0.001,{2 / epoch:.4f},{2.2 / epoch:.4f},{top1:.4f},{top1 - 0.1:.4f},400,2.5")
    path.write_text("\n".join(lines) + "\n")


def write_defects(folder: Path, params: dict, found: dict[str, int], metric: str = "top1") -> None:
    """As `write_run` with 20 defects among 2,000 parts, of which each pruner's variants find so many (default: none).

    Each found defect costs five false alarms. The validation figures are the same.
    """
    report = {"metric": metric, "headline_max_drop": 0.1}
    write_run(folder, params | {"report": report}, n=2000, classes=["ok", "defect"])
    labels = (np.arange(2000) % 100 == 0).astype(np.int64)
    for variant, entry in params["variants"].items():
        defects = found.get(params["pruned"][entry["pruned"]]["pruner"], 0)
        predicted = np.zeros_like(labels)
        predicted[np.flatnonzero(labels)[:defects]] = 1
        predicted[np.flatnonzero(labels == 0)[: 5 * defects]] = 1
        path = folder / "reports/profile" / variant
        change_arrays(path / "predictions.npz", lambda arrays, p=predicted: arrays | {"label": labels, "predicted": p})
        top1, balanced = float((predicted == labels).mean()), float(balanced_accuracy_score(labels, predicted))
        figures = {"top1": top1, "balanced_accuracy": balanced}
        figures |= {f"validation_{figure}": value for figure, value in figures.items()}
        never = ["defect"] if defects == 0 else []
        change_profile(folder, variant, **figures, validation_never_right=never, n_validation_smallest_class=4)
