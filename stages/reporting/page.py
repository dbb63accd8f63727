"""`reports/index.html`: one file that opens from disk without a network (the template: `page.html.j2`)."""

import json
from typing import Any

import numpy as np

from stages.reporting.cards import environment
from stages.reporting.drawing import Picture
from stages.reporting.edge import runtimes_of
from stages.reporting.inputs import CompletedRun
from stages.reporting.robustness import headline_variants, robustness_of
from stages.reporting.rows import Choices, Group, Row, dense_of, extra_training, groups_of, is_control
from stages.reporting.statistics import wilson_interval
from stages.reporting.tables import confusion_counts
from stages.reporting.wording import (
    FIGURES,
    bytes_text,
    describe,
    fraction_text,
    headline_of,
    machine_text,
    ms_text,
    percent_text,
    plural,
    printed_lines,
    seeds_text,
    soak_lines,
)

Line = tuple[str, ...]
CONFUSION_TABLE = 20
"""The page shows the whole confusion matrix up to this number of classes; beyond that, this many pairs of classes. The
table of recalls has this many classes."""
BYTES = ("size_bytes", "size_gzip_bytes", "weight_bytes", "scale_bytes", "graph_bytes", "artifact_bytes")


def render_page(
    run: CompletedRun,
    rows: list[Row],
    facts: dict[str, Any],
    metrics: dict[str, Any],
    choices: Choices,
    pictures: dict[str, Picture],
) -> str:
    """The whole page; the same inputs give the same bytes.

    Args:
        facts: the content of `run.json`.
        metrics: the content of `metrics.json`.
    """
    groups = groups_of(rows)
    by_name = {row["variant"]: row for row in rows}
    chosen = groups[by_name[choices.headline]["group"]]
    errors = {variant: _errors(run, variant) for variant in run.variants}
    shown = errors[choices.headline]
    params, corrupted, layers = run.params, run.first.corrupted, run.variants[choices.headline].layers
    template = environment(autoescape=True).get_template("page.html.j2")
    return template.render(
        run=facts,
        figure=FIGURES[params.report.metric],
        measured=run.variants,
        rows=rows,
        groups=groups,
        several_seeds=len(groups) < len(rows),
        batch=run.batch,
        machine=machine_text(facts),
        confidence=percent_text(params.report.confidence, 0).replace(" ", "\N{NO-BREAK SPACE}"),
        headline=headline_of(rows, facts, metrics),
        lacking=_lacking_control(run, chosen),
        spread=_spread(chosen),
        alternatives=_alternatives(by_name, choices),
        robust=robustness_of(run, groups),
        n_corrupted=len(corrupted.position),
        corruptions=list(dict.fromkeys(name for name, _ in corrupted.cells)),
        n_cells=len(corrupted.cells),
        float_layers=_float_layers(run, groups),
        removals=_removals(run, groups),
        by_corruption=_by_corruption(run, choices),
        bytes_lines=[
            (name, *(bytes_text(getattr(one.profile, key)) for key in BYTES)) for name, one in run.variants.items()
        ],
        runtimes=runtimes_of(run),
        soak=soak_lines(facts),
        printed=printed_lines(facts),
        pictures=pictures,
        classes=run.classes,
        matrix=len(run.classes) <= CONFUSION_TABLE,
        errors=errors,
        errors_json=json.dumps(errors, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        shown_errors=shown + [None] * (max(map(len, errors.values())) - len(shown)),
        recalls=_recalls(run, choices.headline),
        dense=params.baseline_of(choices.headline),
        layer_heads=list(next(iter(layers), {})),
        layers=[tuple(line.values()) for line in layers],
        environment=_environment(run),
        settings=[("pruner", describe(name, section)) for name, section in params.pruners.items()]
        + [("quantizer", describe(name, section)) for name, section in params.quantizers.items()],
    )


def _lacking_control(run: CompletedRun, group: Group) -> str:
    """A warning if the headline variant trained longer than the dense network and the run has no control for it."""
    if is_control(run.params, group.variants[0]):
        return "It is not compressed: it only trained longer."
    epochs, _ = extra_training(run.params, group.variants[0])
    if not epochs or group.control is not None:
        return ""
    return f"It trained for {plural(epochs, 'more epoch')} than the dense network, and the run has no control for that."


def _spread(group: Group) -> str:
    """The spread over seeds of accuracy and latency: pruning gives each seed its own widths."""
    times = [row["latency_ms_p50"] for row in group.rows]
    between = f"; median latency from {ms_text(min(times))} to {ms_text(max(times))}" if group.seeds > 1 else ""
    return seeds_text(group) + between


def _alternatives(by_name: dict[str, Row], choices: Choices) -> list[tuple[str, Row]]:
    """Other variants worth a choice, each with the reasons."""
    wanted = [
        ("fastest within the same limit", choices.fastest),
        ("most accurate on validation images", choices.most_accurate),
        ("a smaller dense network", choices.small_dense),
        ("dense, not compressed", dense_of(by_name[choices.headline], by_name)["variant"]),
    ]
    found: dict[str, list[str]] = {}
    for why, variant in wanted:
        if variant is not None and variant != choices.headline:
            found.setdefault(variant, []).append(why)
    return [("; ".join(why), by_name[variant]) for variant, why in found.items()]


def _float_layers(run: CompletedRun, groups: dict[str, Group]) -> list[str]:
    """`2 (stem, head) in atto-none-uniform_4`: an entry for each set of layers that quantizers left in float."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group in groups.values():
        for layers in dict.fromkeys(tuple(run.variants[variant].artifact.float_layers) for variant in group.variants):
            if layers:
                found.setdefault(layers, []).append(group.name)
    return [f"{len(layers)} ({', '.join(layers)}) in {', '.join(names)}" for layers, names in found.items()]


def _removals(run: CompletedRun, groups: dict[str, Group]) -> list[Line]:
    """Validation top-1 before and after channels were removed and after recovery, and the change of the logits."""
    lines = []
    for group in groups.values():
        metrics = [(run.variants[name].artifact.parent or {}).get("metrics", {}) for name in group.variants]
        quantizer = run.params.quantizers[run.params.variants[group.variants[0]].quantizer]
        if quantizer.method != "fp32" or not all("validation_top1_cut" in one for one in metrics):
            continue
        keys = ("validation_top1_uncut", "validation_top1_cut", "validation_top1")
        means = (f"{100 * float(np.mean([one[key] for one in metrics])):.2f}" for key in keys)
        lines.append((group.name, *means, f"{max(one['cut_difference'] for one in metrics):.1e}"))
    return lines


def _by_corruption(run: CompletedRun, choices: Choices) -> list[Line]:
    """For each headline variant, top-1 on the clean images and the mean over severities of each corruption."""
    lines = []
    for variant in headline_variants(run, choices):
        corrupted = run.variants[variant].corrupted
        right: dict[str, list[float]] = {"clean": [run.variants[variant].correct[corrupted.position].mean()]}
        for (name, _), outcomes in zip(corrupted.cells, corrupted.correct(run.labels), strict=True):
            right.setdefault(name, []).append(outcomes.mean())
        lines.append((variant, *(f"{100 * float(np.mean(one)):.1f}" for one in right.values())))
    return lines


def _errors(run: CompletedRun, variant: str) -> list[list[Any]]:
    """The confusion matrix, true class by predicted class; for many classes, the most frequent confusions as true
    class, predicted class, number of images, and images of the true class."""
    counts = confusion_counts(run, variant)
    if len(counts) <= CONFUSION_TABLE:
        return counts.tolist()
    images = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    pairs = np.argsort(-counts, axis=None, kind="stable")[:CONFUSION_TABLE]
    places = [divmod(int(pair), len(counts)) for pair in pairs]
    return [[run.classes[a], run.classes[b], int(counts[a, b]), int(images[a])] for a, b in places if counts[a, b]]


def _recalls(run: CompletedRun, variant: str) -> list[Line]:
    """The classes with the lowest recall, worst first: images, recall with Wilson's interval of the variant and of its
    dense network (if it is another), and the variant's most frequent wrong prediction."""
    dense, counts = run.params.baseline_of(variant), confusion_counts(run, variant)
    lines: list[Line] = []
    for k in run.variants[variant].worst_classes[:CONFUSION_TABLE]:
        cells = []
        for name in dict.fromkeys((variant, dense)):
            right, images = (int(numbers[k]) for numbers in run.variants[name].by_class)
            cells.append(fraction_text(right / images, *wilson_interval(right, images, run.params.report.confidence)))
        wrong = counts[k] * (np.arange(len(counts)) != k)
        mistaken = f"{run.classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        lines.append((run.classes[k], f"{counts[k].sum():,}", *cells, mistaken))
    return lines


def _environment(run: CompletedRun) -> list[tuple[str, str]]:
    """Everything that the figures depend on, as name and value."""
    profile = run.first.profile
    lines = [("run", run.run_id), ("images", f"{profile.data_name}, sha256 {profile.data_sha256[:16]}")]
    lines += [("licence of the images", profile.data_licence or "not stated by their source")]
    lines += [(name, str(version)) for name, version in run.first.artifact.versions.items()]
    for section, value in run.edge.items():
        if isinstance(value, dict) and section != "soak":
            lines += [(f"{section}: {key}", _value(entry)) for key, entry in value.items()]
        elif section not in ("run_id", "soak", "left_out", "repeat"):
            lines.append((section, _value(value)))
    if run.edge.get("repeat") is None:
        lines.append(("repeat", "no previous run on this machine to compare with"))
    return [(name.replace("_", " "), value) for name, value in lines]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not known"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
