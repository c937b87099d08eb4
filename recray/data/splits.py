"""Which interactions are trained on, which choose a model and which judge it. Pure functions on sorted rows.

Codes: 0 train, 1 valid, 2 test, as in `columns.SPLITS`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TRAIN, VALID, TEST = 0, 1, 2
METHODS = ("leave-one-out", "time", "none")
SHARE = 0.1  # of all interactions, for each of valid and test in the split by global time
FEWEST = 3  # a user with fewer interactions stays whole in train


def leave_one_out(offsets: NDArray[np.int64]) -> NDArray[np.int8]:
    """int8[N] codes: each user's last interaction -> test, the one before -> valid.

    offsets int64[U + 1]: user u's interactions, oldest first, are rows offsets[u]:offsets[u + 1].
    """
    codes = np.zeros(int(offsets[-1] - offsets[0]), np.int8)
    last = (offsets[1:] - offsets[0])[np.diff(offsets) >= FEWEST]
    codes[last - 1] = TEST
    codes[last - 2] = VALID
    return codes


def time_ranks(n: int) -> tuple[int, int]:
    """0-based ranks, among n times in ascending order, of the first valid and the first test time."""
    return int(n * (1 - 2 * SHARE)), int(n * (1 - SHARE))


def time_cuts(times: NDArray[np.int64]) -> tuple[int, int]:
    """(first valid time, first test time) of int64[N] times in any order."""
    ranks = time_ranks(len(times))
    cut = np.partition(times, ranks)
    return int(cut[ranks[0]]), int(cut[ranks[1]])


def by_time(times: NDArray[np.int64], cuts: tuple[int, int]) -> NDArray[np.int8]:
    """int8[N] codes: before cuts[0] train, from cuts[1] on test, between them valid."""
    return (times >= cuts[0]).astype(np.int8) + (times >= cuts[1]).astype(np.int8)
