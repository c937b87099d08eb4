"""Models made smaller and faster, beside the usual ways of doing so.

tables          the table of a retriever in fewer bytes, and what that costs of NDCG
networks        an encoder and a ranker that are pruned, taught and quantized, on MovieLens 100K;
                `--only encoder` or `--only ranker` runs one of them
networks-ml1m   the same on MovieLens 1M; hours, not in --quick
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from benchmarks.rows import Row, main


def tables(quick: bool, only: str = "") -> Iterator[Row]:
    """Codecs."""
    from benchmarks._codecs import table_rows

    return table_rows(quick)


def networks(quick: bool, only: str = "") -> Iterator[Row]:
    """Graphs, pruning and distillation."""
    from benchmarks._networks import network_rows

    return network_rows(quick, "ml100k", only)


def networks_ml1m(quick: bool, only: str = "") -> Iterator[Row]:
    """The same on a larger set."""
    from benchmarks._networks import network_rows

    return iter(()) if quick else network_rows(quick, "ml1m", only)


_ALL: tuple[Callable[[bool, str], Iterator[Row]], ...] = (tables, networks, networks_ml1m)
WORKS = {work.__name__.replace("_", "-"): work for work in _ALL}


def bench(quick: bool, work: str | None = None, only: str = "") -> Iterator[Row]:
    """Bytes of tables and speed of networks, each with what it costs of NDCG."""
    for name, rows in WORKS.items():
        if work in (None, name):
            yield from rows(quick, only)


if __name__ == "__main__":
    sys.exit(main("compression", bench, works=tuple(WORKS), choose=True))
