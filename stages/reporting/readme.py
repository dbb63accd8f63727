"""The numbers in README.md: written from a profile's report files, never by hand.

`python -m stages.reporting.readme` (at the top) fills every block `<!-- <profile>:<block> -->` ... `<!-- end -->` from
`profiles/<profile>/reports/`, and from `reports/` where the profile is called `default`. A test fails where README.md
and those files differ, and where a measured figure stands outside a block.
"""

import re
from collections.abc import Callable
from pathlib import Path

from stages.common.errors import UserError, run_stage
from stages.common.files import read_csv, read_json, write_text
from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.claims import read_claims
from stages.reporting.rows import control_of, model_family
from stages.reporting.statistics import mean_and_deviation
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
    signed_text,
)

README = Path("README.md")
BLOCK = re.compile(r"(<!-- (?P<profile>[\w-]+):(?P<block>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MARK = re.compile(r"<!-- (?:[\w-]+:\w+|end) -->")
NO_FASTER = 0.97
"""Of the dense network's latency: what takes more than this share is not called faster."""


def filled(text: str, top: Path) -> str:
    """`text` with every block's content made anew from the report files below `top`.

    Raises:
        UserError: if a block has an unknown name or no end, or its report is missing, broken or of several runs.
    """
    _refuse_open_blocks(text)

    def content(match: re.Match) -> str:
        if match["block"] not in BLOCKS:
            raise UserError(f"README.md: no block {match['block']!r}; known: {', '.join(BLOCKS)}")
        reports = (top if match["profile"] == "default" else top / "profiles" / match["profile"]) / "reports"
        try:
            return f"{match[1]}{BLOCKS[match['block']](reports)}\n{match[4]}"
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{reports}: what {match['block']!r} wants is not there or of another run"
                f" ({type(error).__name__}: {error}): run `dvc repro report` there, or take its files from one commit"
            ) from None

    return BLOCK.sub(content, text)


def _refuse_open_blocks(text: str) -> None:
    """Raise a `UserError` where a block begins before the last one has ended: all between them would be lost."""
    last = None
    for mark in [*MARK.findall(text), None]:
        if last not in (None, "<!-- end -->") and mark != "<!-- end -->":
            raise UserError(f"README.md: {last} has no <!-- end -->: put it where the block ends; nothing was written")
        last = mark


def headline_block(reports: Path) -> str:
    """What to ship, how small, how fast, how sure, in two sentences."""
    rows, run, metrics = (read_json(reports / f"{name}.json") for name in ("variants", "run", "metrics"))
    params = load_params(Params, reports.parent / "params.yaml")
    by_name = {row["variant"]: row for row in rows}
    chosen = by_name[metrics["headline_variant"]]
    dense = by_name[f"{chosen['model']}-none-fp32"]
    images = f"On {run['data_name']} (n = {run['n_test']:,} test images, {_seeds(rows)})"
    within = f"within {allowance_text(params.report.headline_max_drop)} of the"
    within += f"{' best' if len(params.models) > 1 else ''} dense network on validation images"
    eager = f"{ms_text(run['baseline_latency_ms_p50'][chosen['model']])} dense in {run['baseline_runtime']}"
    accuracy = (
        f"**{percent_text(chosen['top1'], 2)} top-1** [{percent_text(chosen['top1_ci_low'], 2)},"
        f" {percent_text(chosen['top1_ci_high'], 2)}]"
    )
    if chosen is dense:
        return (
            f"{images}, no smaller variant than the dense network `{chosen['variant']}` is {within}:"
            f" {bytes_text(chosen['size_bytes'])}, {ms_text(chosen['latency_ms_p50'])} in ONNX Runtime ({eager}),"
            f" {accuracy}. {_machine(run)}"
        )
    size = f"{bytes_text(chosen['size_bytes'])} instead of {bytes_text(dense['size_bytes'])}"
    time, of_dense = (ms_text(row["latency_ms_p50"]) for row in (chosen, dense))
    if chosen["latency_ms_p50"] > NO_FASTER * dense["latency_ms_p50"]:
        costs = f"**{size}**, and no faster: {time}, dense {of_dense} (both in ONNX Runtime; {eager})"
    else:
        costs = f"**{size}, {time} instead of {of_dense}** (both in ONNX Runtime; {eager})"
    change = f", {points_text(chosen['top1_delta'], 2)} points against dense, {_p_words(rows)}"
    change += f" {p_equals(chosen['p_value'])}"
    beyond = _over_control(params, rows, chosen)
    if beyond:
        change += f", {beyond} points against the control that trained for as long without compression"
    return (
        f"{images}, `{chosen['variant']}` is the smallest variant {within}: {costs}, {accuracy}{change}."
        f" {_machine(run)}"
    )


