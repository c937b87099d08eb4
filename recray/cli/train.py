"""Train a model on a dataset, in this process or data-parallel on Ray Train workers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, recipe_option, workers_option

EXAMPLE = "recray train runs/ml100k --recipe sasrec --workers 2 --set train.epochs=10 --out runs/sasrec"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("dataset", metavar="DATASET", help="what `recray prepare` left")
    recipe_option(parser)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting of the recipe: train.epochs=5, options.dim=128 (may be repeated)",
    )
    parser.add_argument(
        "--retriever", metavar="CHECKPOINT", help="train a ranker on this retriever's candidates"
    )
    parser.add_argument("--start", metavar="CHECKPOINT", help="go on from this one; pruned, if it is larger")
    parser.add_argument("--teacher", metavar="CHECKPOINT", help="learn what this one answers, too")
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    workers_option(parser, "Ray Train workers, 2-4 being as many as the cluster has room for", elastic=True)
    out_option(parser, "runs/checkpoint-RECIPE-DATASET")


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api

    others = [f"train.{role}={uri}" for role in ("start", "teacher") if (uri := vars(given)[role])]
    return made(
        api.train(
            given.dataset,
            recipe=given.recipe,
            workers=given.workers,
            gpu=given.gpu,
            retriever=given.retriever,
            set=[*given.set, *others],
            out=given.out,
        )
    )
