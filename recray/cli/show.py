"""Print what an artefact is: kind, hash, recipe, report, files, and what it was made from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from recray.cli.output import Output
from recray.cli.parsing import json_option
from recray.cli.text import table

EXAMPLE = "recray show runs/bundle"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("artefact", metavar="ARTEFACT", help="a folder or URI with a manifest.json")
    parser.add_argument("--trial", metavar="ID", help="of a search: one trial in full, by number or hash")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    found = api.show(given.artefact, trial=given.trial)
    parents = {
        f"made from {p['role']}": f"{p['uri']} ({p['hash'][:12]}, {p['found']})"
        for p in found.get("lineage", ())
    }
    return Output(table(_rows({**found, **parents})), found)


def _rows(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    for key, part in value.items():
        name = f"{before}{key}"
        if isinstance(part, Mapping) and part:
            yield from _rows(part, f"{name}.")
        elif isinstance(part, list) and any(isinstance(p, (list, Mapping)) for p in part):
            yield name, f"{len(part)} entries; --json shows them"
        else:
            yield name, "" if part is None or part in ({}, []) else part
