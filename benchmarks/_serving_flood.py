"""An open loop that asks for more than can be answered: what comes back, by status, and how late.

One thread with many kept connections, opened beforehand: a storm of new ones would overflow the queue of a
listener, which loses them for seconds, and would measure that. A request costs it some twenty microseconds,
since it shares the machine with what it measures. A latency counts from the moment a request was due.
"""

from __future__ import annotations

import re
import select
import socket
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
RETRY = re.compile(rb"retry-after: *(\d+)\r", re.IGNORECASE)
LAST_S = 60.0  # how long answers are waited for at the end
LINES = 512  # connections; who finds none free waits for one, and that counts
AT_ONCE, PAUSE_S = 16, 0.005  # how they are opened
WHOLE = b'"degraded":[]'


@dataclass
class Flood:
    """Seconds from due to answer of each 200; how many of them were whole; Retry-After of each 503 that has
    one; and what else came: other statuses, 503s without Retry-After, broken connections, no answer."""

    asked: int
    seconds: float
    took: list[float] = field(default_factory=list)
    whole: int = 0
    retry_after: list[int] = field(default_factory=list)
    other: dict[str, int] = field(default_factory=dict)
    late: float = 0.0  # the latest that a request was sent, in seconds after it was due

    @property
    def rps(self) -> float:
        """200s a second."""
        return len(self.took) / self.seconds

    def ms(self, quantile: float) -> float:
        """A quantile (0 .. 100) of the latencies of the 200s."""
        return float(np.percentile(np.array(self.took) * 1e3, quantile)) if self.took else float("nan")

    def note(self, head: bytes, body: bytes, took: float) -> None:
        """Count one answer."""
        status = head[9:12].decode("latin-1")
        retry = RETRY.search(head)
        if status == "200":
            self.took.append(took)
            self.whole += WHOLE in body
        elif status == "503" and retry is not None:
            self.retry_after.append(int(retry[1]))
        else:
            self.miss(status)

    def miss(self, why: str) -> None:
        """Count what is neither."""
        self.other[why] = self.other.get(why, 0) + 1


class _Line:
    """One kept connection, and the request that is out on it."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.due, self.got = 0.0, b""

    def ask(self, request: bytes, due: float) -> None:
        self.due, self.got = due, b""
        self.socket.send(request)  # small enough for the buffer of an idle connection

    def answer(self) -> tuple[bytes, bytes] | None:
        """(head, body) when it is all there. Raises OSError when the other side is gone."""
        part = self.socket.recv(1 << 18)
        if not part:
            raise ConnectionError
        self.got += part
        head, end, body = self.got.partition(b"\r\n\r\n")
        length = LENGTH.search(head) if end else None
        return (head, body) if length is not None and len(body) >= int(length[1]) else None


class _Pool:
    """All connections of a flood."""

    def __init__(self, url: str, bodies: Sequence[bytes], flood: Flood) -> None:
        at = urllib.parse.urlsplit(url)
        assert at.hostname is not None
        self._host, self._port, self._flood = at.hostname, at.port or 80, flood
        head = f"POST {at.path} HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
        self._requests = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
        self._poll = select.epoll()
        self.free: list[_Line] = []
        self.out: dict[int, _Line] = {}

    def fill(self, lines: int) -> None:
        """Have so many connections. Raises OSError where nobody listens."""
        while len(self.free) + len(self.out) < lines:
            line = _Line(self._host, self._port)
            self._poll.register(line.socket.fileno(), select.EPOLLIN)
            self.free.append(line)
            if len(self.free) % AT_ONCE == 0:
                time.sleep(PAUSE_S)

    def send(self, number: int, due: float, now: float) -> None:
        """Send one request."""
        try:
            if not self.free:
                self.fill(len(self.out) + 1)
            line = self.free.pop()
            line.ask(self._requests[number % len(self._requests)], due)
        except OSError as error:
            self._flood.miss(type(error).__name__)
            return
        self._flood.late = max(self._flood.late, now - due)
        self.out[line.socket.fileno()] = line

    def receive(self, wait_s: float) -> None:
        """Take what has come, waiting for at most so long."""
        for number, _ in self._poll.poll(max(0.0, wait_s)):
            line = self.out.get(number)
            if line is None:  # a free one that the other side has closed
                line = next(one for one in self.free if one.socket.fileno() == number)
                self.free.remove(line)
                line.socket.close()  # and so it is polled no more
                continue
            try:
                answer = line.answer()
            except BlockingIOError:
                continue
            except OSError as error:
                self._flood.miss(type(error).__name__)
                self.out.pop(number).socket.close()
                continue
            if answer is not None:
                self._flood.note(*answer, time.perf_counter() - line.due)
                self.free.append(self.out.pop(number))

    def close(self) -> None:
        """Count who was not answered, and let go."""
        for line in self.out.values():
            self._flood.miss("no answer")
            line.socket.close()
        for line in self.free:
            line.socket.close()
        self._poll.close()


def flood(
    url: str, bodies: Sequence[bytes], rate: float, seconds: float, *, lines: int = LINES, seed: int = 0
) -> Flood:
    """Requests at random moments, `rate` a second on average, whatever comes back. Raises OSError where
    nobody listens."""
    due = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, max(1, int(rate * seconds))))
    made = Flood(len(due), float(due[-1]))
    pool = _Pool(url, bodies, made)
    pool.fill(lines)
    start = time.perf_counter() + 0.05
    moments = (start + due).tolist()
    at, end = 0, moments[-1] + LAST_S
    try:
        while at < len(moments) or pool.out:
            now = time.perf_counter()
            if now > end:
                break
            while at < len(moments) and moments[at] <= now and len(pool.out) < lines:
                pool.send(at, moments[at], now)
                at += 1
            full = len(pool.out) >= lines or at == len(moments)
            pool.receive((end if full else moments[at]) - now)
    finally:
        pool.close()
    return made
