"""Searching item vectors beside faiss: queries a second at equal recall.

scan      50k x 64, gaussian and trained vectors: the exact scan, faiss's, and its graph
million   1M x 64: the best of ours beside the best of faiss's
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def scan(quick: bool) -> Iterator[Row]:
    """Fifty thousand rows."""
    from benchmarks._retrieval import scan_rows

    return scan_rows(quick)


def million(quick: bool) -> Iterator[Row]:
    """A million rows."""
    from benchmarks._retrieval import million_rows

    return million_rows(quick)


WORKS: dict[str, Callable[[bool], Iterator[Row]]] = {work.__name__: work for work in (scan, million)}


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Exact and approximate search beside faiss; --quick leaves out the million."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(main("retrieval", bench, works=tuple(WORKS)))
