"""Check this machine: Python, packages, cores, memory, disk, GPU, ports and, if asked, a Ray start."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option
from recray.cli.text import table

EXAMPLE = "recray doctor --ray"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--ray", action="store_true", help="start Ray, run one task, stop it again")
    parser.add_argument("--port", type=int, default=8000, help="the port to serve on (default 8000)")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    checks = api.doctor(ray=given.ray, port=given.port)
    rows = [(check.verdict, check.name, check.found) for check in checks]
    data = {"checks": [dict(zip(("verdict", "name", "found"), row)) for row in rows]}
    return Output(table(rows), data, code=int(any(check.verdict == "fail" for check in checks)))
