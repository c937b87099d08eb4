"""An append-only log of JSON lines in segments, bounded by size and age; any number of processes write it.

`.events-<ms>-<id>.open`   a segment that a process writes; it holds the file's lock as long as it lives
`events-<ms>-<id>.jsonl`   a finished one, renamed from the former; the oldest are deleted

Lines are handed to the system one call at a time, so they outlive a killed process; the segment it leaves
is finished by whichever process looks next. This is the data that the next training reads: it names users.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from recray.errors import ConfigError, InputError

EVENTS, IMPRESSIONS = "events", "impressions"
FRESH_S = 2.0  # age at which an open segment has its lock, if it will ever have one
_LONGEST = 4 << 20  # bytes of one write
log = logging.getLogger("recray.feedback")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large and how old segments, and all finished ones of a kind together, may grow."""

    segment_bytes: int = 16 << 20
    segment_s: float = 300.0
    total_bytes: int = 4 << 30
    total_s: float = 90 * 86_400.0

    def __post_init__(self) -> None:
        if min(self.segment_bytes, self.segment_s, self.total_bytes, self.total_s) <= 0:
            raise ConfigError("each must be above 0", where="feedback limits")


class SegmentLog:
    """One process's end of the log `name` in `folder`. Safe from several threads."""

    def __init__(
        self, folder: Path, name: str, limits: Limits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError for a folder that cannot be written."""
        self._folder, self._name, self._limits, self._clock = folder, name, limits or Limits(), clock
        self._lock = threading.Lock()
        self._file, self._open, self._size, self._since = -1, folder, 0, 0.0
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._tidy()
        except OSError as error:
            raise ConfigError(f"cannot hold the feedback ({error.strerror})", where=folder) from None

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines; when it returns they outlive this process. Raises OSError, say of a full disk."""
        data = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
        if not data:
            return
        with self._lock:
            if self._file >= 0 and self._full(len(data)):
                self._finish()
                self._tidy()
            if self._file < 0:
                self._begin()
            self._size += len(data)
            try:
                if os.write(self._file, data) != len(data):
                    raise OSError("the line was cut")
            except OSError:
                self._finish()  # what comes next must not continue half a line
                raise

    def tidy(self) -> None:
        """Delete what is too old also while nothing is written. Raises OSError."""
        with self._lock:
            if self._file >= 0 and self._full(0):
                self._finish()
            self._tidy()

    def close(self) -> None:
        """Finish the segment that is open."""
        with self._lock:
            self._finish()

    def _full(self, more: int) -> bool:
        return (
            self._size + more > self._limits.segment_bytes
            or self._clock() - self._since >= self._limits.segment_s
        )

    def _begin(self) -> None:
        self._since, self._size = self._clock(), 0
        stem = f"{self._name}-{int(self._since * 1e3):013d}-{uuid.uuid4().hex[:8]}"
        self._open = self._folder / f".{stem}.open"
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
        self._file = os.open(self._open, flags, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _finish(self) -> None:
        if self._file >= 0:
            _finished(self._file, self._open)
            os.close(self._file)
            self._file = -1

    def _tidy(self) -> None:
        """Finish what killed processes left open, and delete the oldest beyond the limits."""
        for left in self._folder.glob(f".{self._name}-*.open"):
            with contextlib.suppress(OSError):
                if left == self._open or time.time() - left.stat().st_mtime < FRESH_S:
                    continue
                file = os.open(left, os.O_RDWR)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _finished(file, left)
                finally:
                    os.close(file)
        now, total = self._clock(), 0
        for path in sorted(self._folder.glob(f"{self._name}-*.jsonl"), reverse=True):
            with contextlib.suppress(OSError):
                total += path.stat().st_size
                if total > self._limits.total_bytes or now - path.stat().st_mtime > self._limits.total_s:
                    log.warning("the feedback log is full: dropping %s", path.name)
                    path.unlink()


def read(folder: str | os.PathLike[str], name: str) -> Iterator[dict[str, Any]]:
    """Every whole line of a log, segment by segment, oldest first, also of those that are open now.

    Raises InputError where there is no such folder, or for a line that is no JSON object.
    """
    where = Path(folder)
    if not where.is_dir():
        raise InputError("is no folder", where=where, fix="give the folder of events and impressions")
    stems = {path.name.removeprefix(".").rpartition(".")[0] for path in where.glob(f"{name}-*.jsonl")}
    stems |= {path.name.removeprefix(".").rpartition(".")[0] for path in where.glob(f".{name}-*.open")}
    for stem in sorted(stems):
        data = b""
        for path in (where / f".{stem}.open", where / f"{stem}.jsonl"):  # renamed meanwhile, or deleted
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                break
        for number, line in enumerate(data.split(b"\n")[:-1], 1):  # the last is empty, or not whole yet
            try:
                made = orjson.loads(line)
            except orjson.JSONDecodeError:
                made = None
            if not isinstance(made, dict):
                raise InputError("is no JSON object", where=f"{where / stem}.jsonl:{number}")
            yield made


def find(folder: str | os.PathLike[str], name: str, part: bytes, most: int = 1) -> list[dict[str, Any]]:
    """The newest whole lines of a log that hold `part` (quotes of a value are escaped in JSON, so a part with
    quotes of its own is a name and the beginning of its value), newest first."""
    found: list[dict[str, Any]] = []
    where = Path(folder)
    stems = {path.name.removeprefix(".").rpartition(".")[0] for path in where.glob(f"{name}-*.jsonl")}
    stems |= {path.name.removeprefix(".").rpartition(".")[0] for path in where.glob(f".{name}-*.open")}
    for stem in sorted(stems, reverse=True):
        for path in (where / f".{stem}.open", where / f"{stem}.jsonl"):  # renamed meanwhile, or deleted
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                end = data.rfind(b"\n")
                while len(found) < most and (at := data.rfind(part, 0, max(0, end))) >= 0:
                    start = data.rfind(b"\n", 0, at) + 1
                    found.append(orjson.loads(data[start : data.index(b"\n", at)]))
                    end = start
                break
        if len(found) >= most:
            break
    return found


def _finished(file: int, path: Path) -> None:
    """Rename a segment whose lock is held; an empty one goes, and so does half a line at the end."""
    with contextlib.suppress(FileNotFoundError):
        size = whole = os.fstat(file).st_size
        if size:
            with path.open("rb") as lines:
                lines.seek(max(0, size - _LONGEST))
                whole = max(0, size - _LONGEST) + lines.read().rfind(b"\n") + 1
        if not whole:
            path.unlink()
            return
        if whole < size:
            os.truncate(path, whole)
        os.rename(path, path.with_name(path.name.removeprefix(".").removesuffix(".open") + ".jsonl"))