def findings_block(reports: Path) -> str:
    """What stands out: smallest, fastest, corruptions, prints, soak, and what has to be said of the times."""
    rows, run, metrics = (read_json(reports / f"{name}.json") for name in ("variants", "run", "metrics"))
    by_name = {row["variant"]: row for row in rows}

    def dense_of(row: dict) -> dict:
        return by_name[f"{row['model']}-none-fp32"]

    smallest = min(rows, key=lambda row: row["artifact_bytes"])
    fastest = min(rows, key=lambda row: row["latency_ms_p50"])
    chosen = by_name[metrics["headline_variant"]]
    gone, gone_onnx = (1 - smallest[key] / dense_of(smallest)[key] for key in ("artifact_bytes", "size_bytes"))
    lines = [
        f"`{smallest['variant']}` is the smallest: {percent_text(gone)} less than dense float32 in `model.safetensors`,"
        f" {percent_text(gone_onnx)} in `model.onnx`, {_accuracy(rows, smallest)}.",
        f"`{fastest['variant']}` has the lowest median latency, {ms_text(fastest['latency_ms_p50'])}:"
        f" {fastest['latency_ratio']:.1f} times as fast as dense in {run['baseline_runtime']},"
        f" {_accuracy(rows, fastest)}; dense float32 in ONNX Runtime takes"
        f" {ms_text(dense_of(fastest)['latency_ms_p50'])}, {dense_of(fastest)['latency_ratio']:.1f} times as fast.",
        *_narrower(load_params(Params, reports.parent / "params.yaml"), rows, chosen),
        *_corruptions(chosen, dense_of(chosen)),
        *_printed(run["printed"]),
        *_soak(run.get("soak")),
        *(f"Marked: {words}." for key, words in MARKS.items() if run.get(key)),
    ]
    return "\n".join(f"- {line}" for line in lines)


MARKS = {
    "busy": "others used the processor while latency was measured",
    "throttled": "the processor was slowed down while latency was measured",
}


def _narrower(params: Params, rows: list[dict], chosen: dict) -> list[str]:
    """What simply training a narrower network gives, by the chosen variant's quantizer."""
    found = [
        row
        for row in rows
        if row is not chosen
        and params.pruners[row["pruner"]].method == "small_dense"
        and all(row[key] == chosen[key] for key in ("model", "quantizer", "seed"))
    ]
    return [
        f"Simply a narrower network, trained from scratch for as long: `{row['variant']}` has {count_text(row['macs'])}"
        f" MACs, {bytes_text(row['size_bytes'])}, {ms_text(row['latency_ms_p50'])}, {_accuracy(rows, row)};"
        f" `{chosen['variant']}` has {count_text(chosen['macs'])} MACs, {bytes_text(chosen['size_bytes'])},"
        f" {ms_text(chosen['latency_ms_p50'])}, {percent_text(chosen['top1'], 2)}."
        for row in found
    ]


def _corruptions(row: dict, dense: dict) -> list[str]:
    if row.get("corrupted_top1") is None or row is dense:
        return []
    corrupted, errors = (
        [percent_text(one[k]) for one in (row, dense)] for k in ("corrupted_top1", "calibration_error")
    )
    return [
        f"On corrupted test images (noise, blur, brightness, contrast, JPEG) `{row['variant']}` has {corrupted[0]},"
        f" dense {corrupted[1]}; their calibration errors are {errors[0]} and {errors[1]}."
    ]


def _printed(printed: dict | None) -> list[str]:
    if not printed:
        return []
    filmed, clean = (
        f"{percent_text(printed[key], 2)} [{percent_text(printed[f'{key}_ci_low'], 2)},"
        f" {percent_text(printed[f'{key}_ci_high'], 2)}]"
        for key in ("top1_printed", "top1_clean")
    )
    return [
        f"On {printed['n_images']:,} test images that are printed and filmed in simulation `{printed['variant']}` has"
        f" {filmed}, on the same as they are {clean}."
    ]


