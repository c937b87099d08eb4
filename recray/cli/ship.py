"""Let a running server answer from another bundle, at once or for a share of the users first."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option

EXAMPLE = "recray ship runs/bundle-2 --canary 5%"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    what = "path or URI, as the server's machines reach it; or ITEMS.json: items to withdraw, restore or add"
    parser.add_argument("bundle", metavar="BUNDLE", help=what)
    share = "of the users who get it at first; without: all, also of a bundle on canary"
    parser.add_argument("--canary", metavar="5%", help=share)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default %(default)s)")
    parser.add_argument("--token-file", metavar="FILE", help="holds the admin's token")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api
    from recray.progress import say

    told = api.ship(given.bundle, canary=given.canary, url=given.url, token_file=given.token_file)
    say(told["why"])
    return Output(told["generation"], told)
