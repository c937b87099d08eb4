"""Racing: a plan's quality is asked of more and more users, for as long as it may still matter.

A plan races against a rival that is known to be no larger and, for all that is predicted, no slower. As soon
as the 95 % interval of the paired difference lies below zero the plan is beaten in everything, and the other
users are not asked. There are at most RUNGS looks, so one plan in about twelve that is as good as its rival
is let go too early (Maron & Moore 1994, with the paired t interval in place of Hoeffding's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from recray.metrics.interval import paired

RUNGS = 4  # the first is an eighth of the users, each other twice the one before
Values = NDArray[np.float64]


def rungs(n: int) -> list[int]:
    """Where the plan is looked at, in users: 2000 -> [250, 500, 1000, 2000]."""
    return sorted({max(1, n >> shift) for shift in range(RUNGS)})


def raced(ask: Callable[[NDArray[np.int64]], Values], n: int, rival: Sequence[float] | None) -> Values:
    """The values float64[m] of the first m of n users: all, or fewer where the rival is surely better.

    ask: rows int64[r] of users -> float64[r]. rival: its value for each of the n users, or None.
    """
    made = np.empty(0)
    for end in rungs(n) if rival is not None and len(rival) == n else [n]:
        made = np.concatenate([made, ask(np.arange(len(made), end))])
        if end < n and len(made) > 1 and rival is not None and paired(made, rival[:end]).high < 0:
            break
    return made
