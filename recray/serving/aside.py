"""What needs a whole bundle and is asked seldom: reasons, and what new items would be.

It runs beside the requests, in a replica that has the models; what it makes travels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recray.bundles.answer import Request, Why
from recray.bundles.bundle import Bundle
from recray.bundles.changes import Changes, change
from recray.errors import InputError


def why(bundle: Bundle, asked: Request, rows: Sequence[int]) -> list[Why]:
    """Why each of these items has its score."""
    return [bundle.reasons(asked, int(row)) for row in rows]


def changed(bundle: Bundle, asked: Mapping[str, Any]) -> Changes | str:
    """All changes of the bundle after these (see `changes.change`); words where they cannot be made."""
    try:
        return change(bundle, **asked).changes or Changes()
    except InputError as error:
        return str(error)


WORK: Mapping[str, Callable[..., Any]] = {"why": why, "changed": changed}
