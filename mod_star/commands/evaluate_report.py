"""What `mod-star evaluate` writes at the end: results.json and the tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mod_star.evaluation.intervals import Estimate
    from mod_star.evaluation.protocols import ProtocolOf
    from mod_star.evaluation.records import Records
    from mod_star.evaluation.tasks import Task


def report(
    task: Task, protocol: ProtocolOf, config: dict[str, Any], records: Records, out: Path, console: Console
) -> None:
    """Writes results.json and prints the tables."""
    from mod_star.evaluation.discrimination import ANY_RIGHT, any_right, discrimination, early_stop_gain
    from mod_star.evaluation.protocols import measures
    from mod_star.evaluation.records import RESULTS_FILE, write_json
    from mod_star.views.terminal import result_table

    done = list(records.by_id.values())
    estimates, oracle, told_apart, gain = measures(done), any_right(done), discrimination(done), early_stop_gain(done)
    if oracle is not None:
        estimates[ANY_RIGHT] = oracle
    results = {
        "task": task.name,
        "items": len(records.by_id),
        "headline": protocol.headline,
        "measures": {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()},
        "discrimination": {name: dataclasses.asdict(estimate) for name, estimate in told_apart.items()},
        "early_stop": {name: dataclasses.asdict(estimate) for name, estimate in gain.items()},
        "seconds": round(sum(record["seconds"] for record in records.by_id.values()), 3),
        "config": config,
    }
    write_json(out / RESULTS_FILE, results)
    title = f"{task.name}, {len(records.by_id)} questions"
    console.print(result_table(title, ("", "right", "95 % interval"), [_row(*entry) for entry in estimates.items()]))
    if told_apart:
        pairs = f"a right and a wrong branch of one question ({next(iter(told_apart.values())).n} questions)"
        columns = ("", "right one larger", "95 % interval")
        console.print(result_table(pairs, columns, [_row(*entry) for entry in told_apart.items()]))
    if gain:
        rows = [_row(*entry) for entry in gain.items()]
        console.print(result_table("stopping early", ("", "per cent", "95 % interval"), rows))
    console.print(f"records and results: {out}", markup=False, soft_wrap=True)


def _row(name: str, estimate: Estimate) -> tuple[str, str, str]:
    return name, f"{100 * estimate.value:.1f} %", f"{100 * estimate.low:.1f} – {100 * estimate.high:.1f}"
