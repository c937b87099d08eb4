"""Search compressed forms of a model under a latency and a size budget, by Ray Tune."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, workers_option
from recray.cli.words import at_least, numbers

EXAMPLE = "recray compress runs/sasrec --p99 10ms --size 64MB --trials 12 --out runs/small"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a trained retriever")
    parser.add_argument("--ranker", metavar="CHECKPOINT", help="a trained ranker behind it")
    parser.add_argument("--data", metavar="DATASET", help="default: the dataset the manifest names")
    parser.add_argument("--p99", required=True, metavar="10ms", help="99th percentile of an answer's latency")
    parser.add_argument(
        "--size", required=True, metavar="64MB", help="bytes of the files of tables, graphs and index"
    )
    parser.add_argument(
        "--rps", type=float, default=0, metavar="N", help="p99 at this load (default: 1 client)"
    )
    parser.add_argument("--cost-per-1k", type=float, metavar="X", help="of 1,000 recommendations, by --price")
    parser.add_argument(
        "--price", type=numbers, metavar="hour=0.10,cores=2,memory_gb=8", help="of a machine (default: that)"
    )
    help_ = "HTTP's share of p99 (default 0); lite, fast: measured once by serving with this profile"
    parser.add_argument("--http", metavar="2ms|lite|fast", help=help_)
    parser.add_argument("--trials", type=at_least(1), default=20, metavar="N", help="default 20")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    workers_option(parser, "trials at once on Ray Tune", default=1)
    out_option(parser, "runs/search-CHECKPOINT")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    kept = {k: v for k, v in vars(given).items() if k not in ("verb", "run", "json", "checkpoint")}
    return made(api.compress(given.checkpoint, **kept))
