"""Whether a run gives the speed-ups of the one before it: what no run can see of itself.

A process may lie differently in memory than the last one, and its baseline with it; within a run that is no drift.
"""

from dataclasses import dataclass
from typing import Any

from stages.edge.protocol import STEADY

SAME = ("target", "protocol")
SAME_MACHINE = ("cpu", "architecture", "instruction_sets", "usable_cores", "affinity", "python", "onnxruntime", "torch")
"""Of two runs that can be compared."""


@dataclass(frozen=True)
class Repeat:
    run_id: str
    """Of the run before."""
    compared: int
    """Rows of the same model.onnx in the same runtime, against the same baseline."""
    largest: float
    """Largest change of a speed-up, as a share."""
    apart: list[str]
    """Rows whose speed-up changed by more than `STEADY`."""


def repeat_of(result: dict[str, Any], before: object) -> Repeat | None:
    """Compare the `latency_ratio` of a run's rows with those of the run before; both as `edge.json` has them.

    Returns:
        None where there is no run before of the same files on the same machine by the same protocol.
    """
    if not isinstance(before, dict) or any(before.get(key) != result[key] for key in SAME):
        return None
    machines = [run.get("machine") or {} for run in (before, result)]
    if any(machines[0].get(key) != machines[1].get(key) for key in SAME_MACHINE):
        return None
    former = {_same(row): row["latency_ratio"] for row in before.get("rows", ()) if "latency_ratio" in row}
    changes = {
        f"{row['variant']} in {row['runtime']}": abs(row["latency_ratio"] / former[_same(row)] - 1)
        for row in result["rows"]
        if _same(row) in former and (row["variant"], row["runtime"]) != (row["baseline"], row["baseline_runtime"])
    }
    if not changes:
        return None
    apart = [name for name, change in changes.items() if change > STEADY]
    return Repeat(str(before["run_id"]), len(changes), max(changes.values()), apart)


def _same(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row.get(key) for key in ("variant", "runtime", "onnx_sha256", "baseline", "baseline_runtime"))
