"""Measure a checkpoint or a bundle on a held-out split; with a baseline, the paired differences too."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option

EXAMPLE = "recray evaluate runs/sasrec --baseline runs/popularity --json"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("artefact", metavar="CHECKPOINT|BUNDLE", help="what is measured")
    parser.add_argument("--data", metavar="DATASET", help="default: the dataset the manifest names")
    parser.add_argument("--split", default="test", choices=["valid", "test"], help="default test")
    parser.add_argument("--baseline", metavar="ARTEFACT", help="a checkpoint or bundle to compare with")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    report = api.evaluate(given.artefact, data=given.data, split=given.split, baseline=given.baseline)
    return Output(report.table(), report.as_dict())
