"""`recray VERB ...`: parse, call one verb, print one artefact. Words go to standard error."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence

from recray import __version__
from recray.cli.failures import Terminated, failed, heed_sigterm
from recray.cli.output import Output
from recray.cli.parsing import Parser
from recray.cli.text import to_json

VERBS = [
    *("demo", "build", "prepare", "plan", "train", "evaluate", "tune", "compress", "bundle", "recommend"),
    *("serve", "ship", "rollback", "why", "refit", "show", "doctor"),
]
ABOUT = "From an interaction log to a recommender that answers inside a latency budget, on Ray."


def parser() -> Parser:
    """The whole command line; of a verb's file it imports only the options."""
    root = Parser(prog="recray", description=ABOUT, epilog="start with: recray demo")
    root.add_argument("--version", action="version", version=f"recray {__version__}")
    found = root.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for name in VERBS:
        module = importlib.import_module(f"recray.cli.{name}")
        about = (module.__doc__ or "").partition("\n")[0]
        made = found.add_parser(name, help=about, description=about, epilog=f"example:\n  {module.EXAMPLE}")
        module.options(made)
        made.set_defaults(run=module.run)
    return root


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, see `failed`; 0 is done."""
    if words is None:
        heed_sigterm()
    try:
        options = parser().parse_args(words)
        with contextlib.redirect_stdout(sys.stderr):  # no library may add to the artefact's path
            output: Output = options.run(options)
        if text := to_json(output.data) if vars(options).get("json") else output.text:
            print(text, flush=True)
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return failed(error)
    return output.code
