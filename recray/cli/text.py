"""Values as text: strict JSON and plain tables; an option that is JSON."""

from __future__ import annotations

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def to_json(value: Any) -> str:
    """Strict JSON: numpy numbers become plain ones, NaN and infinities become null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def as_json(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f'{text!r} is no JSON object: write for example {{"stock": {{"min": 1}}}}')
    return found


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Left-aligned columns, two spaces between them, no trailing blanks."""
    cells = [[_cell(value) for value in row] for row in ([head] if head else [])]
    cells += [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells)


def because(reasons: Sequence[Any]) -> str:
    """The three strongest reasons (`bundles.answer.Reason`) in a few words."""
    return ", ".join(f"{r.item or 'a user like this'} {r.weight:+.3g}" for r in reasons[:3]) or "popularity"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
