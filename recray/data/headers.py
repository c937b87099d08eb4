"""Which column is what, by what the user said or by the headers logs usually have; and units of time."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from recray import columns as col
from recray.errors import InputError
from recray.storage import Place

CONTEXT = "context."  # prefix of the names of context columns
Unit = Literal["s", "ms", "us", "ns", "iso", "arrow", "none"]
_USUAL = {  # role -> headers we know, best first; compared without case, "_", "-" and spaces
    col.USER: ("user", "userid", "uid", "customer", "customerid", "visitorid", "sessionid", "reviewerid"),
    col.ITEM: ("item", "itemid", "iid", "movie", "movieid", "product", "productid", "stockcode", "articleid",
               "sku", "asin", "parentasin", "businessid", "songid", "trackid", "bookid", "isbn", "videoid"),
    col.TIME: ("time", "timestamp", "unixtime", "unixreviewtime", "ts", "datetime", "date", "eventtime",
               "invoicedate", "createdat"),
    col.WEIGHT: ("weight", "rating", "score", "overall", "stars", "strength"),
    col.EVENT: ("event", "eventtype", "behavior", "behaviortype", "action"),
}  # fmt: skip
_POSITIONS = {2: (col.USER, col.ITEM), 3: (col.USER, col.ITEM, col.WEIGHT),
              4: (col.USER, col.ITEM, col.WEIGHT, col.TIME)}  # fmt: skip


def plain_name(header: str) -> str:
    """`user_id:token`, as RecBole's atomic files write it, is `user_id`."""
    return re.sub(r":(token|token_seq|float|float_seq)$", "", header)


def resolve(
    where: Place, names: Sequence[str], given: Mapping[str, str], context: Sequence[str] = ()
) -> dict[str, str]:
    """role -> name in `names`, CONTEXT + column -> name for context. InputError names what is missing.

    Columns that the user gave are taken; user, item and time, and the rest when the user gave nothing,
    are looked for among the usual headers, or by position in a file without header.
    """
    chosen = {role: _find(where, name, names) for role, name in given.items()}
    bare = all(name.isdigit() for name in names)
    if not given and bare:
        for i, role in enumerate(_POSITIONS.get(len(names), _POSITIONS[2])):
            chosen[role] = str(i)
    for role in col.ROLES if not given else (col.USER, col.ITEM, col.TIME):
        if role not in chosen and not bare:
            free = [name for name in names if name not in chosen.values()]
            usual = usual_column(role, free)
            if usual is not None:
                chosen[role] = usual
    for role in (col.USER, col.ITEM):
        if role not in chosen:
            raise InputError(
                f"cannot tell which column is the {role}; it has {', '.join(names)}",
                where=where,
                fix=f"give --columns {role}=NAME",
            )
    if chosen[col.USER] == chosen[col.ITEM]:
        raise InputError(
            f"column {chosen[col.USER]!r} cannot be both user and item",
            where=where,
            fix=f"give --columns {col.USER}=NAME,{col.ITEM}=NAME",
        )
    for name in context:
        chosen[CONTEXT + name] = _find(where, name, names)
    return chosen


def _find(where: Place, name: str, names: Sequence[str]) -> str:
    plain = {plain_name(n): n for n in names}
    if name in names:
        return name
    if name in plain:
        return plain[name]
    if name.isdigit() and int(name) < len(names):
        return names[int(name)]
    close = difflib.get_close_matches(name, list(plain), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"has no column {name!r}", where=where, fix=f"{hint}It has: {', '.join(names)}")


def usual_column(role: str, names: Sequence[str]) -> str | None:
    """The column whose header is a usual one for the role, or None."""
    folded = {re.sub(r"[\s_\-]", "", plain_name(name)).lower(): name for name in reversed(names)}
    return next((folded[usual] for usual in _USUAL[role] if usual in folded), None)


def any_usual(names: Sequence[str]) -> bool:
    """Whether a header is one we know."""
    return any(usual_column(role, names) is not None for role in col.ROLES)


def is_number(text: str) -> bool:
    """Whether Python reads the text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def has_fractions(times: Sequence[str]) -> bool:
    """Whether a number among them is not written as a whole one."""
    return any(not t.strip().lstrip("+-").isdigit() for t in times if is_number(t))


def time_unit(values: Sequence[str]) -> Unit:
    """Seconds, milli-, micro- or nanoseconds since 1970 by their size; ISO text where most are no numbers."""
    numbers = [abs(float(v)) for v in values if is_number(v) and math.isfinite(float(v))]
    if not numbers or len(numbers) < len(values) / 2:
        return "iso" if values else "s"
    middle = float(np.median(numbers))
    limits: list[tuple[float, Unit]] = [(1e11, "s"), (1e14, "ms"), (1e17, "us")]
    return next((unit for limit, unit in limits if middle < limit), "ns")
