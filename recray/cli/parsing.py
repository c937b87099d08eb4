"""What the verbs' parsers share: one-line errors, the example under the help, common options."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from recray.cli.words import at_least, crew
from recray.errors import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line InputError where argparse prints its usage."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        verb = self.prog.partition(" ")[2]
        raise InputError(message, where=verb or None, fix=f"see {self.prog} --help")


def json_option(parser: argparse.ArgumentParser) -> None:
    """`--json`, the same for every verb."""
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")


def out_option(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out`, whose default is named after the input, and `--json`."""
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=f"folder or URI of the result (default {default}); an older one of its kind there is replaced",
    )
    json_option(parser)


def recipe_option(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, the same for every verb that trains."""
    from recray.recipes import RECIPES

    words = f"one of {', '.join(RECIPES)}, or one tuned to a set, such as ease@lightgcn_gowalla"
    parser.add_argument("--recipe", default="sasrec", metavar="NAME", help=f"{words} (default sasrec)")


def workers_option(
    parser: argparse.ArgumentParser, what: str, default: int = 0, *, elastic: bool = False
) -> None:
    """`--workers`, 0 meaning this process and no Ray; `elastic` allows a range, too."""
    help_ = f"{what}; 0 is this process, without Ray (default {default})"
    kind, shape = (crew, "N|MIN-MAX") if elastic else (at_least(0), "N")
    parser.add_argument("--workers", type=kind, default=default, metavar=shape, help=help_)
