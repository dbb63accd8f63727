"""Try one network of each family of timm and torchvision: is it accepted, counted, exported and pruned?

Run:

    python -m benchmarks.networks                    # all families that benchmarks/results/networks.json lacks
    python -m benchmarks.networks --only timm/vgg timm/swin_transformer

A family is a module of the library that defines classifiers: `timm.list_modules()`, and the module of each entry of
torchvision's `list_models`. Its network is the one with the fewest parameters, apart from timm's `test_*`, untrained,
with 7 classes, at the first input size of 64, 96, 128 and the network's own that it accepts. Each step runs in a
process of its own with a limit of time and memory; a step that was killed is repeated only by `--only`. The results are
written after each step, and `docs/networks.md` gets its table from them at the end.
"""

import argparse
import contextlib
import copy
import json
import multiprocessing
import re
import resource
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from stages.common.errors import UserError, run_stage
from stages.common.files import write_json
from stages.networks.spec import NetworkSpec

if TYPE_CHECKING:
    from torch import nn

TOP = Path(__file__).parents[1]
RESULTS = TOP / "benchmarks/results/networks.json"
PAGE = TOP / "docs/networks.md"
PACKAGES = ("torch", "timm", "torchvision", "onnx", "onnxruntime")
SIZES = (64, 96, 128)
SECONDS = {"choose": 600, "count": 240, "visible": 240, "export": 240, "prune": 240}
MEMORY = 8 * 2**30  # bytes of private memory in a step's process
TOLERANCE = 0.01
EXPORTED = 1e-3  # largest difference of a logit, of the largest logit
NO_AUXILIARY = {"aux_logits": False, "init_weights": False}  # of torchvision's GoogLeNet and Inception


def families() -> dict[str, list[str]]:
    """Architectures by family, `library/module`."""
    import timm
    import torchvision

    found = {
        f"timm/{module}": timm.list_models(module=module, exclude_filters="test_*") for module in timm.list_modules()
    }
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found.setdefault(f"torchvision/{module}", []).append(name)
    return found


def arguments_of(library: str, architecture: str) -> dict[str, Any]:
    return NO_AUXILIARY if library == "torchvision" and architecture in ("googlenet", "inception_v3") else {}


def choose(library: str, architectures: list[str]) -> dict[str, Any]:
    """The architecture with the fewest parameters."""
    import torch

    from stages.networks.architectures import CLASSES, construct

    sizes = {}
    for name in architectures:
        for device in ("meta", "cpu"):  # some constructors compute, which the meta device cannot
            with contextlib.suppress(*[UserError] * (device == "meta")), torch.device(device):
                network = construct(library, name, arguments_of(library, name), CLASSES)
                sizes[name] = sum(p.numel() for p in network.parameters())
                break
    return {"architecture": min(sizes, key=lambda name: (sizes[name], name))}


def own_size(library: str, architecture: str) -> int:
    if library == "timm":
        import timm

        return timm.models.get_pretrained_cfg(architecture).input_size[-1]
    return 299 if architecture == "inception_v3" else 224


def spec_of(library: str, architecture: str) -> NetworkSpec:
    from stages.networks.architectures import CLASSES

    return NetworkSpec(library, architecture, arguments_of(library, architecture), CLASSES)


def count(library: str, architecture: str) -> dict[str, Any]:
    """The input size and the verdict of `edgewise check`; the counts, and those of torch."""
    from stages.networks.architectures import refused
    from stages.networks.build import build_network
    from stages.networks.products import uncountable
    from stages.profiling.counts import count_layers, totals

    arguments = arguments_of(library, architecture)
    for size in (*SIZES, own_size(library, architecture)):
        if (found := refused(library, architecture, arguments, {"input_size": size})) is None:
            break
    if found is not None:
        return {"input_size": size, "accepted": False, "reason": found[1]}
    if reason := uncountable(spec_of(library, architecture), size):
        return {"input_size": size, "accepted": False, "reason": reason}
    network = build_network(spec_of(library, architecture)).eval()
    total = totals(count_layers(network, size, {}))
    return {
        "input_size": size,
        "accepted": True,
        "params": total["params"],
        "params_torch": sum(p.numel() for p in network.parameters()),
        "macs": total["macs"],
        "macs_torch": torch_macs(network, size),
    }


