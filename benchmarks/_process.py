"""A peer, or ours, in a process of its own that works when told to: one JSON line in, one JSON line out.

A process of another environment cannot be called, and processes that run at once disturb each other. So
each is started, warms up and says so; then every measurement is one question to one of them at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from recray.progress import say

ROOT = Path(__file__).parents[1]
PEERS = Path(os.environ.get("RECRAY_PEERS", ROOT / ".venv-peers"))  # an environment a peer, by tools/peers.sh

Answer = dict[str, Any]


class PeerError(RuntimeError):
    """A process ended where an answer was awaited; the message ends with what it said last."""


class Worker:
    """One process, or the `ranks` of one, behind `ask`. Its standard error is kept for when it dies."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        env: Mapping[str, str] | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._folder = folder  # the processes' own, removed when they have ended
        self._said = [tempfile.TemporaryFile("w+") for _ in commands]  # noqa: SIM115 (closed in close)
        self._ranks = [
            subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            )
            for command, said in zip(commands, self._said)
        ]  # fmt: skip

    @cached_property
    def ready(self) -> Answer:
        """What the first rank said when it was warm; waits for all of them. Raises PeerError."""
        try:
            return self._answers()[0]
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Until all ranks are warm. Raises PeerError."""
        assert self.ready is not None

    @property
    def pids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def ask(self, **question: Any) -> list[Answer]:
        """Every rank's answer; the ranks get the question at once. Raises PeerError."""
        self.wait()
        for rank in self._ranks:
            assert rank.stdin is not None
            try:
                print(json.dumps(question), file=rank.stdin, flush=True)
            except BrokenPipeError:
                break  # why, the answers say
        return self._answers()

    def close(self) -> None:
        """End the processes: their input ends, and what has not gone by then is killed."""
        for rank, said in zip(self._ranks, self._said):
            for pipe in (rank.stdin, rank.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            try:
                rank.wait(10)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            said.close()
        if self._folder is not None:
            self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> list[Answer]:
        made = []
        for rank, said in zip(self._ranks, self._said):
            assert rank.stdout is not None
            line = rank.stdout.readline()
            if not line:
                said.seek(0)
                raise PeerError(
                    "".join(said.readlines()[-8:]).strip() or f"process {rank.pid} ended silently"
                )
            made.append(json.loads(line))
        return made


def peer_python(name: str) -> str | None:
    """The interpreter of a peer's environment, or None, said, where there is none."""
    python = PEERS / name / "bin" / "python"
    if python.is_file():
        return str(python)
    say(f"{name} is missing: no {python}; `make bench` makes it")
    return None


def serve(start: Callable[[], tuple[Answer, Callable[..., Answer]]]) -> None:
    """The other end: call `start` for (what to say when ready, how to answer), then answer until the end.

    Whatever a library prints goes to standard error, so that standard output holds answers only.
    """
    out: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ready, answer = start()
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)
