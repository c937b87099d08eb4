"""An answer that a running server kept, made again, and why its items are in it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option
from recray.cli.words import at_least

EXAMPLE = "recray why 3f2b8c1d --url http://127.0.0.1:8000"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("request_id", metavar="REQUEST_ID", help="of the answer")
    parser.add_argument("-k", type=at_least(1), default=10, help="items that are explained (default 10)")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default %(default)s)")
    parser.add_argument("--token-file", metavar="FILE", help="holds the token that the server asks for")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from types import SimpleNamespace

    from recray import api
    from recray.cli.text import because, table
    from recray.progress import say

    told = api.why(given.request_id, k=given.k, url=given.url, token_file=given.token_file)
    same = "the same again" if told["equal"] else "not the same again"
    degraded = ", ".join(told["answered"]["degraded"]) or "not degraded"
    say(f"generation {told['generation']}; {same}; {degraded}")
    reasons = {one["item"]: [SimpleNamespace(**each) for each in one["reasons"]] for one in told["reasons"]}
    rows = [
        (item["item"], item["score"], item["source"], because(reasons[item["item"]]))
        for item in told["answered"]["items"]
        if item["item"] in reasons
    ]
    return Output(table(rows, ["item", "score", "source", "because of"]), told)
