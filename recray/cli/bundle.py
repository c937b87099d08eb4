"""Pack a checkpoint, or the chosen trial of a search, into one immutable folder to serve from."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option
from recray.cli.text import as_json

EXAMPLE = "recray bundle runs/small --out runs/bundle"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("source", metavar="SEARCH|CHECKPOINT", help="what to pack")
    parser.add_argument("--trial", metavar="ID", help="a trial of the search instead of the chosen one")
    parser.add_argument("--ranker", metavar="CHECKPOINT", help="a ranker behind a retriever's checkpoint")
    parser.add_argument("--data", metavar="DATASET", help="default: the dataset the manifest names")
    parser.add_argument(
        "--filter", type=as_json, metavar="JSON", help='for all answers, such as {"stock": {"min": 1}}'
    )
    out_option(parser, "runs/bundle-SOURCE")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    made_bundle = api.bundle(
        given.source,
        trial=given.trial,
        ranker=given.ranker,
        data=given.data,
        filter=given.filter,
        out=given.out,
    )
    return made(made_bundle.artefact)
