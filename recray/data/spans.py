"""Cutting files into spans at whose borders a record ends, so that any worker reads any of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.parquet as pq

from recray.data.files import chunks, guarded, plain
from recray.data.formats import Source

BLOCK = 16 << 20  # bytes of plain text a block has


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of a plain file, row groups of a Parquet file, all of a compressed one."""

    source: Source
    start: int
    stop: int


def scan(source: Source, block: int = BLOCK) -> tuple[str, list[Span]]:
    """(sha256 of the file's bytes, its spans in order)."""
    made = hashlib.sha256()
    spans: list[Span] = []
    start = position = 0
    cutter = _Cutter(source.quoted)
    split = source.kind in ("delimited", "sequences", "jsonl") and not source.compression
    for chunk in chunks(source.place, None, block):
        made.update(chunk)
        if split:
            cut = cutter.last_end(chunk)
            if cut >= 0:
                spans.append(Span(source, start, position + cut))
                start = position + cut
        position += len(chunk)
    if source.kind == "parquet":
        with source.place.open() as file:
            groups = pq.read_metadata(file).num_row_groups
        spans = [Span(source, g, g + 1) for g in range(groups)]
    elif not split or start < position:
        spans.append(Span(source, start, position))
    return made.hexdigest(), spans


class _Cutter:
    """Finds where records end; a line break inside quotes ends none."""

    def __init__(self, quoted: bool) -> None:
        self.quoted, self.inside = quoted, False

    def last_end(self, chunk: bytes) -> int:
        """Position after the last record that ends in the chunk, -1 for none. Call it in order."""
        inside = self.inside
        if not self.quoted or b'"' not in chunk:
            return -1 if inside else chunk.rfind(b"\n") + 1 or -1
        self.inside = inside ^ bool(chunk.count(b'"') % 2)
        end, after = len(chunk), self.inside
        while (newline := chunk.rfind(b"\n", 0, end)) >= 0:
            after ^= bool(chunk.count(b'"', newline, end) % 2)
            if not after:
                return newline + 1
            end = newline
        return -1


def texts(span: Span) -> Iterator[bytes]:
    """The plain text of a span in pieces that end where a record ends."""
    source = span.source
    if not source.compression:
        with guarded(source.place, lambda: plain(source.place)) as file:
            file.seek(span.start)
            yield guarded(source.place, lambda: file.read(span.stop - span.start))
        return
    rest: list[bytes] = []
    cutter = _Cutter(source.quoted)
    for chunk in chunks(source.place, source.compression, BLOCK):
        cut = cutter.last_end(chunk)
        if cut >= 0:
            yield b"".join((*rest, chunk[:cut]))
            rest = [chunk[cut:]]
        else:
            rest.append(chunk)
    if any(rest):
        yield b"".join(rest)


def lines_before(span: Span) -> int:
    """Lines (rows in Parquet) of the file before the span. Reads that part of it, so ask for few spans."""
    where = span.source.place
    if span.source.kind == "parquet":
        with where.open() as file:
            meta = pq.read_metadata(file)
        return sum(int(meta.row_group(g).num_rows) for g in range(span.start))
    with plain(where) as file:
        starts = range(0, span.start, BLOCK)
        return sum(bytes(file.read(min(BLOCK, span.start - at))).count(b"\n") for at in starts)
