"""The model card of a variant: Markdown with the Hugging Face hub's metadata in front."""

import yaml

from stages.reporting.bits import float_layers
from stages.reporting.edge import marks_of
from stages.reporting.inputs import Run
from stages.reporting.rows import Group, baseline_words, control_of, group_of
from stages.reporting.text import bytes_text, count_text, difference_text, ms_text, percent_text, ratio_text

LOADING = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

classes = {classes}
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGBA")  # upright; of 16 bits: see predict.py
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)  # white under what is transparent
pixels = np.asarray(image.convert("RGB").resize(({size}, {size}), Image.Resampling.BILINEAR))[None]  # uint8 NHWC
logits = session.run(None, {{"pixels": pixels}})[0][0]
print(classes[int(logits.argmax())])
"""


def card(run: Run, row: dict, groups: dict[str, Group]) -> str:
    """The card of the variant of `row`, a string that ends in a newline."""
    variant, measured = row["variant"], run.variants[row["variant"]]
    front_matter = yaml.safe_dump(_metadata(run, row), sort_keys=False, allow_unicode=True, width=1000)
    pruner, quantizer = _settings(run, variant)
    model = run.params.models[row["model"]]
    size = int(measured.profile["image_size"])
    sections = [
        f"---\n{front_matter}---",
        f"# {variant}",
        f"An image classifier for {len(run.classes)} classes ({_listed(run.classes)}), compressed for edge CPUs by the"
        f" Edgewise pipeline: {model.library} `{model.architecture}`, pruner {pruner}, quantizer {quantizer}."
        f" `model.onnx` takes uint8 RGB pixels `[N, {size}, {size}, 3]` under the name `pixels` and gives logits.",
        "## Load it",
        f"```python\n{LOADING.format(classes=run.classes, size=size)}```",
        "## Numbers",
        _numbers(run, row, groups),
        "## Data",
        _data(run, row),
        "## Lineage",
        _lineage(run, row),
        "## Limits",
        _limits(run, row),
        "## Licences",
        _licences(run, row),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(run: Run, row: dict) -> dict:
    """Keys of the hub's card metadata (its model card specification), for search and leaderboards."""
    profile = run.variants[row["variant"]].profile
    return {
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "license": "other",
        "license_name": "see-the-section-licences",
        "tags": ["edge", "model-compression", "onnxruntime", row["pruner"], row["quantizer"]],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": row["variant"],
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": profile["data_name"], "type": profile["data_name"], "split": "test"},
                        "metrics": [{"type": "accuracy", "value": round(row["top1"], 6), "name": "top-1"}],
                    }
                ],
            }
        ],
    }


def _numbers(run: Run, row: dict, groups: dict[str, Group]) -> str:
    machine, kept = machine_text(run), float_layers(run, row["variant"])
    lines = [
        "| | |",
        "|---|---|",
        f"| test top-1 | {percent_text(row['top1'], 2)} ({percent_text(run.params.report.confidence, 0)} Wilson"
        f" interval {percent_text(row['top1_ci_low'], 2)} to {percent_text(row['top1_ci_high'], 2)},"
        f" n = {row['n_test']:,}) |",
    ]
    group = groups[group_of(run.params, row["variant"])]
    seeds = len(group.variants)
    pooled = f", pooled over {seeds} seeds" if seeds > 1 else ""
    baseline, control = run.params.baseline_of(row["variant"]), control_of(run.params, row["variant"])
    if group.difference is not None:
        lines.append(f"| against {baseline}{pooled} | {difference_text(group.difference, group.p_value)} |")
    if group.control is not None:
        lines.append(
            f"| against {control}, the control that trained as long{pooled} |"
            f" {difference_text(group.control, group.control_p_value)} |"
        )
    if group.top1_deviation is not None:
        lines.append(
            f"| over {seeds} seeds | {percent_text(group.top1, 2)} \N{PLUS-MINUS SIGN}"
            f" {100 * group.top1_deviation:.2f} (standard deviation) |"
        )
    lines.append(f"| calibration error | {percent_text(row['calibration_error'], 2)} (15 bins) |")
    if row["corrupted_top1"] is not None:
        corrupted = run.variants[row["variant"]].corrupted
        names = ", ".join(dict.fromkeys(name for name, _ in corrupted.cells))
        lines.append(
            f"| top-1 on corrupted images | {percent_text(row['corrupted_top1'])}, the mean over {names} at growing"
            f" severities ({len(corrupted.cells)} times {len(corrupted.position):,} test images) |"
        )
    lines += [
        f"| model.onnx | {bytes_text(row['size_bytes'])}, gzip {bytes_text(row['size_gzip_bytes'])} |",
        f"| parameters | {count_text(row['params'])}, of which not zero {count_text(row['params_nonzero'])} |",
        *([f"| layers left in float | {len(kept)}: {', '.join(kept)} |"] if kept else []),
        f"| multiply-accumulates | {count_text(row['macs'])} for one image |",
        f"| latency, batch {run.batch} | median {ms_text(row['latency_ms_p50'])}, p95 {ms_text(row['latency_ms_p95'])},"
        f" {ratio_text(row['latency_ratio'])} as fast as the dense network in"
        f" {baseline_words(run)} |",
        f"| memory, start-up | {bytes_text(row['peak_rss_bytes'])} peak resident, {ms_text(row['load_ms'])} to load |",
        f"| measured with | {row['runtime']} on {machine} |",
    ]
    return "\n".join(lines)


