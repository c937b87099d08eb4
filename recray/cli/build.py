"""From logs to a bundle in one go, by the recipe of a domain: shop, video, news, finance and others."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, workers_option
from recray.cli.words import names, numbers, pairs

EXAMPLE = "recray build events.parquet --domain shop --items items.parquet --out runs/shop"
DOMAINS = "shop social video music news ads course finance health".split()  # noqa: SIM905, as domains.py


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("log", nargs="+", metavar="LOG", help="as of `recray prepare`")
    parser.add_argument("--domain", required=True, choices=DOMAINS, help="what is recommended")
    parser.add_argument("--items", metavar="FILE", help="item features, one row an item")
    parser.add_argument("--users", metavar="FILE", help="user features, one row a user")
    parser.add_argument("--columns", type=pairs, metavar="ROLE=NAME,...", help="as of `recray prepare`")
    parser.add_argument("--context", type=names, default=[], metavar="COL,...", help="columns to carry along")
    parser.add_argument(
        "--event-weights", type=numbers, metavar="view=1,buy=5", help="in place of the domain's own"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a change of both recipes"
    )
    workers_option(parser, "Ray Train workers", elastic=True)
    out_option(parser, "runs/DOMAIN")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray.domains import build

    kept = {k: v for k, v in vars(given).items() if k not in ("verb", "run", "json", "log") and v}
    return made(build(given.log, **kept).artefact)
