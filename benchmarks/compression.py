"""Models made smaller and faster, beside the usual ways of doing so.

tables     the table of a retriever in fewer bytes, and what that costs of NDCG
networks   an encoder and a ranker that are pruned, taught and quantized
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def tables(quick: bool) -> Iterator[Row]:
    """Codecs."""
    from benchmarks._codecs import table_rows

    return table_rows(quick)


def networks(quick: bool) -> Iterator[Row]:
    """Graphs, pruning and distillation."""
    from benchmarks._networks import network_rows

    return network_rows(quick)


WORKS: dict[str, Callable[[bool], Iterator[Row]]] = {work.__name__: work for work in (tables, networks)}


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Bytes of tables and speed of networks, each with what it costs of NDCG."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(main("compression", bench, works=tuple(WORKS)))
