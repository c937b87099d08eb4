"""Tables on disk: .safetensors files of row ranges, written and read a few MiB at a time.

A file holds the positions [start, stop) of a table (`layout.py` says which row each is): "weight" and
the optimizer's slots, first dimension stop - start. Ranges know nothing of ranks, so any number of
ranks reads what any other wrote. A table may fill the memory, so nothing here holds a second one:
bytes go from the tensors to the file and back through one chunk, and are hashed on the way.

The format is that of https://github.com/huggingface/safetensors (version 0.x): the header's length in
8 bytes, a header in JSON, the tensors' bytes without gaps.

Shapes: N rows of D floats, K rows of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recray.errors import ArtefactError
from recray.training.layout import Layout

FRESH = "delete the folder to start anew"
CHUNK = 4 << 20  # bytes that are moved at a time
BUCKET = 256 << 20  # bytes that sorting a piece of a table may take
_LONGEST_HEADER = 100 << 20  # bytes, as in the format's own reader
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Part(NamedTuple):
    """One file of a table: the positions [start, stop)."""

    start: int
    stop: int
    file: str


class Weights(NamedTuple):
    """A whole table: chunks [K, D] of any float dtype, in order of positions, each good until the next."""

    num_rows: int
    dim: int
    chunks: Iterator[Tensor]


class Chunk(NamedTuple):
    """Neighbouring rows of a tensor in a file. `rows` is overwritten when the next chunk is read."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    first: int  # row of the tensor that `rows` begins with
    rows: Tensor  # [K, *shape[1:]]; a scalar is one row of no dimension


def file_name(table: str, start: int, stop: int) -> str:
    """The file of a table's positions [start, stop)."""
    return f"table-{table}-{start}-{stop}.safetensors"


def parts_of(files: Iterable[str], table: str, num_rows: int, *, where: object = None) -> list[Part]:
    """The files among `files` that hold `table`, in order.

    Raises ArtefactError unless each of the positions [0, num_rows) is in exactly one of them.
    """
    pattern = re.compile(rf"table-{re.escape(table)}-(\d+)-(\d+)\.safetensors")
    found = [(match, name) for name in files if (match := pattern.fullmatch(name))]
    parts = sorted(Part(int(match[1]), int(match[2]), name) for match, name in found)
    at = 0
    for part in parts:
        if part.start != at or part.stop <= at:
            break
        at = part.stop
    else:
        if at == num_rows:
            return parts
    raise ArtefactError(
        f"its files of table {table!r} do not fit together at position {at} of {num_rows}",
        where=where,
        fix=FRESH,
    )


