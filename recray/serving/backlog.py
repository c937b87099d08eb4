"""Lines for a log that a thread writes a little later, so that no request waits for a disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from recray.errors import ConfigError
from recray.feedback.log import SegmentLog

log = logging.getLogger("recray.serving")
FLUSH_S = 0.05  # how long a line may wait to be written: what a killed replica loses
PENDING = 10_000  # lines that may wait

One = TypeVar("One")


def folder_for(what: str, folder: Path | None) -> Path:
    """The folder of the feedback, where a log that is wanted lies. Raises ConfigError where there is none."""
    if folder is None:
        raise ConfigError(
            "needs the folder of the feedback, and there is none", where=what, fix="give --feedback"
        )
    return folder


class Backlog(Generic[One]):
    """Things become lines by `line`, on the thread that writes them. One event loop owns it."""

    def __init__(self, into: SegmentLog, what: str, line: Callable[[One], Mapping[str, Any]]) -> None:
        """what: in the plural, for whoever reads the warnings."""
        self._log, self._what, self._line_of = into, what, line
        self._waiting: list[One] = []
        self._dropped = 0

    def add(self, one: One) -> None:
        """Have a line written soon; with too many that wait it is dropped, and counted."""
        if len(self._waiting) >= PENDING:
            self._dropped += 1
            return
        if not self._waiting:
            asyncio.get_running_loop().call_later(FLUSH_S, self._soon)
        self._waiting.append(one)

    def tidy(self) -> None:
        """Delete what is too old; blocks a little."""
        with contextlib.suppress(OSError):
            self._log.tidy()

    def close(self) -> None:
        """Write what waits, and finish the log."""
        self._flush(*self._taken())
        self._log.close()

    def _soon(self) -> None:
        taken = self._taken()
        try:
            asyncio.get_running_loop().run_in_executor(None, self._flush, *taken)
        except RuntimeError:  # the loop is ending, and its threads have
            self._flush(*taken)

    def _taken(self) -> tuple[list[One], int]:
        taken = self._waiting, self._dropped
        self._waiting, self._dropped = [], 0
        return taken

    def _flush(self, some: Sequence[One], dropped: int) -> None:
        try:
            self._log.write([self._line_of(one) for one in some])
        except OSError as error:
            dropped += len(some)
            log.warning("%s cannot be written: %s", self._what, error.strerror)
        if dropped:
            log.warning("%d %s were not logged", dropped, self._what)
