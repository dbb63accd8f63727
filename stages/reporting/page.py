"""`reports/index.html`: one file that opens from disk without network (the template: `page.html.j2`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.reporting.bits import UNTRAINED, Allocation, contests_of, duels_of, float_layers, unpaired_of
from stages.reporting.cards import describe, machine_text
from stages.reporting.claims import FAILS, HOLDS, NOT_TESTED, ONLY_AS_COUNTED, read_claims
from stages.reporting.edge import marks_of, printed_lines, runtimes_of, soak_lines, too_few_images
from stages.reporting.inputs import Run
from stages.reporting.levels import EqualMacs, Libraries, at_equal_macs, between_libraries, cuts_of, levels_of
from stages.reporting.plots import Picture, confusion_counts, worst_classes
from stages.reporting.robustness import headline_variants, robustness_of
from stages.reporting.rows import Choices, Group, baseline_words, control_of, extra_training, is_control, small_dense
from stages.reporting.statistics import PairedDifference
from stages.reporting.tables import confusion_rows
from stages.reporting.text import (
    allowance_text,
    bytes_text,
    claim_text,
    count_text,
    ms_text,
    p_equals,
    p_text,
    percent_text,
    points_text,
    ratio_text,
    spread_text,
)

CONFUSION_TABLE = 20
"""Up to so many classes the confusion matrix is a table; beyond that the picture alone."""
VERDICT_CLASS = {HOLDS: "yes", ONLY_AS_COUNTED: "partly", FAILS: "no", NOT_TESTED: "open"}


@dataclass(frozen=True)
class Cell:
    """A table cell: what is read, and by what it sorts."""

    text: str
    key: float | str
    small: tuple[str, ...] = ()
    """Lines below it: the interval, the p-value or the visible count."""


def render_page(
    run: Run,
    rows: list[dict],
    groups: dict[str, Group],
    choices: Choices,
    claims: list[dict],
    pictures: dict[str, Picture],
) -> str:
    """The whole page; the same inputs give the same bytes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_name = {row["variant"]: row for row in rows}
    profile = next(iter(run.variants.values())).profile
    return environment.get_template("page.html.j2").render(
        title=f"{profile['data_name']}: which compressed classifier to ship",
        data_name=profile["data_name"],
        data_source=profile["data_source"],
        n_test=f"{len(run.labels):,}",
        machine=machine_text(run),
        confidence=percent_text(run.params.report.confidence, 0).replace(" ", "\N{NO-BREAK SPACE}"),
        headline=_headline(run, by_name, groups, choices),
        alternatives=_alternatives(run, by_name, choices),
        marks=marks_of(run, run.variants),
        too_few=too_few_images(run, run.variants),
        columns=[(key, heading, told.format(batch=run.batch)) for key, heading, told in COLUMNS],
        batch=run.batch,
        variants=[(row, _cells(run, row, groups[row["group"]]), row["variant"] == choices.headline) for row in rows],
        several_threads=(run.edge.get("protocol") or {}).get("threads", 1) > 1,
        groups=_seed_rows(run, rows, groups),
        progressive_resize=run.params.finetune.progressive_resize,
        **_levels(run, rows, groups),
        **_bits(run, rows, groups),
        **_accuracy(run, rows, groups, choices),
        bytes_lines=[(row["variant"], *_bytes(run, row)) for row in rows],
        baselines=[(model, ms_text(row["latency_ms_p50"])) for model, row in run.baselines.items()],
        baseline_runtime=baseline_words(run),
        runtimes=runtimes_of(run),
        soak=soak_lines(run),
        printed=printed_lines(run),
        pictures=pictures,
        networks=list(dict.fromkeys(model.architecture for model in run.params.models.values())),
        claims=_claims(claims),
        verdict_class=VERDICT_CLASS,
        confusion=confusion_rows(run, choices.headline) if len(run.classes) <= CONFUSION_TABLE else [],
        headline_variant=choices.headline,
        classes=run.classes,
        per_class=_per_class(run, choices),
        layers=_layers(run, choices.headline),
        environment=_environment(run, profile),
        settings=[("pruner", describe(name, section)) for name, section in run.params.pruners.items()]
        + [("quantizer", describe(name, section)) for name, section in run.params.quantizers.items()],
        folder=f"profiles/{Path.cwd().name}" if Path.cwd().parent.name == "profiles" else ".",
        run_id=run.run_id,
    )


