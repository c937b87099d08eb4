"""Feeding a step: the log in files that are mapped, not held; batches made while the step before runs.

Ranks draw windows at random from the whole log, and Parquet can only be decoded from the front. So each
column that is asked for is laid out once a machine as plain numbers, a row group at a time, in the user's
cache; the ranks map it and touch the pages their own windows lie in. What is laid out is an artefact: it
is checked when it is opened, and made again when it was damaged or swept.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from recray import columns as col
from recray.data.headers import CONTEXT
from recray.data.sequences import Histories
from recray.errors import ArtefactError, InputError
from recray.manifest import digest, open_artefact, write_artefact
from recray.storage import MANIFEST

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

T = TypeVar("T")

SMALL = 32 << 20  # bytes: a split up to this is decoded into memory, which is sooner done than laid out
KEEP_BYTES, KEEP_S = 64 << 30, 30 * 86_400.0  # what is older, or too much, goes when a new one is made
_OFFSETS = "offsets"  # int64[users + 1], the one column that is not read but counted
_KINDS = {col.ITEM_ROW: "<i4", col.TIME: "<i8", col.WEIGHT: "<f4", _OFFSETS: "<i8"}  # context: <i4
_FILE = "column.bin"
_OURS = re.compile(r"\.?[0-9a-f]{32}(\..*)?")  # a column, or what a killed process left of one
_mapped: weakref.WeakKeyDictionary[Dataset, dict[tuple[str, str], NDArray[Any]]] = weakref.WeakKeyDictionary()


def large(data: Dataset, split: str) -> bool:
    """Whether a split is laid out in files rather than held in memory. Data that has no report is held."""
    report = getattr(data, "report", None)
    rows = 0 if report is None else int(report["interactions"].get(split, 0))
    return rows > 0 and rows * (20 + 4 * len(data.context_sizes)) > SMALL


def histories(data: Dataset, split: str = "train", *, whole: bool = False) -> Histories:
    """`data.histories(split)`, of mapped arrays (read-only) where it is large.

    Those then have weights and times only with `whole`, since each is one more file.
    Raises InputError where there is no room for the files.
    """
    if not large(data, split):
        return data.histories(split)
    return Histories(
        column(data, split, col.ITEM_ROW),
        column(data, split, _OFFSETS),
        column(data, split, col.WEIGHT) if whole else None,
        column(data, split, col.TIME) if whole and data.has_times else None,
    )


def context(data: Dataset, split: str, names: Sequence[str]) -> dict[str, NDArray[np.int32]]:
    """Context column -> value rows int32[N] of all interactions, in the order of `histories`."""
    if not names:
        return {}
    if not large(data, split):
        held = data.interactions(split).context
        return {name: held[name] for name in names}
    return {name: column(data, split, CONTEXT + name) for name in names}


def column(data: Dataset, split: str, name: str) -> NDArray[Any]:
    """One column of a split that has interactions, mapped read-only; laid out first if it is not yet."""
    known = _mapped.setdefault(data, {})
    if (split, name) not in known:
        known[split, name] = _column(data, split, name)
    return known[split, name]


def _column(data: Dataset, split: str, name: str) -> NDArray[Any]:
    root = _root()
    folder = root / digest([data.artefact.hash, split, name])[:32]
    with _locked(root, fcntl.LOCK_SH):
        found = _open(folder)
    if found is None:
        with _locked(root, fcntl.LOCK_EX):
            found = _open(folder)  # another rank may have been first
            if found is None:
                _lay_out(data, split, name, folder)
                found = _open(folder)
    if found is None:
        raise _no_room(folder, "was written and cannot be read back")
    return found


def _open(folder: Path) -> NDArray[Any] | None:
    """The array of a column's folder, None where there is no sound one."""
    try:
        report = open_artefact(folder, "column").manifest.report
    except ArtefactError:
        return None
    os.utime(folder / MANIFEST)  # when it was last used
    with (folder / _FILE).open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages.madvise(mmap.MADV_RANDOM)  # a window is a fraction of a page: what lies behind it is not wanted
    return np.frombuffer(pages, report["dtype"])


def _lay_out(data: Dataset, split: str, name: str, folder: Path) -> None:
    rows = int(data.report["interactions"][split])
    kind = np.dtype(_KINDS.get(name, "<i4"))
    size = kind.itemsize * (data.n_users + 1 if name == _OFFSETS else rows)
    _sweep(folder.parent, KEEP_BYTES - size)
    shutil.rmtree(folder, ignore_errors=True)  # it was damaged

    def fill(scratch: Path) -> None:
        with (scratch / _FILE).open("wb") as file:
            if name == _OFFSETS:
                file.write(_offsets(data, split).astype(kind).data)
                return
            for values in _read(data, split, name):
                file.write(np.ascontiguousarray(values, kind).data)
        if (scratch / _FILE).stat().st_size != size:
            raise ArtefactError(f"does not have {rows:,} interactions in {split}", where=data.artefact.place)

    if shutil.disk_usage(folder.parent).free < size:
        raise _no_room(folder.parent, f"has no room for {size / 2**30:.1f} GiB of interactions")
    about = {"split": split, "column": name, "dtype": kind.str}
    try:
        write_artefact(folder, "column", fill, parents={"dataset": data.artefact}, report=about)
    except OSError as error:  # another filled the disk meanwhile
        raise _no_room(folder.parent, f"cannot be written ({error})") from None


