"""Say before a training run what it takes: who holds what, bytes a worker, bytes sent, seconds a step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from recray.cli.output import Output
from recray.cli.parsing import json_option, recipe_option, workers_option
from recray.cli.text import table
from recray.cli.words import at_least, numbers

EXAMPLE = "recray plan --rows 1e9 --dim 64 --batch 2048 --lookups 20 --workers 64 --memory 64GiB"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    add = parser.add_argument
    add("dataset", metavar="DATASET", nargs="?", help="what `recray prepare` left; or give --rows")
    recipe_option(parser)
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the recipe")
    workers_option(parser, "Ray Train workers")
    add("--rows", type=float, metavar="N", help="plan one table of so many rows, without a dataset")
    add("--dim", type=at_least(1), default=64, metavar="N", help="of --rows: floats a row (default 64)")
    add("--batch", type=at_least(1), default=2048, metavar="N", help="of --rows: examples (default 2048)")
    add("--lookups", type=float, default=20, metavar="N", help="of --rows: ids an example (default 20)")
    add("--distinct", type=float, metavar="SHARE", help="of --rows: distinct ids (default: of uniform ids)")
    add("--memory", metavar="64GiB", help="of each worker (default: its share of what is free here)")
    add("--wire", metavar="10GB/s", help="what a worker sends (default: measured; with --memory 1.25GB/s)")
    add("--rates", type=numbers, metavar="NAME=N,...", help="bandwidth, row_s, id_s, flops, call_s, latency")
    add("--serve", action="store_true", help="DATASET is a bundle: hops, bytes and requests/s of serving it")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api
    from recray.serving import planning
    from recray.training.plan import RunPlan, size

    if given.serve:
        lines, data = planning.told(given.dataset)
        return Output(table(lines), data)
    kept = {k: v for k, v in vars(given).items() if k not in ("verb", "run", "json", "serve", "dataset")}
    made: RunPlan = api.plan(given.dataset, **kept)

    def bytes_of(parts: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)

    rows: list[tuple[str, object]] = [("workers", f"{made.ranks} with {size(made.machine.memory)} each")]
    for t, (start, stop) in zip(made.work.tables, made.holds(0).values()):
        rows.append((f"table {t.name}", f"{t.rows:,} x {t.dim} {t.dtype}, {stop - start:,} rows a worker"))
    rows.append(("memory a worker", f"{size(made.bytes)}: {bytes_of(made.memory)}"))
    rows.append(("sent a step", f"{size(sum(made.sent.values()))}: {bytes_of(made.sent)}"))
    parts = ", ".join(f"{name} {s * 1e3:.3g}" for name, s in made.seconds.items() if s)
    rows.append(("expected step", f"{made.step_s * 1e3:.3g} ms: {parts}"))
    rows.append(("lookups", f"{made.lookups:,.0f} a step, {made.lookups / made.step_s:,.0f} a second"))
    rows.append(("reckoned with", ", ".join(f"{k} {v:.3g}" for k, v in vars(made.machine).items())))
    return Output(table(rows), made.as_dict())