def _headline(run: Run, rows: dict[str, dict], groups: dict[str, Group], choices: Choices) -> dict:
    """The sentence that matters, in parts: what, how small, how fast, how accurate, how sure."""
    row = rows[choices.headline]
    baseline = rows[run.params.baseline_of(choices.headline)]
    group = groups[row["group"]]
    drop = run.params.report.headline_max_drop
    dense = "the best dense network's" if len(run.params.models) > 1 else "the dense network's"
    smaller = ratio_text(baseline["size_bytes"] / row["size_bytes"])
    interval = f"[{percent_text(row['top1_ci_low'])}, {percent_text(row['top1_ci_high'])}], n = {row['n_test']:,}"
    return {
        "variant": choices.headline,
        "rule": f"the smallest file whose validation top-1 is at most {allowance_text(drop)} under {dense}",
        "figures": [
            (
                "size",
                bytes_text(row["size_bytes"]),
                f"{smaller} smaller than dense float ({bytes_text(baseline['size_bytes'])})",
            ),
            (
                "median latency",
                ms_text(row["latency_ms_p50"]),
                f"{ratio_text(row['latency_ratio'])} as fast as the dense network in {baseline_words(run)}; dense in"
                " ONNX Runtime:"
                f" {ms_text(baseline['latency_ms_p50'])}",
            ),
            ("test top-1", percent_text(row["top1"]), f"{interval}; dense: {percent_text(baseline['top1'])}"),
        ],
        "change": _change(run, group, choices.headline),
        "spread": spread_text(group) + _latencies([rows[name]["latency_ms_p50"] for name in group.variants]),
    }


def _latencies(of_seeds: list[float]) -> str:
    """Of the same settings under all seeds: pruning leaves each its own widths, and one of them may be lucky."""
    if len(of_seeds) == 1:
        return ""
    return f"; median latency from {ms_text(min(of_seeds))} to {ms_text(max(of_seeds))}"


def _change(run: Run, group: Group, variant: str) -> str:
    """What the variant gives up or gains, and how much of that is compression rather than more training."""
    if group.difference is None:
        others = any(name != run.params.baseline_of(name) for name in run.variants)
        return "It is the dense network itself" + (
            ": no smaller variant stayed within the allowed drop." if others else "; the run has no compressed variant."
        )
    pooled = f", pooled over {len(group.variants)} seeds" if len(group.variants) > 1 else ""

    def words(difference: PairedDifference, p_value: float, other: str) -> str:
        sure = p_value < 1 - run.params.report.confidence
        return (
            f"{points_text(difference.delta)} points against {other} [{points_text(difference.low)},"
            f" {points_text(difference.high)}], same test images{pooled}, p {p_equals(p_value)}: "
            + ("more than chance explains." if sure else "no difference that this many images could show.")
        )

    change = words(group.difference, group.p_value, "the dense network")
    if group.control is not None:
        control = f"the control ({control_of(run.params, variant)}), which trained for as long without compression"
        return (
            f"{change} {words(group.control, group.control_p_value, control)}"
            " Only the second is the doing of compression; the first holds the longer training too."
        )
    if is_control(run.params, variant):
        return f"{change} It is not compressed: it only trained longer."
    epochs, ways = extra_training(run.params, variant)
    if epochs:
        lacking = (
            f"a continued pruner of {epochs} epochs with the same learning_rate_factor and distillation"
            if len(ways) == 1
            else "there is none for pruning and recovery that train by different settings"
        )
        return (
            f"{change} It trained longer than dense; the control that tells how much that does is not in the run"
            f" ({lacking})."
        )
    return change


def _alternatives(run: Run, rows: dict[str, dict], choices: Choices) -> list[tuple[str, str, str]]:
    """What else a person would choose between: why, variant, and its figures in words."""
    wanted = [
        ("fastest within the same limit", choices.fastest),
        ("most accurate on validation", choices.most_accurate),
        ("simply a smaller dense network", small_dense(run)),
        ("dense, not compressed", run.params.baseline_of(choices.headline)),
    ]
    found: dict[str, list[str]] = {}
    for why, variant in wanted:
        if variant is not None and variant != choices.headline:
            found.setdefault(variant, []).append(why)
    return [
        (
            "; ".join(why),
            variant,
            f"{bytes_text(rows[variant]['size_bytes'])}, {ms_text(rows[variant]['latency_ms_p50'])},"
            f" {percent_text(rows[variant]['top1'])}",
        )
        for variant, why in found.items()
    ]