def torch_macs(network: "nn.Module", size: int) -> int:
    """Half of torch's FLOPs for one image, without the operators that fuse products out of its sight."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.backends.mha.set_fastpath_enabled(False)  # a whole encoder layer
    for device in ("meta", "cpu"):  # the meta device lacks some operators
        twin = copy.deepcopy(network).to(device).requires_grad_(False)  # its tracker of modules fails on some views
        with (
            contextlib.suppress(*[Exception] * (device == "meta")),
            torch.device(device),
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),  # a whole recurrent layer
        ):
            with FlopCounterMode(display=False) as counter:
                twin(torch.zeros(1, 3, size, size))
            return counter.get_total_flops() // 2
    raise AssertionError("the CPU runs every network or raises")


def visible(library: str, architecture: str, size: int) -> dict[str, Any]:
    """The MACs that thop counts, which `profile` also reports."""
    from stages.networks.build import build_network
    from stages.profiling.counts import macs_visible

    return {"macs_visible": macs_visible(build_network(spec_of(library, architecture)), size)}


def export(library: str, architecture: str, size: int) -> dict[str, Any]:
    """Whether `model.onnx` gives the logits of the network for two random images."""
    import numpy as np
    import torch

    from stages.export.onnx_file import export_onnx
    from stages.export.session import open_session, session_logits
    from stages.networks.build import build_network
    from stages.networks.preprocess import Classifier, Preprocess

    torch.manual_seed(0)
    network = build_network(spec_of(library, architecture)).eval()
    classifier = Classifier(Preprocess([0.5] * 3, [0.25] * 3, size), network)
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            export_onnx(classifier, size, path)
            logits = session_logits(open_session(path, 1), pixels, 1)
        except UserError as error:
            return {"exported": False, "export_reason": str(error)}
    with torch.no_grad():
        expected = classifier(torch.from_numpy(pixels)).numpy()
    difference = float(abs(logits - expected).max() / abs(expected).max())
    return {"exported": difference < EXPORTED, "export_difference": difference}


def prune(library: str, architecture: str, size: int) -> dict[str, Any]:
    """The number of channel groups of the exact structured pruning."""
    import torch

    from stages.networks.build import build_network
    from stages.pruning.only_train_once_adapter import exact_groups

    torch.manual_seed(0)
    spec = replace(spec_of(library, architecture), layer_scale_folded=True)
    try:
        groups, _ = exact_groups(build_network(spec), spec, size, allow_partial=False)
    except UserError as error:
        return {"groups": 0, "prune_reason": str(error)}
    return {"groups": len(groups)}


def limited(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The step's result from a process of its own; `<step>_failed` says what stopped it."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(theirs, step, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS[step.__name__]):
            return {f"{step.__name__}_failed": f"takes more than {SECONDS[step.__name__]} s"}
        return ours.recv()
    except EOFError:
        return {f"{step.__name__}_failed": "the process died"}
    finally:
        process.kill()
        process.join()


def _answer(connection: Connection, step: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    try:
        connection.send(step(*arguments))
    except Exception as error:  # any failure of a library is a result
        lines = str(error).strip().splitlines() or [""]
        connection.send({f"{step.__name__}_failed": f"{type(error).__name__}: {lines[0][:120]}"})


def tried(step: Callable[..., dict[str, Any]], family: str, architectures: list[str], row: dict[str, Any]) -> None:
    """Add a step's result to the family's row, if the row lacks it and holds what the step needs."""
    library = family.partition("/")[0]
    if f"{step.__name__}_failed" in row or RESULT_OF[step] in row:
        return
    if step is choose:
        row |= limited(choose, library, architectures)
    elif step is count and "architecture" in row:
        row |= limited(count, library, row["architecture"])
    elif row.get("accepted"):
        row |= limited(step, library, row["architecture"], row["input_size"])
    print(json.dumps(row), flush=True)


RESULT_OF = {choose: "architecture", count: "accepted", visible: "macs_visible", export: "exported", prune: "groups"}
"""The key that each step adds, in the order of the steps."""


def counted(row: dict[str, Any]) -> bool:
    """Whether `check` accepts the network and the counts are those of torch."""
    pairs = (("params", 0.0), ("macs", TOLERANCE))
    return bool(row.get("accepted")) and all(
        abs(row[key] - row[f"{key}_torch"]) <= tolerance * row[f"{key}_torch"] for key, tolerance in pairs
    )


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = results["rows"]
    lines = []
    for library in ("timm", "torchvision"):
        own = [row for row in rows if row["family"].startswith(f"{library}/")]
        exports = [row for row in own if "exported" in row or "export_failed" in row]
        prunings = [row for row in own if "groups" in row or "prune_failed" in row]
        exported, pruned = (sum(bool(row.get(key)) for row in own) for key in ("exported", "groups"))
        lines.append(
            f"{library} {results['versions'][library]}: {sum(map(counted, own))} of {len(own)} families are accepted"
            f" and counted, {exported} of {len(exports)} tried are exported with the same logits, {pruned} of"
            f" {len(prunings)} tried are pruned exactly."
        )
    lines = ["\n\n".join(lines), ""]
    lines += ["| family | network | px | parameters | MACs | counts | ONNX | exact groups |"]
    lines += ["|---|---|---:|---:|---:|---|---|---|"]
    lines += [_line(row) for row in rows]
    others = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", f"Versions: {others}.", ""])


def _line(row: dict[str, Any]) -> str:
    if not row.get("accepted"):
        reason = row.get("reason") or row.get("count_failed") or row.get("choose_failed")
        network = f"`{row['architecture']}` | {row.get('input_size', '')}" if "architecture" in row else " | "
        return f"| {row['family']} | {network} | | | {_cell(reason)} | | |"
    macs = "yes" if counted(row) else f"torch counts {row['macs_torch']:,}"
    if row.get("exported"):
        onnx = "yes"
    elif "export_difference" in row:
        onnx = f"differs by {row['export_difference']:.1g}"
    else:
        onnx = _cell(row.get("export_reason") or row.get("export_failed"))
    groups = row.get("groups") or _cell(row.get("prune_reason") or row.get("prune_failed"))
    return (
        f"| {row['family']} | `{row['architecture']}` | {row['input_size']} | {row['params']:,} | {row['macs']:,} |"
        f" {macs} | {onnx} | {groups} |"
    )


def _cell(reason: str | None) -> str:
    """What a table says of a step that gave this reason, or none because it was not run."""
    if reason is None:
        return "not run"
    reason = re.sub(r"\x1b\[\d*m", "", reason)  # colors of a terminal
    reason = re.sub(r"\s+", " ", reason).replace("|", "/")
    return "no: " + (reason if len(reason) <= 140 else reason[:139] + "…")


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the table of these results between its two comments."""
    block = r"(<!-- families -->\n).*?(?=<!-- /families -->)"
    return re.sub(block, lambda found: found[1] + table(results), text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="family", help="try these again, e.g. timm/vgg")
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    arguments = parser.parse_args()
    versions = {name: version(name) for name in PACKAGES}
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done = {row["family"]: row for row in known["rows"]} if known.get("versions") == versions else {}
    found = families()
    if unknown := sorted(set(arguments.only or ()) - found.keys()):
        raise UserError(f"{unknown[0]!r}: the families are {', '.join(found)}")
    rows = {name: {"family": name} | done.get(name, {}) for name in found}
    for name in arguments.only or ():
        rows[name] = {"family": name}

    def run(task: tuple[Callable[..., dict[str, Any]], str]) -> None:
        step, family = task
        tried(step, family, found[family], rows[family])
        with lock:
            write_json(RESULTS, {"versions": versions, "rows": list(rows.values())})

    lock = Lock()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for step in RESULT_OF:
            list(pool.map(run, [(step, name) for name in arguments.only or found]))
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    run_stage(main)
