"""Pins, caps and diversity as they are asked for, checked and with rows in place of ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from recray.bundles.filters import Filters
from recray.data.ids import Ids
from recray.errors import InputError
from recray.retrieval.arrange import Rules

PIN = 'write an item id, or {"item": id, "place": number from 1}'
FIELDS = ("exclude", "filter", "context", "pin", "caps", "diversity")  # of a request, beside who and k
CAPS = 'write {"column": at most so many items of each value}'


def checked(
    k: int, pin: Any, caps: Any, diversity: Any, items: Ids, filters: Filters
) -> tuple[Rules | None, bool]:
    """(the rules, or None where nothing is asked for; whether every pinned id is known).

    Raises InputError for a form that is not one, a column nobody knows, a place behind the k-th or taken.
    """
    pins, known = _pins(k, pin, items)
    limits = _caps(caps, filters)
    apart = _diversity(diversity)
    if not (pins or limits or apart):
        return None, known
    return Rules(k, pins, limits, apart), known


def check_fields(asked: Mapping[str, Any]) -> None:
    """Raise InputError for a field that a request does not have."""
    for name in asked:
        if name not in FIELDS:
            raise InputError(f"a request has no field {name!r:.80}", fix=f"choose of {', '.join(FIELDS)}")


def _pins(k: int, given: Any, items: Ids) -> tuple[tuple[tuple[int, int], ...], bool]:
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"pin is {given!r:.80}", fix=f"give a list; {PIN}")
    asked: dict[str, int] = {}  # the first word on an item counts
    for one in given:
        name, place = _pin(one)
        if place > k:
            raise InputError(f"pin {name!r:.80} wants place {place} of {k}", fix="give a greater k")
        if place and place in [other for item, other in asked.items() if item != name]:
            raise InputError(f"two pins want place {place}", fix="give each its own")
        asked.setdefault(name, place)
    if len(asked) > k:
        raise InputError(f"{len(asked)} pins for {k} places", fix="pin fewer items, or give a greater k")
    rows = items.rows_of(list(asked)).tolist()
    made = tuple((place - 1, row) for place, row in zip(asked.values(), rows) if row >= 0)
    return made, len(made) == len(asked)


def _pin(one: Any) -> tuple[str, int]:
    """(id, place from 1, or 0 for the first that is free)"""
    name, place = one, 0
    if isinstance(one, Mapping):
        if not {"item"} <= set(one) <= {"item", "place"}:
            raise InputError(f"pin is {dict(one)!r:.80}", fix=PIN)
        name, place = one["item"], one.get("place", 0)
        if "place" in one and (not _whole(place) or place < 1):
            raise InputError(f"pin {name!r:.80} wants place {place!r:.80}", fix=PIN)
    if isinstance(name, bool) or not isinstance(name, (str, int, np.integer)):
        raise InputError(f"pin {name!r:.80} is not an id", fix=PIN)
    return str(name), int(place)


def _caps(given: Any, filters: Filters) -> tuple[tuple[str, int], ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise InputError(f"caps is {given!r:.80}", fix=CAPS)
    for column, most in given.items():
        filters.known(column, "cap")
        if not _whole(most) or most < 1:
            raise InputError(f"the cap on {column!r} is {most!r:.80}", fix="give a whole number from 1")
    return tuple(sorted((column, int(most)) for column, most in given.items()))


def _diversity(given: Any) -> float:
    number = isinstance(given, (int, float, np.number)) and not isinstance(given, bool)
    if not number or not math.isfinite(given) or not 0 <= given <= 1:
        raise InputError(f"diversity is {given!r:.80}", fix="give a number within 0 and 1")
    return float(given)


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