COLUMNS = (
    ("variant", "Variant", ""),
    ("top1", "Top-1", "test accuracy of model.onnx, with its interval"),
    (
        "top1_delta",
        "Change",
        "points against the dense network of the same model and seed; last line: against the control",
    ),
    ("size_bytes", "Size", "model.onnx; below it, under gzip"),
    ("params", "Parameters", "the truth; below it, what parameters() shows"),
    ("macs", "MACs", "the truth for one image; below it, what thop shows"),
    ("latency_ms_p50", "Latency", "median at batch {batch}; below it, the 95th percentile"),
    ("latency_ratio", "Speed-up", "over the dense network, timed as said below; below it, its interval over rounds"),
    ("peak_rss_bytes", "Memory", "peak resident; below it, the time to load"),
)
"""Key, heading and explanation (with a place for the batch) of each column of the variant table."""


def _cells(run: Run, row: dict, group: Group) -> list[Cell]:
    edge = run.variants[row["variant"]].edge
    return [
        Cell(
            percent_text(row["top1"]),
            row["top1"],
            (f"{100 * row['top1_ci_low']:.1f} to {100 * row['top1_ci_high']:.1f}",),
        ),
        _change_cell(row, group),
        Cell(bytes_text(row["size_bytes"]), row["size_bytes"], (f"gzip {bytes_text(row['size_gzip_bytes'])}",)),
        Cell(count_text(row["params"]), row["params"], (f"visible {count_text(row['params_visible'])}",)),
        Cell(count_text(row["macs"]), row["macs"], (f"visible {count_text(row['macs_visible'])}",)),
        Cell(ms_text(row["latency_ms_p50"]), row["latency_ms_p50"], (f"p95 {ms_text(row['latency_ms_p95'])}",)),
        Cell(
            ratio_text(row["latency_ratio"]),
            row["latency_ratio"],
            (f"{edge['latency_ratio_low']:.2f} to {edge['latency_ratio_high']:.2f}",),
        ),
        Cell(bytes_text(row["peak_rss_bytes"]), row["peak_rss_bytes"], (f"load {ms_text(row['load_ms'])}",)),
    ]


def _change_cell(row: dict, group: Group) -> Cell:
    """The variant's own change; below it the tests, which are the group's where it has several seeds."""
    if row["top1_delta"] is None:
        return Cell("baseline", 0.0)
    seeds = len(group.variants)
    pooled = f" ({seeds} seeds)" if seeds > 1 else ""

    def line(start: str, difference: PairedDifference, p_value: float) -> str:
        p = f"p {p_equals(p_value)}".replace(" ", "\N{NO-BREAK SPACE}")
        return f"{start}[{points_text(difference.low)}, {points_text(difference.high)}], {p}"

    start = f"dense{pooled} {points_text(group.difference.delta)} " if pooled else ""
    small = [line(start, group.difference, group.p_value)]
    if group.control is not None:
        start = f"control{pooled} {points_text(group.control.delta)} "
        small.append(line(start, group.control, group.control_p_value))
    return Cell(points_text(row["top1_delta"]), row["top1_delta"], tuple(small))


SEED_COSTS = {"params": count_text, "macs": count_text, "size_bytes": bytes_text, "latency_ms_p50": ms_text}
"""Mean costs in the table over seeds, and how each is written."""


def _seed_rows(run: Run, rows: list[dict], groups: dict[str, Group]) -> list[tuple[str, tuple[str, ...]]]:
    """Group, then seeds, mean and deviation, differences, p, mean costs; empty where every group has one seed."""
    if all(len(group.variants) == 1 for group in groups.values()):
        return []
    by_name = {row["variant"]: row for row in rows}
    lines = []
    for group in groups.values():
        if group.difference is None:
            change, interval, p = "baseline", "", ""
        else:
            change = points_text(group.difference.delta) + _spread(group.delta_deviation, scale=100)
            interval = f"{points_text(group.difference.low)} to {points_text(group.difference.high)}"
            p = p_text(group.p_value)
        control = "" if group.control is None else points_text(group.control.delta, 2)
        mean = {key: sum(by_name[v][key] for v in group.variants) / len(group.variants) for key in SEED_COSTS}
        top1 = f"{100 * group.top1:.2f}{_spread(group.top1_deviation, scale=100)}"
        figures = (str(len(group.variants)), top1, change, interval, p, control)
        figures += tuple(write(mean[key]) for key, write in SEED_COSTS.items())
        lines.append((group.name, figures))
    return lines


def _interval(difference: PairedDifference) -> tuple[str, str]:
    """A difference and its interval, in points."""
    return (
        points_text(difference.delta, 2),
        f"{points_text(difference.low, 2)} to {points_text(difference.high, 2)}",
    )


