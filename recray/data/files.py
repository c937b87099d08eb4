"""Files of logs: which there are, how they are compressed, their bytes."""

from __future__ import annotations

import contextlib
import functools
import lzma
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from recray.errors import InputError
from recray.storage import Place, place

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".inter", ".rating", ".json", ".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
_CHUNK = 16 << 20
T = TypeVar("T")


def list_files(logs: Sequence[Any]) -> list[Place]:
    """Files as given; of a folder all data files below it, by name. InputError where nothing is."""
    found: list[Place] = []
    for log in logs:
        where = place(log)
        if not where.exists():
            raise InputError("is not there", where=where, fix="check the path")
        if not where.is_dir():
            found.append(where)
            continue
        inside = _inside(where)
        if not inside:
            raise InputError("holds no data files", where=where, fix=f"known: {' '.join(SUFFIXES + PARQUET)}")
        found += inside
    if not found:
        raise InputError("no log was given", fix="name at least one file")
    return found


def _inside(folder: Place) -> list[Place]:
    from pyarrow import fs

    made = []
    for info in folder.fs.get_file_info(fs.FileSelector(folder.path, recursive=True)):
        name = info.path[len(folder.path.rstrip("/")) + 1 :]
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == fs.FileType.File and not hidden and suffix_of(name) in SUFFIXES + PARQUET:
            made.append(folder / name)
    return sorted(made, key=lambda p: p.path)


def suffix_of(name: str) -> str:
    """The suffix without the one of its compression."""
    name = name.lower()
    for packed in COMPRESSIONS:
        name = name.removesuffix(packed)
    dot = name.rfind(".")
    return name[dot:] if dot > name.rfind("/") else ""


def compression_of(where: Place, magic: bytes) -> str | None:
    """By the first bytes, which cannot lie as a name can."""
    for start, name in _MAGIC.items():
        if magic.startswith(start):
            return name
    if where.path.lower().endswith(tuple(COMPRESSIONS)):
        raise InputError("is not compressed as its name says", where=where, fix="rename or fetch it again")
    if magic.startswith(b"PK\x03\x04"):
        raise InputError("is a zip archive", where=where, fix="unpack it first")
    return None


def first_bytes(where: Place) -> bytes:
    """The first eight bytes."""
    with guarded(where, lambda: plain(where)) as file:
        return bytes(guarded(where, lambda: file.read(8)))


def head(where: Place, compression: str | None, size: int) -> tuple[bytes, bool]:
    """(the first `size` bytes of plain text, whether that is the whole file)."""
    text = b"".join(chunks(where, compression, min(size + 1, _CHUNK), stop=size + 1))
    return text[:size], len(text) <= size


def plain(where: Place) -> Any:
    """An opened file of bytes as they lie there, seekable."""
    return where.local.open("rb") if not where.remote else where.fs.open_input_file(where.path)


def _streams(where: Place, compression: str | None) -> list[Any]:
    """What was opened, the stream of plain bytes last."""
    raw = plain(where)
    if compression == "xz":
        return [raw, lzma.open(raw)]
    if compression:
        packed = raw if where.remote else pa.PythonFile(raw, mode="r")
        return [raw, pa.CompressedInputStream(packed, compression)]
    return [raw]


def guarded(where: Place, read: Callable[[], T]) -> T:
    """Call `read`; what a damaged file raises becomes an InputError."""
    try:
        return read()
    except (EOFError, lzma.LZMAError, OSError, pa.ArrowException) as error:
        if isinstance(error, PermissionError):
            raise InputError("may not be read", where=where) from None
        raise InputError(
            f"is cut off or damaged ({error})", where=where, fix="fetch the file again"
        ) from None


def chunks(
    where: Place, compression: str | None, size: int = _CHUNK, stop: int | None = None
) -> Iterator[bytes]:
    """The plain bytes of a file, at most `stop` of them. InputError where it is damaged or cut off."""
    with contextlib.ExitStack() as opened:
        streams = guarded(where, lambda: _streams(where, compression))
        stream = [opened.enter_context(s) for s in streams][-1]
        left = stop
        while left is None or left > 0:
            want = size if left is None else min(size, left)
            chunk = guarded(where, functools.partial(stream.read, want))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk
