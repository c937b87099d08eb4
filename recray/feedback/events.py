"""An event, and what a user's events make of the history that a bundle holds of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KEEP = 500  # newest events of a user that a store holds
REMEMBER = 10  # times as many by which it knows an event that is sent again
LATEST_S = 86_400.0  # how far ahead of our clock an event's time may be, as `prepare` has it


class Event(NamedTuple):
    """One thing that one user did with one item.

    id: of the user's events; the same id again is the same event. time: seconds since 1970. A weight not
    above zero (something given back) is logged and is no part of a history, as in `prepare`.
    """

    user: str
    item: str
    time: float
    id: str
    weight: float = 1.0
    event: str = ""
    request_id: str = ""


class Kept(NamedTuple):
    """What a store tells of an event."""

    item: str
    time: float
    weight: float


def order(
    rows: NDArray[np.int32],
    times: NDArray[np.int64] | None,
    newer: NDArray[np.int32],
    at: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Where in rows, and newer behind them, the interactions of one history lie, oldest first, int64[L].

    rows int32[B], times int64[B] or None: the bundle's, oldest first; newer int32[E], at float64[E]: item
    rows and seconds of events, oldest first. An event that the bundle holds already, since it was trained
    on it, counts once: the same item in the same second. Where the bundle knows no times its items that
    were met again move to the end.
    """
    behind = np.arange(len(rows), len(rows) + len(newer))
    if not len(newer) or not len(rows):
        return np.arange(len(rows) + len(newer))
    if times is None:
        return np.concatenate([np.flatnonzero(~np.isin(rows, newer)), behind])
    seconds = np.floor(at).astype(np.int64)
    fresh = ~((newer[:, None] == rows) & (seconds[:, None] == times)).any(axis=1)
    both = np.concatenate([np.arange(len(rows)), behind[fresh]])
    # what came without a time stands behind what is older
    return both[np.argsort(np.concatenate([np.maximum.accumulate(times), at[fresh]]), kind="stable")]
