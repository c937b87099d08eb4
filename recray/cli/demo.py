"""Run the whole path on a synthetic world, ending with one table, report.json and report.html."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option

EXAMPLE = "recray demo --out demo-out"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="default demo-out")
    parser.add_argument("--quick", action="store_true", help="a smaller world, for a first look")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    report = api.demo(given.out, quick=given.quick)
    return Output(given.out, report)
