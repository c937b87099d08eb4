"""How a command fails: one line on standard error, and an exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from typing import NoReturn

from recray.errors import RecrayError

_OF_THE_USER = {  # a path that cannot be used as it was given
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EROFS,
    errno.ELOOP,
}  # fmt: skip


class Terminated(BaseException):
    """SIGTERM, raised so that everything is cleaned up as after Ctrl-C."""


def heed_sigterm() -> None:
    """Let SIGTERM raise `Terminated` in the main thread."""

    def terminate(number: int, frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def failed(error: BaseException) -> int:
    """Say what went wrong and return the status: 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 anything else."""
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", 128 + signal.SIGINT)
    if isinstance(error, Terminated):
        return _say("terminated", 128 + signal.SIGTERM)
    if isinstance(error, BrokenPipeError):  # the reader left: let the flush at exit go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    if isinstance(error, RecrayError):
        return _say(str(error), error.exit_code)
    if isinstance(error, OSError) and error.filename is not None and error.errno in _OF_THE_USER:
        return _say(f"{error.filename}: {error.strerror}", 2)
    if os.environ.get("RECRAY_TRACEBACK"):
        traceback.print_exception(error)
        return _say(f"{type(error).__name__}: {error}", 1)
    return _say(f"{type(error).__name__}: {error} (RECRAY_TRACEBACK=1 shows where)", 1)


def _say(words: str, status: int) -> int:
    told = " ".join(words.split())  # one line; and no control character of a file reaches the terminal
    print("recray: error:", "".join(c if c.isprintable() else "?" for c in told), file=sys.stderr, flush=True)
    return status
