"""Search a recipe's settings by Ray Tune: the best checkpoint and every trial."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, recipe_option, workers_option
from recray.cli.words import at_least

EXAMPLE = "recray tune runs/ml100k --recipe sasrec --space options.dim=32,64 train.lr=1e-4..1e-2 --trials 8"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("dataset", metavar="DATASET", help="what `recray prepare` left")
    recipe_option(parser)
    parser.add_argument(
        "--space",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=LO..HI",
        help="a range KEY=LO..HI or choices KEY=A,B,C of a recipe's setting",
    )
    parser.add_argument("--metric", default="ndcg@10", help="validation metric (default ndcg@10)")
    parser.add_argument("--trials", type=at_least(1), default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--scheduler",
        choices=("asha", "none"),
        default="asha",
        help="asha: of the trials that come to a rung only the best 1/ETA go on (default)",
    )
    parser.add_argument(
        "--grace",
        type=at_least(1),
        default=0,
        metavar="EPOCHS",
        help="to the first rung (default: 1/6 of all)",
    )
    parser.add_argument(
        "--eta", type=at_least(2), default=3, metavar="N", help="rungs lie at GRACE * N^k epochs (default 3)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a change that all trials share"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    workers_option(parser, "trials at once on Ray Tune")
    out_option(parser, "runs/search-RECIPE-DATASET")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    kept = {k: v for k, v in vars(given).items() if k not in ("verb", "run", "json", "dataset")}
    return made(api.tune(given.dataset, **kept))
