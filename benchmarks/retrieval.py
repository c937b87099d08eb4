"""Searching item vectors beside faiss: queries a second at equal recall.

scan               50k x 64, gaussian and trained vectors: the exact scan, faiss's, and its graph
million-gaussian   1M x 64: the best of ours beside the best of faiss's
million-trained    the same on the rows of a trained table
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def scan(quick: bool) -> Iterator[Row]:
    """Fifty thousand rows."""
    from benchmarks._retrieval import scan_rows

    return scan_rows(quick)


def million_gaussian(quick: bool) -> Iterator[Row]:
    """A million rows without structure."""
    from benchmarks._retrieval import million_rows

    return million_rows(quick, "gaussian")


def million_trained(quick: bool) -> Iterator[Row]:
    """A million rows like trained ones."""
    from benchmarks._retrieval import million_rows

    return million_rows(quick, "trained")


_ALL: tuple[Callable[[bool], Iterator[Row]], ...] = (scan, million_gaussian, million_trained)
WORKS = {work.__name__.replace("_", "-"): work for work in _ALL}


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Exact and approximate search beside faiss; --quick leaves out the million."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(main("retrieval", bench, works=tuple(WORKS)))