def _levels(run: Run, rows: list[dict], groups: dict[str, Group]) -> dict[str, list]:
    """Lines of the tables about pruning, in words: at equal MACs, between libraries, and at the cut."""
    found = levels_of(run, rows, groups)

    return {
        "benchmarks": _benchmarks(run) if any(run.params.pruners[one.pruner].method == "oto" for one in found) else [],
        "equal_macs": [
            (one.ours, one.theirs, f"{one.macs_ratio:.3f}", *_over_seeds(one), p_text(one.p_value))
            for one in at_equal_macs(run, found)
        ],
        "libraries": [
            (one.one, one.other, *_over_seeds(one), p_text(one.p_value)) for one in between_libraries(run, rows, groups)
        ],
        "cuts": [
            (
                cut.group,
                *(f"{100 * value:.2f}" for value in (cut.before, cut.after, cut.recovered)),
                f"{cut.difference:.1e}",
            )
            for cut in cuts_of(run, found)
        ],
    }


def _over_seeds(one: EqualMacs | Libraries) -> tuple[str, str, str]:
    """Difference, its deviation over seeds and its interval, in points."""
    difference, interval = _interval(one.difference)
    return difference, "" if one.deviation is None else f"{100 * one.deviation:.2f}", interval


def _bits(run: Run, rows: list[dict], groups: dict[str, Group]) -> dict:
    """What the section about bits says: a table for each contest, the duels, and the layers left in float."""
    contests = contests_of(run, groups)
    artifact_bytes = {row["variant"]: row["artifact_bytes"] for row in rows}

    def line(one: Allocation) -> tuple[str, ...]:
        group = one.group
        dense = sum(artifact_bytes[run.params.baseline_of(v)] for v in group.variants) / len(group.variants)
        objective = "\N{EN DASH}"
        if one.objective is not None:
            objective = f"{one.objective:.4f}{_spread(one.objective_deviation, 4)}"
        return (
            group.name,
            one.search,
            f"{one.average_bits:.3f}",
            str(one.evaluations),
            objective,
            f"{100 * group.top1:.2f}{_spread(group.top1_deviation, scale=100)}",
            *_interval(group.difference),
            bytes_text(one.artifact_bytes),
            percent_text(1 - one.artifact_bytes / dense),
        )

    duels = duels_of(run, contests)
    return {
        "contests": [
            (contest.number, contest.title, [line(one) for one in contest.allocations]) for contest in contests
        ],
        "duels": [
            (
                duel.learned,
                duel.other,
                duel.search,
                points_text(duel.difference.delta, 2) + _spread(duel.deviation, scale=100),
                str(duel.seeds),
                _interval(duel.difference)[1],
                p_text(duel.p_value),
            )
            for duel in duels
        ],
        "unpaired": [
            f"{one.learned} (on {', '.join(one.learned_models)}) against {one.other} (on {', '.join(one.other_models)})"
            for one in unpaired_of(run, contests)
        ],
        "untrained": any(duel.search == UNTRAINED for duel in duels),
        "float_layers": _float_layers(run, groups),
    }


def _spread(deviation: float | None, decimals: int = 2, scale: float = 1) -> str:
    """A standard deviation to stand behind its mean; nothing where it is not known."""
    return "" if deviation is None else f" \N{PLUS-MINUS SIGN} {scale * deviation:.{decimals}f}"


