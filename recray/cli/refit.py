"""Train a bundle's models again, on its dataset and what its users did since."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, workers_option

EXAMPLE = "recray refit runs/bundle --events runs/state --out runs/bundle-2"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", metavar="BUNDLE", help="what `recray bundle` or `recray refit` left")
    parser.add_argument("--events", required=True, metavar="DIR", help="of `recray serve --feedback`")
    parser.add_argument("--data", metavar="DATASET", help="default: the dataset the manifest names")
    parser.add_argument("--fresh", action="store_true", help="begin with new weights")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the retriever's recipe"
    )
    workers_option(parser, "Ray Train workers")
    out_option(parser, "runs/bundle-BUNDLE-refit")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    left = api.refit(
        given.bundle,
        events=given.events,
        data=given.data,
        set=given.set,
        fresh=given.fresh,
        workers=given.workers,
        out=given.out,
    )
    return made(left.artefact)
