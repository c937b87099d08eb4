"""Words and bars for people, on standard error; standard output is for artefacts' paths and JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_EVERY_S = 30.0  # between the lines of a bar that is not on a terminal


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
    """A progress bar on a terminal; in a log, a line every half minute."""
    if not sys.stderr.isatty():
        yield _Lines(what, total, unit)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, leave=True, dynamic_ncols=True, unit_scale=True) as made:
        yield made


class _Lines:
    """The bar of a log: quiet for work that is soon done."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        self._what, self._unit = what, unit
        self._of = "" if total is None else f" of {total:,.0f}"
        self._done, self._note, self._said = 0.0, "", time.monotonic()

    def update(self, n: float = 1) -> None:
        self._done += n
        if time.monotonic() - self._said >= _EVERY_S:
            self._said = time.monotonic()
            say(f"{self._what}: {self._done:,.0f}{self._of} {self._unit} {self._note}".rstrip())

    def set_postfix_str(self, s: str) -> None:
        self._note = s
