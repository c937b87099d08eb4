"""Training beside its peers: sharded tables (TorchRec), SASRec (RecTools), iALS (implicit), peak memory.

A peer lives in an environment of its own, which `make bench` makes (tools/peers.sh), and runs as a process
on the same work; ours and it take turns. The works:

tables         1 M x 64, 2,048 x 20 unpooled ids a step, row-wise Adagrad, at one and two ranks
pooled         the same, each sample's 20 rows summed
sasrec_ml1m    next-item predictions a second while training, and test quality; sasrec_beauty likewise
ials           ml1m_ncf, closed form
feed           the share of a step that waits for its batch, and the memory of a large log
memory         50 M x 64 on two ranks, checkpoint included
gpu            the tables' work on one GPU, where there is one
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def tables(quick: bool) -> Iterator[Row]:
    """Unpooled lookups."""
    from benchmarks._tables import table_rows

    return table_rows(quick)


def pooled(quick: bool) -> Iterator[Row]:
    """Pooled lookups."""
    from benchmarks._tables import pooled_rows

    return pooled_rows(quick)


def sasrec_ml1m(quick: bool) -> Iterator[Row]:
    """Long histories."""
    from benchmarks._sasrec import sasrec_rows

    return sasrec_rows("ml1m", quick)


def sasrec_beauty(quick: bool) -> Iterator[Row]:
    """Short histories."""
    from benchmarks._sasrec import sasrec_rows

    return sasrec_rows("s3rec_beauty", quick)


def ials(quick: bool) -> Iterator[Row]:
    """Closed form."""
    from benchmarks._ials import ials_rows

    return ials_rows(quick)


def feed(quick: bool) -> Iterator[Row]:
    """Waiting for batches, and what a large log takes."""
    from benchmarks._feed import feed_rows

    return feed_rows(quick)


def memory(quick: bool) -> Iterator[Row]:
    """A table that fills the machine."""
    from benchmarks._tables import memory_rows

    return memory_rows(quick)


def gpu(quick: bool) -> Iterator[Row]:
    """Unpooled lookups on a GPU."""
    from benchmarks._tables import gpu_rows

    return gpu_rows(quick)


WORKS: dict[str, Callable[[bool], Iterator[Row]]] = {
    work.__name__: work for work in (tables, pooled, sasrec_ml1m, sasrec_beauty, ials, feed, memory, gpu)
}


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Training beside TorchRec, RecTools and implicit; --quick has few rounds and no test quality."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(main("training", bench, works=tuple(WORKS)))
