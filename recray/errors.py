"""The errors a user can meet: one line that says what, where and what to do.

The command line prints `str(error)` and exits with `error.exit_code`; nothing else of it is shown.
"""

from __future__ import annotations


class RecrayError(Exception):
    """Base of all errors of recray. The message is one line: what - where - what to do."""

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = _short(what)
        self.where = None if where is None else _short(str(where))
        self.fix = fix
        parts = [self.what.strip().rstrip(".")]
        if self.where:
            parts[0] = f"{self.where}: {parts[0]}"
        if fix:
            parts.append(fix.strip().rstrip("."))
        super().__init__(" ".join(". ".join(parts).splitlines()))

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments survive a process boundary
        return (_rebuild, (type(self), self.what, self.where, self.fix))


LONGEST = 400  # characters of each part; an id can be a million characters long


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 40]} ... ({len(text):,} characters)"


def _rebuild(cls: type[RecrayError], what: str, where: str | None, fix: str | None) -> RecrayError:
    return cls(what, where=where, fix=fix)


class InputError(RecrayError, ValueError):
    """What the user gave cannot be used: a file, a row, an option, a request."""

    exit_code = 2


class ConfigError(InputError):
    """An unknown or ill-typed setting, recipe or option."""


class ArtefactError(InputError):
    """A folder that is not the artefact it should be: missing, altered, of another kind."""


class BudgetError(RecrayError):
    """Nothing that was tried fits the budget; the message names the nearest and what is short."""
