"""Where the newest events of each user lie, for whoever answers next: in a file of this machine, or in Redis.

The file is a SQLite database with a write-ahead log: all processes of a machine read it while one writes,
what was committed outlives each of them, and a read costs no hop. (A Ray actor would: about a millisecond a
call, and it takes what it holds with it.) It is one machine's: several need Redis.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from recray.errors import ConfigError, RecrayError
from recray.feedback.events import KEEP, REMEMBER, Event, Kept

BUSY_S = 2.0  # what a write waits for another process's
REDIS = ("redis://", "rediss://")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, id TEXT NOT NULL, item TEXT NOT NULL,
  time REAL NOT NULL, weight REAL NOT NULL, UNIQUE (user, id));
CREATE INDEX IF NOT EXISTS in_turn ON events (user, time, seq);
"""
_READ = """SELECT item, time, weight FROM events WHERE user = ? ORDER BY time DESC, seq DESC LIMIT ?"""
_WRITE = "INSERT OR IGNORE INTO events (user, id, item, time, weight) VALUES (?, ?, ?, ?, ?)"
_TRIM = """DELETE FROM events WHERE seq IN (
  SELECT seq FROM events WHERE user = ? ORDER BY time DESC, seq DESC LIMIT -1 OFFSET ?)"""


class StoreError(RecrayError):
    """A store that cannot be asked now."""


class Store(Protocol):
    """The newest `keep` events of each user, by time and then by arrival. Safe from several threads.

    Ten times as many are remembered, so that what is sent again long afterwards is known.
    Both methods block, and raise StoreError where the store cannot be reached.
    """

    def histories(self, users: Sequence[str]) -> list[list[Kept]]:
        """Of each user, oldest first; empty for one without events."""
        ...

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Keep all of them or, when it raises, perhaps some; tells which were not known before.

        The same id of the same user changes nothing, so a caller who heard nothing sends them again.
        """
        ...

    def close(self) -> None: ...


def open_store(where: str, *, keep: int = KEEP) -> Store:
    """Redis for a URL of it, else SQLite in that folder. Raises ConfigError for what cannot be either."""
    if where.startswith(REDIS):
        from recray.feedback.redis_store import RedisStore

        return RedisStore(where, keep=keep)
    if "://" in where:
        raise ConfigError(
            "is no place for the state", where=where.partition("://")[0], fix="give a folder or redis://HOST"
        )
    return SqliteStore(Path(where), keep=keep)


class SqliteStore:
    """Events in `folder`/state.sqlite; a connection a thread."""

    def __init__(self, folder: Path, *, keep: int = KEEP) -> None:
        self._path, self._keep = folder / "state.sqlite", keep
        self._mine = threading.local()
        self._all: list[sqlite3.Connection] = []
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):  # closing it would end this process's locks on it
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self._path.chmod(0o600)  # SQLite gives what it writes beside it the same rights
            self._connection()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise ConfigError(
                f"cannot hold the state ({error})", where=folder, fix="choose another --state"
            ) from None

    def histories(self, users: Sequence[str]) -> list[list[Kept]]:
        """See `Store`."""
        with _told():
            ask = self._connection().execute
            return [[Kept(*line) for line in ask(_READ, (user, self._keep))][::-1] for user in users]

    def append(self, events: Sequence[Event]) -> list[bool]:
        """See `Store`; here all or none."""
        with _told():
            made = self._connection()
            made.execute("BEGIN IMMEDIATE")
            try:
                new = [
                    made.execute(_WRITE, (e.user, e.id, e.item, e.time, e.weight)).rowcount > 0
                    for e in events
                ]
                for user in {event.user for event in events}:
                    made.execute(_TRIM, (user, REMEMBER * self._keep))
                made.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    made.execute("ROLLBACK")
                raise
            return new

    def close(self) -> None:
        """Close the connections of all threads; none may be at work."""
        while self._all:
            self._all.pop().close()

    def _connection(self) -> sqlite3.Connection:
        made: sqlite3.Connection | None = getattr(self._mine, "made", None)
        if made is None:
            made = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._all.append(made)
            _patiently(made)
            self._mine.made = made
        return made


def _patiently(made: sqlite3.Connection) -> None:
    """Set up a connection; SQLite does not wait by itself while another process does just that."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            made.execute("PRAGMA journal_mode = WAL")
            made.execute("PRAGMA synchronous = NORMAL")
            made.executescript(_SCHEMA)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"the state cannot be used now ({error})") from None