def write_rows(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of any device into one file, a chunk at a time; gives the sha256 of the file.

    Raises OSError as the file system does, ValueError for a dtype that the format does not have.
    """
    header, offsets = _header({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
    made = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in offsets:
            for data in _bytes_of(tensors[name]):
                made.update(data)
                file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return made.hexdigest()


def read_chunks(path: Path, digest: str) -> Iterator[Chunk]:
    """Read a whole file in order; each tensor gives one chunk at least.

    Raises ArtefactError for a file that cannot be read and, after the last chunk, for one whose bytes
    are not those that `digest` (a sha256) was taken of: what was read is not to be used then.
    """
    try:
        with path.open("rb") as file:
            made = hashlib.sha256()
            entries = _read_header(file, made)
            largest = max((_row_bytes(dtype, shape) for _, dtype, shape in entries), default=0)
            buffer = torch.empty(max(CHUNK, largest), dtype=torch.uint8)
            for name, dtype, shape in entries:
                count, size = (shape[0] if shape else 1), _row_bytes(dtype, shape)
                step = max(1, len(buffer) // size if size else count)
                for first in range(0, max(count, 1), step):
                    rows = min(step, count - first)
                    data = buffer[: rows * size]
                    if file.readinto(_flat(data)) != len(data):
                        raise ValueError("it is cut short")
                    made.update(_flat(data))
                    yield Chunk(name, shape, first, data.view(dtype).view(rows, *shape[1:]))
    except FileNotFoundError:
        raise ArtefactError("is missing", where=path, fix=FRESH) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ArtefactError(f"cannot be read ({error})", where=path, fix=FRESH) from None
    if made.hexdigest() != digest:
        raise ArtefactError("was altered since it was written", where=path, fix=FRESH)


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises ArtefactError for a file that is missing or altered."""
    found: dict[str, Tensor] = {}
    for name, shape, first, rows in read_chunks(path, digest):
        if first == 0:
            found[name] = torch.empty(shape, dtype=rows.dtype)
        whole = found[name] if shape else found[name].view(1)
        whole[first : first + len(rows)].copy_(rows)
    return found


def read_rows(
    folder: Path,
    files: Mapping[str, str],
    table: str,
    num_rows: int,
    start: int,
    stop: int,
    into: Mapping[str, Tensor],
) -> None:
    """Fill local tensors with the positions [start, stop) of a table of `num_rows` rows.

    `files` maps the names of a folder's files to their sha256. `into` holds "weight" [stop - start, D]
    and slots of stop - start rows, on any device; what the files hold beyond `into` is left.

    Raises ArtefactError when a file is missing or altered or holds another shape, dtype or slot, and
    ValueError for a range that is not in the table. After an error `into` is not to be used.
    """
    if not 0 <= start <= stop <= num_rows or any(len(tensor) != stop - start for tensor in into.values()):
        raise ValueError(f"positions {start} to {stop} of {num_rows}, into other numbers of rows")
    for part in parts_of(files, table, num_rows, where=folder):
        if part.start < stop and start < part.stop:
            _read_part(folder / part.file, files[part.file], part, start, stop, into)


@torch.no_grad()
def _read_part(
    path: Path, digest: str, part: Part, start: int, stop: int, into: Mapping[str, Tensor]
) -> None:
    """Copy what one file and [start, stop) share."""
    seen = set()
    for name, shape, first, rows in read_chunks(path, digest):
        goal = into.get(name)
        if goal is None:
            continue
        seen.add(name)
        want = (part.stop - part.start, *goal.shape[1:])
        if (rows.dtype, shape) != (goal.dtype, want):
            raise ArtefactError(
                f"{name} is {rows.dtype}{list(shape)}, not {goal.dtype}{list(want)}", where=path, fix=FRESH
            )
        at = part.start + first  # position of the chunk's first row
        low, high = max(at, start), min(at + len(rows), stop)
        if low < high:
            goal[low - start : high - start].copy_(rows[low - at : high - at])
    if lacks := sorted(set(into) - seen):
        raise ArtefactError(f"has no {', '.join(lacks)}", where=path, fix=FRESH)


def read_weights(folder: Path, files: Mapping[str, str], table: str, num_rows: int, dim: int) -> Weights:
    """The rows of a whole table, read while they are asked for. Raises ArtefactError as `read_rows` does."""

    def chunks() -> Iterator[Tensor]:
        for part in parts_of(files, table, num_rows, where=folder):
            path = folder / part.file
            for name, shape, _, rows in read_chunks(path, files[part.file]):
                if name == "weight":
                    if shape != (part.stop - part.start, dim):
                        raise ArtefactError(f"weight is {list(shape)}", where=path, fix=FRESH)
                    yield rows

    return Weights(num_rows, dim, chunks())


def write_model(goal: Path, dense: Mapping[str, Tensor], tables: Mapping[str, Weights]) -> None:
    """Write one file of dense tensors and whole tables, float32[N, D] in order of rows.

    Memory is bounded: positions scatter rows over the whole file, so a table is first dealt into
    buckets of neighbouring rows, each at its place in the file, and then every bucket is put in order.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in dense.items()}
    specs |= {name: (torch.float32, (rows, dim)) for name, (rows, dim, _) in tables.items()}
    header, offsets = _header(specs)
    with goal.open("wb+", buffering=0) as file:
        _put(file.fileno(), memoryview(header), 0)
        for name, tensor in dense.items():
            at = offsets[name]
            for data in _bytes_of(tensor):
                at += _put(file.fileno(), data, at)
        for name, (rows, dim, chunks) in tables.items():
            _write_table(file.fileno(), offsets[name], Layout(rows), dim, chunks)
        os.fsync(file.fileno())


def _write_table(file: int, offset: int, layout: Layout, dim: int, chunks: Iterator[Tensor]) -> None:
    """Deal rows [K, D] that come in order of positions into buckets, then sort each, in the file."""
    size = 4 * dim
    step = max(1, BUCKET // (2 * size + 32))  # rows of a bucket: twice themselves, four int64 for each
    buckets = range(0, layout.num_rows, step)
    filled = [first * size + offset for first in buckets]  # where each bucket's next row goes
    done = 0
    for rows_KD in chunks:
        bucket_K = layout.rows(torch.arange(done, done + len(rows_KD))) // step
        data = _flat(rows_KD.float()[bucket_K.argsort(stable=True)])
        start = 0
        for bucket, count in enumerate(bucket_K.bincount().tolist()):
            filled[bucket] += _put(file, data[start : start + count * size], filled[bucket])
            start += count * size
        done += len(rows_KD)
    if done != layout.num_rows:
        raise ValueError(f"{done} rows for a table of {layout.num_rows}")
    for first in buckets:
        rows = torch.arange(first, min(first + step, layout.num_rows))
        block_KD = torch.empty(len(rows), dim)
        if os.preadv(file, [_flat(block_KD)], offset + first * size) != block_KD.nbytes:
            raise OSError("a file that was just written is cut short")
        sorted_KD = torch.empty_like(block_KD)
        sorted_KD[layout.positions(rows).argsort()] = block_KD
        _put(file, _flat(sorted_KD), offset + first * size)


def _put(file: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at an offset; gives its length in bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
    return len(data)


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in chunks of rows. No copy is made of what is contiguous and on the CPU."""
    whole = tensor.detach() if tensor.dim() else tensor.detach().view(1)
    step = max(1, CHUNK // max(_row_bytes(whole.dtype, tuple(whole.shape)), 1))
    for first in range(0, len(whole), step):
        yield _flat(whole[first : first + step].cpu().contiguous())


def _flat(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, themselves."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _row_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape[1:])


def _header(specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where each tensor begins, in order: wide dtypes first, so that
    every tensor is aligned to its own."""
    entries: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in sorted(specs.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        if dtype not in _NAMES:
            raise ValueError(f"{name} is {dtype}, which a .safetensors file cannot hold")
        size = dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, places


def _read_header(file: Any, made: Any) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(name, dtype, shape) of the tensors in order of their bytes, which are read next.

    `made` hashes what is read. Raises ValueError and its like for what is not a whole file.
    """
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header is cut short")
    text = file.read(length)
    made.update(head + text)
    at, found = 0, []
    entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        end = at + dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or entry["data_offsets"] != [at, end]:
            raise ValueError(f"{name} is not where it should be")
        found.append((name, dtype, shape))
        at = end
    if 8 + length + at != size:
        raise ValueError("it is cut short" if 8 + length + at > size else "it is too long")
    return found
