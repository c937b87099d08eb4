"""Let a running server answer from the generation before again, or without its canary."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from recray.cli.output import Output
from recray.cli.parsing import json_option

EXAMPLE = "recray rollback --url http://127.0.0.1:8000"


def options(parser: ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default %(default)s)")
    parser.add_argument("--token-file", metavar="FILE", help="holds the admin's token")
    json_option(parser)


def run(given: Namespace) -> Output:
    """Call the verb."""
    from recray import api
    from recray.progress import say

    told = api.rollback(url=given.url, token_file=given.token_file)
    say(told["why"])
    return Output(told["generation"], told)