def _data(run: Run, row: dict) -> str:
    profile = run.variants[row["variant"]].profile
    left_out = profile.get("data_unreadable", 0)
    return (
        f"{profile['data_name']} (source: {profile['data_source']}), {profile['image_size']} px, sha256"
        f" `{profile['data_sha256']}`. Epochs and variants were chosen on a validation part of the training data; the"
        f" {row['n_test']:,} test images had no part in training or choice."
        + (f" {left_out:,} images that could not be read were left out." if left_out else "")
    )


def _lineage(run: Run, row: dict) -> str:
    measured = run.variants[row["variant"]]
    description = measured.description
    lines = [f"- model.onnx: sha256 `{measured.profile['onnx_sha256']}`"]
    if description["tensors"].get("sha256"):
        lines.append(f"- model.safetensors: sha256 `{description['tensors']['sha256']}`")
    if description["parent"]:
        lines.append(
            f"- made from {description['parent']['name']}: sha256 of its model.json `{description['parent']['sha256']}`"
        )
    lines.append(f"- seed {row['seed']}, run {run.run_id}")
    lines.append("- made with " + ", ".join(f"{name} {version}" for name, version in description["versions"].items()))
    return "\n".join(lines)


def _limits(run: Run, row: dict) -> str:
    lines = [
        f"- Knows its {len(run.classes)} classes only and gives one of them for any picture; logits are not calibrated"
        " probabilities.",
        f"- The accuracy is that of {run.variants[row['variant']].profile['data_name']}'s test images; other cameras,"
        " light or image sizes were not tested.",
        "- Latency and memory are those of the machine named; other machines differ, int8 most of all.",
        *(f"- {mark}" for mark in marks_of(run, [row["variant"]])),
    ]
    agreement = row["agreement"]
    if agreement < 1:
        lines.append(
            f"- model.onnx and the PyTorch artifact give the same class on {percent_text(agreement, 2)} of the test"
            " images."
        )
    return "\n".join(lines)


def _licences(run: Run, row: dict) -> str:
    profile, model = run.variants[row["variant"]].profile, run.params.models[row["model"]]
    if model.weights == "none":
        weights = "trained from random initialisation by this pipeline; no third party's weights are in them"
    elif model.weights == "pretrained":
        weights = (
            f"descend from {model.library}'s pre-trained `{model.architecture}`; the licence and the training data that"
            f" {model.library} states for it apply"
        )
    else:
        weights = f"descend from the file `{model.weights}`; its licence applies"
    return f"- data: {profile.get('data_licence') or 'not stated by its source'}\n- weights: {weights}"


def _settings(run: Run, variant: str) -> tuple[str, str]:
    """Pruner and quantizer, each as `oto50 (oto, epochs 4, group_sparsity 0.5)`."""
    pruner, quantizer = run.params.pruner_of(variant), run.params.variants[variant].quantizer
    return describe(pruner, run.params.pruners[pruner]), describe(quantizer, run.params.quantizers[quantizer])


def describe(name: str, section) -> str:
    """A params entry in one phrase: its name and the settings, of single values, that it was given: `model.json` has
    all of them."""
    values = section.model_dump(exclude_unset=True)
    settings = [f"{key} {value}" for key, value in values.items() if key != "method" and not isinstance(value, dict)]
    method = [] if values["method"] == name else [values["method"]]
    inside = ", ".join(method + settings)
    return f"{name} ({inside})" if inside else name


def machine_text(run: Run) -> str:
    """The machine in one phrase, from what the edge stage recorded."""
    machine = run.edge.get("machine") or {}
    name = machine.get("cpu") or machine.get("processor") or "an unnamed CPU"
    threads = (run.edge.get("protocol") or {}).get("threads")
    return name if threads is None else f"{name}, {threads} thread{'s' * (threads > 1)}"


def _listed(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
