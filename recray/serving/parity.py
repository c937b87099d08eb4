"""Whether a bundle may take another's place: it knows what is asked for now, its answers are sound, and it
is not far slower. Everything here raises InputError with one line that says what is wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recray.bundles.bundle import Bundle, Front, Request
from recray.errors import InputError
from recray.serving.ingress import answered

USERS = 8  # whose answers are looked at
K = 20
TRIES_S = 5.0  # how long a bundle may try to be quick enough: what else the machine does is not its fault
KNOWN = 0.5  # share of the running catalogue that a new one must know
NEAR = 1e-3  # how far a batch's scores may lie from those of one request alone
SLOWER, SLACK_S = 3.0, 0.01  # a new bundle may take so many times as long, and a little more


def same_catalogue(new: Front, now: Front) -> None:
    """Refuse a bundle that would turn down what the running one answers."""
    for what, asked, known in (
        ("item column", _columns(now), _columns(new)),
        ("context column", set(now.context_values), set(new.context_values)),
    ):
        if asked - known:
            words = f"has no {what} {', '.join(sorted(asked - known))}, which requests may name now"
            raise InputError(words, where=new.generation)
    names = now.items.ids_of(range(0, len(now.items), max(1, len(now.items) // 10_000)))
    shared = float((new.items.rows_of(names) >= 0).mean()) if len(names) else 1.0
    if shared < KNOWN:
        words = f"knows {shared:.0%} of the items of the running generation, and {KNOWN:.0%} are needed"
        raise InputError(words, where=new.generation)


def sound(bundle: Bundle, *, beside: Bundle | None = None) -> float:
    """Warm a bundle up, look at its answers and at how long they take; returns seconds a batch."""
    asks = asked(bundle)
    for ask, line in zip(asks, answered(bundle, asks), strict=True):
        alone = bundle.answer(ask, bundle.recommender.recommend(**bundle.arguments(ask)))
        _check(bundle, ask, line.items, [item.score for item in alone.items])
    took = _seconds(bundle, asks)
    if beside is None:
        return took
    usual, theirs, end = math.inf, asked(beside), time.perf_counter() + TRIES_S
    while True:  # by turns, and the least of each counts
        usual = min(usual, _seconds(beside, theirs))
        if took <= usual * SLOWER + SLACK_S:
            return took
        if time.perf_counter() > end:
            words = f"takes {took * 1e3:.1f} ms for {len(asks)} requests, the running one {usual * 1e3:.1f}"
            raise InputError(words, where=bundle.generation)
        took = min(took, _seconds(bundle, asks))


def asked(bundle: Front) -> list[Request]:
    """Requests of users spread over those it knows, and of nobody."""
    n = len(bundle.users)
    users = [bundle.users.id_of(at) for at in range(0, n, max(1, n // USERS))][:USERS]
    return [bundle.request(user=user, k=K) for user in users] + [bundle.request(k=K)]


def _check(bundle: Bundle, ask: Request, items: Sequence[Mapping[str, Any]], alone: Sequence[float]) -> None:
    """One line of a batch against the same request alone."""
    rows = bundle.items.rows_of([item["item"] for item in items])
    scores = np.array([item["score"] for item in items], np.float64)
    allowed = bundle.allowed(ask)
    left = np.ones(len(bundle.items), bool) if allowed is None else allowed.copy()
    left[ask.exclude] = False
    if bundle.changes is not None:
        gone = bundle.items.rows_of(bundle.changes.withdrawn)
        left[gone[gone >= 0]] = False
    near = NEAR * max(1.0, *(abs(score) for score in alone), 1.0)
    wrong = ""
    if len(set(rows.tolist())) < len(rows):
        wrong = "names an item twice"
    elif (rows < 0).any() or not left[rows].all():
        wrong = "names an item that is unknown or barred"
    elif not np.isfinite(scores).all():
        wrong = "gives a score that is no number"
    elif (np.diff(scores) > 0).any():
        wrong = "does not give the best first"
    elif left.any() and not len(rows):
        wrong = "answers nothing where items are left"
    elif len(scores) != len(alone) or not np.allclose(scores, alone, rtol=0, atol=near):
        wrong = "answers a batch otherwise than one request alone"
    if wrong:
        raise InputError(wrong, where=bundle.generation)


def _seconds(bundle: Bundle, asks: Sequence[Request]) -> float:
    start = time.perf_counter()
    answered(bundle, asks)
    return time.perf_counter() - start


def _columns(front: Front) -> set[str]:
    return set() if front.item_features is None else set(front.item_features.column_names)
