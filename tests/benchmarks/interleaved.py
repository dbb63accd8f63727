"""Contenders timed in one run by the edge benchmark's protocol, for the benchmarks beside."""

from collections.abc import Sequence

from stages.edge.machine import EnergyMeter, RunWatch
from stages.edge.protocol import Contender, Protocol, measure, timed_rows


def timed_over(contenders: Sequence[Contender], protocol: Protocol, name: str) -> tuple[list[dict], dict[str, object]]:
    """A row for each contender, in their order, and the run's marks with the machine's state.

    Args:
        name: of the column that tells a contender's time over its baseline's: the protocol's own ratio is the other
            way round. The interval's ends follow as `<name>_low` and `<name>_high`.
    """
    watch = RunWatch.start()
    rows = timed_rows(contenders, measure(contenders, protocol, EnergyMeter()), protocol)
    marks, state = watch.finish()
    for row in rows:
        row[name] = 1 / row.pop("latency_ratio")
        high, low = 1 / row.pop("latency_ratio_low"), 1 / row.pop("latency_ratio_high")
        row |= {f"{name}_low": low, f"{name}_high": high}
    return rows, marks | state
