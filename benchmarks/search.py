"""The search under a budget, beside Ray Tune with Optuna as it ships and random search.

planted   a made-up problem with a known constrained optimum
gowalla   seconds to 95 % of the final hypervolume on a packed retriever, and the latency model's error;
          `--only 0` runs that seed alone (of 0, 1 and 2, each about a quarter of an hour)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def planted(quick: bool, only: str = "") -> Iterator[Row]:
    """How far below a known optimum."""
    from benchmarks._search_planted import planted_rows

    return planted_rows(quick)


def gowalla(quick: bool, only: str = "") -> Iterator[Row]:
    """Hypervolume over time."""
    from benchmarks._search_gowalla import gowalla_rows

    return gowalla_rows(quick, only)


WORKS: dict[str, Callable[[bool, str], Iterator[Row]]] = {work.__name__: work for work in (planted, gowalla)}


def bench(quick: bool, work: str | None = None, only: str = "") -> Iterator[Row]:
    """Trials and seconds that a constrained search takes, beside others."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick, only)


if __name__ == "__main__":
    sys.exit(main("search", bench, works=tuple(WORKS), choose=True))