def _no_room(root: Path, what: str) -> InputError:
    return InputError(what, where=root, fix="set XDG_CACHE_HOME to a folder of yours on a disk with room")


def _offsets(data: Dataset, split: str) -> NDArray[np.int64]:
    made = np.zeros(data.n_users + 1, np.int64)
    for users in _read(data, split, col.USER_ROW):  # ascending
        first, last = int(users[0]), int(users[-1])
        made[first + 1 : last + 2] += np.bincount(users - first)
    np.cumsum(made, out=made)
    return made


def _read(data: Dataset, split: str, name: str) -> Iterator[NDArray[Any]]:
    """The values of a column in order, a row group at a time; as Dataset has them where a part has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part, _, _ in data.report["parts"].get(split, ()):
        where = data.artefact.file(part)
        try:
            with where.open() as file:
                found = pq.ParquetFile(file)
                there = name in found.schema_arrow.names
                for g in range(found.num_row_groups):
                    if there:
                        yield found.read_row_group(g, columns=[name]).column(name).to_numpy()
                    else:
                        yield np.full(found.metadata.row_group(g).num_rows, float(name == col.WEIGHT))
        except (pa.ArrowException, OSError) as error:
            raise ArtefactError(f"cannot be read ({error})", where=where) from None


def _root() -> Path:
    """The folder of this machine's columns: in the user's cache, or where that cannot be used a temporary
    one. Ours and no link: what lies in it may be removed.
    """
    places = [Path(tempfile.gettempdir()) / f"recray-columns-{os.geteuid()}"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        places.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recray/columns")
    for root in places:
        with contextlib.suppress(OSError):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.is_symlink() or root.stat().st_uid != os.geteuid():
                continue
            with _locked(root, fcntl.LOCK_SH):
                return root
    raise _no_room(places[0], "cannot be written")


@contextlib.contextmanager
def _locked(root: Path, how: int) -> Iterator[None]:
    """Shared while a column is opened, exclusive while one is made or swept."""
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


def _sweep(root: Path, room: int) -> None:
    """Remove what nobody used for long, the longest unused beyond `room` bytes, and litter of the killed.

    Who has a column mapped keeps it: its pages go with the last map.
    """
    found = []
    for folder in root.iterdir():
        if not _OURS.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        sizes = [file.stat().st_size for file in folder.iterdir()]
        manifest = folder / MANIFEST
        whole = manifest.exists() and not folder.name.startswith(".")
        found.append((manifest.stat().st_mtime if whole else 0.0, sum(sizes), folder))
    for used, size, folder in sorted(found, reverse=True):
        room -= size
        if room < 0 or time.time() - used > KEEP_S:
            room += size
            shutil.rmtree(folder, ignore_errors=True)


class Prefetched(Iterator[T]):
    """What `source` yields, in its order, made by a thread up to `depth` ahead of who takes it.

    An error of the source is raised where its value would have come. `close` (or leaving a `with`, or
    dropping the last reference) ends the thread and closes the source.
    """

    def __init__(self, source: Iterator[T], depth: int = 2) -> None:
        self.waited = 0.0  # seconds that the taker waited, all together
        self._shelf: _Shelf[T] = _Shelf(depth)
        self._thread = threading.Thread(
            target=self._shelf.fill, args=(source,), daemon=True, name="recray-feed"
        )
        weakref.finalize(self, self._shelf.close)
        self._thread.start()

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            return self._shelf.take()
        finally:
            self.waited += time.perf_counter() - started

    def __enter__(self) -> Prefetched[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread; nothing is yielded afterwards."""
        self._shelf.close()
        self._thread.join(timeout=10)  # a source that hangs must not hold us up: the thread is a daemon


class _Shelf(Generic[T]):
    """What the thread and the taker share. The thread knows no `Prefetched`, so that one can be dropped."""

    def __init__(self, depth: int) -> None:
        self.depth, self.values = depth, deque[T]()
        self.changed = threading.Condition()
        self.closed = self.ended = False
        self.error: BaseException | None = None

    def fill(self, source: Iterator[T]) -> None:
        """In the thread: take from the source as long as there is room and somebody wants it."""
        try:
            while self._room():
                value = next(source)
                with self.changed:
                    self.values.append(value)
                    self.changed.notify_all()
                del value
            getattr(source, "close", lambda: None)()
        except StopIteration:
            pass
        except BaseException as error:
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _room(self) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.values) < self.depth)
            return not self.closed

    def take(self) -> T:
        """The next value; the source's error, or StopIteration, when there is none."""
        with self.changed:
            self.changed.wait_for(lambda: self.values or self.ended or self.closed)
            if self.values and not self.closed:
                self.changed.notify_all()
                return self.values.popleft()
            error, self.error = self.error, None
            if error is not None and not self.closed:
                raise error
            raise StopIteration

    def close(self) -> None:
        """Say that nothing more is wanted."""
        with self.changed:
            self.closed = True
            self.values.clear()
            self.changed.notify_all()