def _float_layers(run: Run, groups: dict[str, Group]) -> list[str]:
    """`2 (stem, head) in atto-none-uniform_4`: an entry for each set of layers that quantizers left in float."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group in groups.values():
        for layers in dict.fromkeys(tuple(float_layers(run, variant)) for variant in group.variants):
            if layers:
                found.setdefault(layers, []).append(group.name)
    return [f"{len(layers)} ({', '.join(layers)}) in {', '.join(names)}" for layers, names in found.items()]


def _benchmarks(run: Run) -> list[tuple[str, list[tuple[str, ...]], str]]:
    """For each device: what was timed on what, its lines, and the time of graph, partition and cut in words."""
    tables = []
    for found in run.benchmarks:
        machine, step, cut = found["machine"], found["step"], found["convnext_small_cut"]
        device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        what = (
            f"A training step of ConvNeXt-Tiny (batch {step['batch']}, {step['input_size']} px, {step['precision']}) on"
            f" {device}, {threads}, torch {machine['torch']}: {found['n']} rounds, interleaved"
        )
        lines = [
            (
                name,
                ms_text(row["median_ms"]),
                f"{row['ratio']:.3f}",
                f"{row['ratio_ci_low']:.3f} to {row['ratio_ci_high']:.3f}",
                f"{row['ratio_by_parts']:.3f}",
                f"{row['ratio_by_parts_ci_low']:.3f} to {row['ratio_by_parts_ci_high']:.3f}",
                ms_text(found["optimizer_only"][name]["median_ms"]),
                f"{found['optimizer_only'][name]['ratio']:.2f}",
            )
            for name, row in found["whole_step"].items()
        ]
        words = (
            f"Graph, partition and cut of ConvNeXt-Small: {cut['total_seconds']:.1f} s, peak memory"
            f" {bytes_text(cut['peak_rss_bytes'])} ({bytes_text(cut['peak_rss_before_bytes'])} before it began)."
        )
        tables.append((what, lines, words))
    return tables


def _accuracy(run: Run, rows: list[dict], groups: dict[str, Group], choices: Choices) -> dict:
    """Lines of the tables about calibration, corruptions and single classes."""
    errors = {row["variant"]: row["calibration_error"] for row in rows}
    by_group = {one.group.name: one for one in robustness_of(run, groups)}

    def line(group: Group) -> tuple[str, ...]:
        error = float(np.mean([errors[variant] for variant in group.variants]))
        cells = (
            group.name,
            f"{100 * group.top1:.2f}{_spread(group.top1_deviation, scale=100)}",
            percent_text(error, 2),
        )
        if group.name not in by_group:
            return cells
        one = by_group[group.name]
        change = ("baseline", "", "") if one.difference is None else (*_interval(one.difference), p_text(one.p_value))
        return (*cells, f"{100 * one.clean:.1f}", f"{100 * one.corrupted:.1f}", *change)

    first = next(iter(run.variants.values())).corrupted
    shown = headline_variants(run, choices)
    found = [confusion_rows(run, variant) for variant in shown] if len(run.classes) <= CONFUSION_TABLE else []
    return {
        "accuracy_lines": [line(group) for group in groups.values()],
        "n_corrupted": f"{len(first.position):,}" if first.cells else "",
        "corruption_names": ", ".join(dict.fromkeys(name for name, _ in first.cells)),
        "n_cells": len(first.cells),
        "class_variants": shown,
        "class_lines": [
            (
                of_class[0]["name"],
                *(percent_text(one["recall"]) if one["recall"] is not None else "" for one in of_class),
            )
            for of_class in zip(*found, strict=True)
        ],
    }


def _bytes(run: Run, row: dict) -> tuple[str, ...]:
    """Of model.onnx, of its gzip, of its parts, and of the artifact."""
    profile = run.variants[row["variant"]].profile
    keys = ("size_bytes", "size_gzip_bytes", "weight_bytes", "scale_bytes", "graph_bytes", "artifact_bytes")
    return tuple(bytes_text(profile[key]) for key in keys)


def _claims(entries: list[dict]) -> list[dict]:
    """Entries of claims.json with their numbers in words."""
    units = {claim.id: claim.unit for claim in read_claims()}

    keys = ("published", "ours_as_counted_there", "ours_honest")
    return [entry | {f"{key}_text": claim_text(entry[key], units[entry["id"]]) for key in keys} for entry in entries]


def _per_class(run: Run, choices: Choices) -> list[tuple[str, str]]:
    """The three classes that the headline variant finds least often."""
    counts = confusion_counts(run, choices.headline)
    return [(run.classes[k], percent_text(counts[k, k] / counts[k].sum())) for k in worst_classes(counts, 3)]


def _layers(run: Run, variant: str) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the layer table of a variant, long numbers shortened."""
    layers = run.variants[variant].layers
    if not layers:
        return [], []

    def short(column: str, value: str) -> str:
        large = value.isdigit() and int(value) >= 10_000
        return count_text(int(value)) if large and not column.endswith("bits") else value

    return list(layers[0]), [[short(column, value or "") for column, value in line.items()] for line in layers]


def _environment(run: Run, profile: dict) -> list[tuple[str, str]]:
    """What the figures depend on, as name and value."""
    description = next(iter(run.variants.values())).description
    lines = [("run", run.run_id), ("images", f"{profile['data_name']}, sha256 {profile['data_sha256'][:16]}")]
    lines += [("licence of the images", profile.get("data_licence") or "not stated by their source")]
    lines += [(name, str(version)) for name, version in description["versions"].items()]
    for section, value in run.edge.items():
        if section in ("soak", "left_out"):  # they have a section of their own
            continue
        if section == "repeat" and value is None:
            lines.append((section, "no run before on this machine to compare with"))
        elif isinstance(value, dict):
            lines += [(f"{section}: {key}", _value(entry)) for key, entry in value.items()]
        elif section != "run_id":
            lines.append((section, _value(value)))
    return [(name.replace("_", " "), value) for name, value in lines]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not known"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
