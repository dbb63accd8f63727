"""`reports/summary.md`: the results in Markdown, for continuous-integration comments, terminals and the documentation.

A pure function of `variants.json`, `run.json` and `metrics.json`, so it can be made anew from committed files.
"""

from typing import Any

from stages.reporting.rows import Group, Row, dense_of, groups_of, metric_of
from stages.reporting.wording import (
    FIGURES,
    bytes_text,
    change_text,
    count_text,
    headline_of,
    interval_text,
    machine_text,
    ms_text,
    p_text,
    percent_text,
    plural,
    points_text,
    printed_lines,
    ratio_text,
    size_ratio_text,
    soak_lines,
    std_text,
)

COLUMNS = (
    *("variant", "top-1 (%)", "balanced (%)", "Δ dense (points)", "p", "Δ control (points)", "p control"),
    *("size", "parameters", "MACs", "latency", "speed-up"),
)


def summary_of(rows: list[Row], run: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The whole file; one line of the table for each variant, or for each group of seeds with its means."""
    headline = headline_of(rows, run, metrics)
    size, latency, top1, *balanced = (value for _, value, _ in headline.figures)
    accuracy = f"{top1} top-1" + "".join(f", {value} balanced accuracy" for value in balanced)
    groups = groups_of(rows)
    table = [list(COLUMNS), *map(_line, groups.values())]
    shown = [index for index in range(len(COLUMNS)) if any(line[index] for line in table[1:])]
    lines = [[line[index] for index in shown] for line in table]
    lines.insert(1, ["---"] + ["---:"] * (len(shown) - 1))
    controls = COLUMNS.index("Δ control (points)") in shown
    seeds = max(group.seeds for group in groups.values())
    verdict = "Nothing to ship yet (see the warnings); the candidate is" if run.get("inconclusive") else "Ship"
    return "\n".join(
        [
            f"# {run['data_name']}: results",
            "",
            f"**{verdict} `{headline.variant}`: {size}, {latency}, {accuracy}.** It is {headline.rule}."
            f" {headline.comparison} {headline.change}" + (f" **{headline.warning}**" if headline.warning else ""),
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"{run['data_name']}, n = {run['n_test']:,} test images, {plural(seeds, 'seed')}. Brackets hold"
            f" {percent_text(run.get('confidence', 0.95), 0)} intervals; p-values are of exact paired tests, corrected"
            f" over the table (Holm)."
            + (f" Δ is the change of {FIGURES[run['metric']]}." if run.get("metric", "top1") != "top1" else "")
            + (" Values are means over seeds, ± is the standard deviation over seeds." if seeds > 1 else "")
            + (" The control is the dense network, trained for as many extra epochs." if controls else "")
            + f" Size is that of `model.onnx`; latency is the median in ONNX Runtime at batch"
            f" {run['protocol'].get('batch', 1)} on {machine_text(run)}; speed-up is over dense"
            f" {run['baseline_runtime']}. Run `{run['run_id']}`.",
            "",
            "## Findings",
            "",
            *(f"- {finding}" for finding in findings_of(rows, run, metrics)),
            "",
        ]
    )


def _line(group: Group) -> list[str]:
    first, std = group.rows[0], group.std("top1")
    spread = std_text(std) or f" [{100 * first['top1_ci_low']:.2f}, {100 * first['top1_ci_high']:.2f}]"
    cells = [group.name if group.seeds > 1 else first["variant"], f"{100 * group.mean('top1'):.2f}{spread}", ""]
    if "balanced_accuracy" in first:
        interval = (f"{100 * first[f'balanced_accuracy_ci_{end}']:.2f}" for end in ("low", "high"))
        spread = std_text(group.std("balanced_accuracy")) or f" [{', '.join(interval)}]"
        cells[-1] = f"{100 * group.mean('balanced_accuracy'):.2f}{spread}"
    for change in (group.change_of(metric_of(first), kind) for kind in ("delta", "control")):
        if change is None:
            cells += ["", ""]
        else:
            cells.append(f"{points_text(change.delta, 2)} {interval_text(change)}".rstrip())
            cells.append("" if change.p_value is None else p_text(change.p_value))
    return [
        *cells,
        bytes_text(group.mean("size_bytes")),
        count_text(group.mean("params")),
        count_text(group.mean("macs")),
        ms_text(group.mean("latency_ms_p50")),
        ratio_text(group.mean("latency_ratio")),
    ]


def findings_of(rows: list[Row], run: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    """Short sentences: the extremes, robustness, printed samples, soak test, warnings."""
    by_name, groups = {row["variant"]: row for row in rows}, groups_of(rows)
    chosen = by_name[metrics["headline_variant"]]
    dense = dense_of(chosen, by_name)
    extremes: dict[str, list[str]] = {}
    for word, key in (("smallest", "size_bytes"), ("fastest", "latency_ms_p50")):
        extremes.setdefault(min(rows, key=lambda row: row[key])["variant"], []).append(word)
    figure = metric_of(chosen)
    best = min(rows, key=lambda row: (-row[figure], row["size_bytes"]))
    extremes.setdefault(best["variant"], []).append("most accurate")
    found = []
    for variant, words in extremes.items():
        row = by_name[variant]
        change, own = groups[row["group"]].change_of(figure, "delta"), dense_of(row, by_name)
        size, latency = bytes_text(row["size_bytes"]), ms_text(row["latency_ms_p50"])
        accuracy = f"{percent_text(row[figure], 2)} {FIGURES[figure]}"
        if row is not own:
            size += f" ({size_ratio_text(own['size_bytes'] / row['size_bytes'])} dense)"
            faster = ratio_text(own["latency_ms_p50"] / row["latency_ms_p50"])
            latency += f" ({faster} as fast as dense in ONNX Runtime)"
        if change is not None:
            accuracy += f" ({change_text(change)})"
        found.append(f"`{variant}` is the {' and the '.join(words)} variant: {size}, {latency}, {accuracy}.")
    if chosen.get("corrupted_top1") is not None and chosen is not dense:
        ours, theirs = (percent_text(row["corrupted_top1"]) for row in (chosen, dense))
        found.append(f"On corrupted test images, top-1 of `{chosen['variant']}` is {ours}; that of dense is {theirs}.")
    for title, lines in (("Soak test", soak_lines(run)), ("Printed-sample test", printed_lines(run))):
        if lines:
            found.append(f"{title} of {lines[0][1]} ({'; '.join(f'{name}: {value}' for name, value in lines[1:])}).")
    return found + [f"Warning: {mark}" for mark in run.get("marks", [])]
