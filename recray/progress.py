"""Words and bars for people, on standard error; standard output is for artefacts' paths and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What long work reports to."""

    def update(self, n: float = 1) -> object: ...

    def set_postfix_str(self, s: str) -> object: ...


def say(words: str) -> None:
    """One line for a person."""
    print(words, file=sys.stderr, flush=True)


def warn(words: str) -> None:
    """One line for a person who should look."""
    print(f"warning: {words}", file=sys.stderr, flush=True)


@contextmanager
def bar(what: str, total: float | None = None, unit: str = "it") -> Iterator[Bar]:
    """A progress bar on a terminal; on a pipe, a line at the end and one every half minute."""
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=sys.stderr,
        mininterval=0.2 if interactive else 30.0,
        delay=0 if interactive else 30,
        leave=interactive,
        dynamic_ncols=True,
        unit_scale=True,
    ) as made:
        yield made
