"""Make a dataset from interaction logs: read, check, map ids to rows, split, partition by user."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, workers_option
from recray.cli.words import names, numbers, pairs

EXAMPLE = "recray prepare ml-100k/u.data --columns user=0,item=1,weight=2,time=3 --out runs/ml100k"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("log", nargs="+", metavar="LOG", help="CSV, TSV, Parquet, JSON lines (.gz .xz .zst)")
    parser.add_argument("--items", metavar="FILE", help="item features, one row an item")
    parser.add_argument("--users", metavar="FILE", help="user features, one row a user")
    parser.add_argument("--links", metavar="FILE", help="links between users, one a row")
    parser.add_argument(
        "--columns",
        type=pairs,
        metavar="ROLE=NAME,...",
        help="where user, item, time, weight and event stand: a header, or a position counted from 0",
    )
    parser.add_argument("--context", type=names, default=[], metavar="COL,...", help="columns to carry along")
    parser.add_argument(
        "--event-weights", type=numbers, metavar="view=1,buy=5", help="weight of each kind of event"
    )
    parser.add_argument("--valid", metavar="FILE", help="a validation split that is given")
    parser.add_argument("--test", metavar="FILE", help="a test split that is given")
    parser.add_argument(
        "--split",
        default="leave-one-out",
        choices=["leave-one-out", "time", "none"],
        help="how to hold interactions out (default leave-one-out)",
    )
    parser.add_argument("--dedupe", action="store_true", help="keep one of equal interactions")
    parser.add_argument("--min-weight", type=float, metavar="W", help="leave out rows below W")
    workers_option(parser, "Ray Data workers")
    out_option(parser, "runs/dataset-LOG")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    kept = {k: v for k, v in vars(given).items() if k not in ("verb", "run", "json", "log")}
    return made(api.prepare(given.log, **kept).artefact)
