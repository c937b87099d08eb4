"""Answer for one user or history without Ray, or for a file of users into Parquet."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output, made
from recray.cli.parsing import out_option, workers_option
from recray.cli.text import as_json, because, table
from recray.cli.words import at_least, names

EXAMPLE = "recray recommend runs/bundle --history 50,181,258 -k 5"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("bundle", metavar="BUNDLE", help="what `recray bundle` left")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", metavar="ID", help="a user of the dataset")
    who.add_argument("--history", type=names, metavar="A,B,C", help="items, oldest first")
    who.add_argument("--users", metavar="FILE", help="one user id a line; the answers go to --out")
    parser.add_argument("-k", type=at_least(1), default=10, metavar="N", help="items a user (default 10)")
    parser.add_argument(
        "--ask", type=as_json, default={}, metavar="JSON", help='more, such as {"filter": {"genre": "Drama"}}'
    )
    parser.add_argument("--why", action="store_true", help="also say what speaks for each item")
    workers_option(parser, "Ray workers for --users")
    out_option(parser, "runs/recommendations-BUNDLE, only with --users")


def run(given: Namespace) -> Output:
    """Call the verb."""
    import dataclasses

    from recray import api
    from recray.bundles.rules import check_fields
    from recray.manifest import Artefact

    check_fields(given.ask)
    answer = api.recommend(
        given.bundle,
        user=given.user,
        history=given.history,
        users=given.users,
        k=given.k,
        why=given.why,
        workers=given.workers,
        out=given.out,
        **given.ask,
    )
    if isinstance(answer, Artefact):
        return made(answer)
    head, rows = ["item", "score", "source"], [(i.item, i.score, i.source) for i in answer.items]
    told = [(because(why.reasons),) for why in answer.why] if given.why else [()] * len(rows)
    text = table([(*row, *more) for row, more in zip(rows, told)], head + ["because of"] * given.why)
    return Output(text, dataclasses.asdict(answer))