def _soak(soak: dict | None) -> list[str]:
    if not soak:
        return []
    low, change, high = (signed_text(soak[f"change_percent{end}"], 1) for end in ("_low", "", "_high"))
    return [
        f"A soak of `{soak['variant']}` over {soak['soak_seconds'] / 60:.1f} minutes: {soak['verdict']}, the latency's"
        f" change {change} % [{low}, {high}], {soak['wrong']} of {soak['soak_runs']:,} answers changed."
    ]


def _accuracy(rows: list[dict], row: dict) -> str:
    """Its test top-1, and the change against dense."""
    if row["top1_delta"] is None:
        return f"{percent_text(row['top1'], 2)} top-1"
    words = f"{points_text(row['top1_delta'], 2)} points, {_p_words(rows)} {p_equals(row['p_value'])}"
    return f"{percent_text(row['top1'], 2)} top-1 ({words})"


def variants_block(reports: Path) -> str:
    """One line for each variant."""
    rows, run = read_json(reports / "variants.json"), read_json(reports / "run.json")
    params = load_params(Params, reports.parent / "params.yaml")
    lines = [
        f"| variant | top-1, % [{100 * params.report.confidence:g} %] | Δ, points ({_p_words(rows)}) |"
        " Δ control, points | model.onnx | artifact | parameters: true (visible) |"
        " MACs: true (visible) | p50 ms | over eager |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        delta = "baseline"
        if row["top1_delta"] is not None:
            delta = f"{points_text(row['top1_delta'], 2)} ({p_text(row['p_value'])})"
        lines.append(
            f"| {row['variant']} | {100 * row['top1']:.2f} [{100 * row['top1_ci_low']:.2f},"
            f" {100 * row['top1_ci_high']:.2f}] | {delta} |"
            f" {_over_control(params, rows, row)} | {bytes_text(row['size_bytes'])} |"
            f" {bytes_text(row['artifact_bytes'])} |"
            f" {count_text(row['params'])} ({count_text(row['params_visible'])}) |"
            f" {count_text(row['macs'])} ({count_text(row['macs_visible'])}) | {row['latency_ms_p50']:.3f} |"
            f" {row['latency_ratio']:.2f} |"
        )
    lines += [
        "",
        f"{run['data_name']}, n = {run['n_test']:,} test images, {_seeds(rows)};"
        f" run `{run['run_id']}`. {_machine(run)}",
    ]
    return "\n".join(lines)


def groups_block(reports: Path) -> str:
    """One line for each setting of the first model: means over seeds, costs as shares of the dense float network's."""
    rows, run = read_json(reports / "variants.json"), read_json(reports / "run.json")
    params = load_params(Params, reports.parent / "params.yaml")
    by_name = {row["variant"]: row for row in rows}
    groups: dict[str, list[dict]] = {}
    first = model_family(params, rows[0]["model"])
    for row in rows:
        if model_family(params, row["model"]) == first:
            groups.setdefault(row["group"], []).append(row)
    lines = [
        "| variant | MACs | weights | model.onnx | latency | top-1, % | Δ dense, points | Δ control, points |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, members in groups.items():
        pairs = [(row, by_name[params.baseline_of(row["variant"])]) for row in members]
        shares = {
            cost: [row[cost] / dense[cost] for row, dense in pairs]
            for cost in ("macs", "artifact_bytes", "size_bytes", "latency_ms_p50")
        }
        costs = [percent_text(sum(of_cost) / len(of_cost)) for of_cost in shares.values()]
        costs[-1] = _share(shares["latency_ms_p50"])
        controls = [control_of(params, row["variant"]) for row in members]
        over = [row["top1"] - by_name[c]["top1"] for row, c in zip(members, controls, strict=True) if c in by_name]
        deltas = [row["top1"] - dense["top1"] for row, dense in pairs if row is not dense]
        top1 = _spread([row["top1"] for row in members], lambda value: f"{100 * value:.2f}")
        short = name.removeprefix(f"{first}-").removesuffix("-fp32")
        cells = [short, *costs, top1, _spread(deltas, _points), _spread(over, _points)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Means (latency and accuracy \N{PLUS-MINUS SIGN} standard deviation) over {_seeds(rows)}; costs are shares"
        " of the same seed's dense float network in ONNX Runtime; weights are `model.safetensors`."
        f" {run['data_name']}, n = {run['n_test']:,} test images; run `{run['run_id']}`. {_machine(run)}",
    ]
    return "\n".join(lines)


def claims_block(reports: Path) -> str:
    """One line for each sentence of the study."""
    units = {claim.id: claim.unit for claim in read_claims()}
    lines = ["| the study says | published | ours, counted as there | ours, counted honestly | verdict |"]
    lines.append("|---|---:|---:|---:|---|")
    if not (entries := read_json(reports / "claims.json")):
        raise UserError(f"{reports / 'claims.json'}: holds no claims: run `dvc repro report`")
    for entry in entries:
        values = [entry[key] for key in ("published", "ours_as_counted_there", "ours_honest")]
        figures = " | ".join(claim_text(value, units[entry["id"]]) for value in values)
        lines.append(f"| {entry['claim']} | {figures} | **{entry['verdict']}** |")
    return "\n".join(lines)


def recipes_block(reports: Path) -> str:
    """A line for each recipe that `tests/benchmarks/recipes.py` tried, and commit; of a seed's results the last."""
    tried: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in read_csv(_measured(reports / "recipes.csv", "recipes.py")):
        key = tuple(row[name] for name in ("change", "epochs", "validation_images", "cpu", "threads", "commit"))
        tried.setdefault(key, {})[row["seed"]] = row
    lines = [
        "| change | epochs | seeds | top-1 on validation images, % | minutes | images/s | n | machine |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (change, epochs, images, cpu, threads, _), of_seeds in tried.items():
        rows = of_seeds.values()
        top1 = _spread([float(row["validation_top1"]) for row in rows], lambda value: f"{100 * value:.2f}")
        minutes = sum(float(row["seconds"]) for row in rows) / len(rows) / 60
        speed = sum(float(row["images_per_second"]) for row in rows) / len(rows)
        figures = f"{epochs} | {len(rows)} | {top1} | {minutes:.1f} | {speed:,.0f} | {int(images):,}"
        lines.append(f"| `{change}` | {figures} | {cpu}, {_plural(int(threads), 'thread')} |")
    return "\n".join(lines)


def training_block(reports: Path) -> str:
    """What `tests/benchmarks/training.py` measured, on each machine."""
    first = _measured(reports / "benchmarks/training.json", "training.py")
    files = [first, *sorted(first.parent.glob("training_*.json"))]
    return "\n\n".join(_training_speed(read_json(file)) for file in files)


def _training_speed(found: dict) -> str:
    ratios, machine, settings = found["ratios"], found["machine"], found["settings"]

    def ratio(name: str, cost: bool = False) -> str:
        row = ratios[name]
        values = [row["ratio"], row["ratio_ci_low"], row["ratio_ci_high"]]
        if cost:
            middle, low, high = (signed_text(100 * (value - 1), 1) for value in values)
            return f"{middle} % [{low}, {high}]"
        return "{:.2f} [{:.2f}, {:.2f}]".format(*values)

    speed, plain = (f"{found['images_per_second'][name]:,.0f} images/s" for name in ("loop", "plain"))
    where = f"{machine['cpu']} ({', '.join(machine['instruction_sets'])}; {_plural(found['threads'], 'thread')})"
    if settings.get("device") == "cuda":
        where = f"{found.get('device', 'a CUDA GPU')} beside {machine['cpu']} ({_plural(machine['cores'], 'core')})"
    network = f"`{settings['architecture']}` at 64 pixels, " if settings.get("architecture") else ""
    early = []
    if "plain over recipe" in ratios:
        early.append(
            f"- Over the whole recipe, whose first {100 * found['early_fraction']:.0f} % of the steps see"
            f" {found['early_input_size']} pixels: {ratio('plain over recipe')} times that loop at full size."
        )
    return "\n".join(
        [
            f"- One epoch's steps: {speed}, {ratio('plain over loop')} times the loop that people write first ({plain}:"
            " float32, torchvision's transforms, a DataLoader of two workers that decode JPEG, AdamW).",
            *early,
            f"- Of the speed of the bare forward, backward and step on one fixed batch: {ratio('bare over loop')}.",
            f"- HESSO costs {ratio('hesso over silent', True)}; averaging and logging together"
            f" {ratio('averaged and logged over silent', True)}; the same measured twice differs by"
            f" {ratio('silent again over silent', True)}.",
            "",
            f"Medians of {settings['rounds']} rounds, interleaved in one run [95 % intervals], {network}batch"
            f" {settings['batch']}, on {where}, torch {machine['torch']}, {found['precision']}.",
        ]
    )


def even_widths_block(reports: Path) -> str:
    """What `tests/benchmarks/even_widths.py` measured: a line for each network and unit, means over random choices."""
    found = read_json(_measured(reports / "benchmarks/even_widths.json", "even_widths.py"))
    lines = [
        "| network | `divisible_by` | MACs | latency, `exact` norms | latency, `plain` norms |",
        "|---|---:|---:|---:|---:|",
    ]
    seeds = set()
    for result in found["results"]:
        cut = [row for row in result["rows"] if row["divisible_by"] is not None]
        seeds |= {row["seed"] for row in cut}
        for unit in dict.fromkeys(row["divisible_by"] for row in cut):
            rows = [row for row in cut if row["divisible_by"] == unit]
            macs, _ = mean_and_deviation([row["macs_share"] for row in rows])
            latencies = (
                _share([row["time_over_dense"] for row in rows if row["layer_norm"] == form])
                for form in ("exact", "plain")
            )
            cells = [f"`{result['profile']}`, `{result['model']}`", str(unit), percent_text(macs), *latencies]
            lines.append(f"| {' | '.join(cells)} |")
    choices = _plural(len(seeds), "random choice")
    busy = ", others were using the CPU" if any(result["busy"] for result in found["results"]) else ""
    machine = found["machine"]
    lines += [
        "",
        f"Shares of the whole network's; means \N{PLUS-MINUS SIGN} standard deviation over {choices} of the channels"
        f" that go, at the same target of MACs, random weights. Timed on {machine['cpu']} (one thread, batch 1,"
        f" interleaved in one run for each network{busy}), ONNX Runtime {machine['onnxruntime']}.",
    ]
    return "\n".join(lines)


def _share(latencies: list[float]) -> str:
    """Mean and deviation of latencies over dense's, in per cent; the deviation only where there is one."""
    mean, deviation = mean_and_deviation(latencies)
    return f"{100 * mean:.1f}" + (f" \N{PLUS-MINUS SIGN} {100 * deviation:.1f}" if deviation else "") + " %"


def _measured(path: Path, benchmark: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: tests/benchmarks/{benchmark} makes it, as README.md says")
    return path


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": headline_block,
    "findings": findings_block,
    "variants": variants_block,
    "groups": groups_block,
    "claims": claims_block,
    "recipes": recipes_block,
    "training": training_block,
    "even_widths": even_widths_block,
}


def _machine(run: dict) -> str:
    machine, protocol = run["machine"], run["protocol"]
    busy = ", others were using the CPU" if run["busy"] else ""
    return (
        f"Timed on {machine['cpu']} ({_plural(protocol['threads'], 'thread')}, batch {protocol.get('batch', 1)},"
        f" interleaved in one run{busy}), ONNX Runtime {machine['onnxruntime']}, torch {machine['torch']}."
    )


def _over_control(params: Params, rows: list[dict], row: dict) -> str:
    """Points over the control of the same model and seed; empty without one."""
    control = control_of(params, row["variant"]) if row["variant"] in params.variants else None
    top1 = {other["variant"]: other["top1"] for other in rows}
    return points_text(row["top1"] - top1[control], 2) if control in top1 else ""


def _spread(values: list[float], write: Callable[[float], str]) -> str:
    """Mean and deviation; empty without values."""
    if not values:
        return ""
    mean, deviation = mean_and_deviation(values)
    return write(mean) + ("" if deviation is None else f" \N{PLUS-MINUS SIGN} {100 * deviation:.2f}")


def _points(value: float) -> str:
    return points_text(value, 2)


def _seeds(rows: list[dict]) -> str:
    return _plural(len({row["seed"] for row in rows}), "seed")


def _p_words(rows: list[dict]) -> str:
    """p-values belong to groups of seeds, the other figures of a row to one."""
    return "p over all seeds" if len({row["group"] for row in rows}) < len(rows) else "p"


def _plural(count: int, noun: str) -> str:
    return f"{'one' if count == 1 else count} {noun}{'s' * (count != 1)}"


def main() -> None:
    if not README.exists():
        raise UserError(f"{README.resolve()} is missing: run this at the top of the checkout, not in a profile")
    text = README.read_text(encoding="utf-8")
    write_text(README, filled(text, Path(".")))


if __name__ == "__main__":
    run_stage(main)
