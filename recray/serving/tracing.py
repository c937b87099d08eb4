"""Where the time of single requests goes: spans in the form of OpenTelemetry, a line of JSON a request.

A request that comes with a sampled `traceparent` (W3C Trace Context) is traced as a part of that trace, one
with a parent that is not sampled is not, and of the others a share is, drawn by chance. Its spans are the
answer and, within it, `wait` (for a place in a batch), `retrieve` and `rank`, as the ingress sees them: a
batch belongs to many traces at once, so a stage in another process is a span here, hop included, and is not
told of them. Each line is what OTLP/JSON sends at a time: a collector's `otlpjsonfile` receiver reads the
log as it is. Spans name a generation and counts, and nobody.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recray.errors import ConfigError
from recray.feedback.log import Limits, SegmentLog
from recray.serving.backlog import Backlog, folder_for

if TYPE_CHECKING:
    from recray.serving.http import Reply

LOG = "spans"
SEGMENTS = 8
STAGES = ("wait", "retrieve", "rank")  # of an answer, one after the other
SERVER, INTERNAL = 2, 1  # kinds of spans
_PARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, kw_only=True)
class Tracing:
    """How many requests are traced, and how long and how much of that is kept on each machine."""

    share: float = 0.0  # of the requests without a parent; 0 traces nothing at all
    hours: float = 24.0
    bytes: int = 64 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or not 0 < self.hours < math.inf or self.bytes < 1 << 16:
            words = f"share {self.share:g}, hours {self.hours:g}, bytes {self.bytes}"
            raise ConfigError(words, where="trace", fix="a share of 0 to 1, hours above 0, 64 KiB and more")

    @property
    def limits(self) -> Limits:
        """Of its log."""
        seconds = self.hours * 3600
        return Limits(
            segment_bytes=self.bytes // SEGMENTS,
            segment_s=seconds / SEGMENTS,
            total_bytes=self.bytes - self.bytes // SEGMENTS,
            total_s=seconds - seconds / SEGMENTS,
        )


class Parent(NamedTuple):
    """Who asked, as hexadecimal digits, and whether they trace it."""

    trace: str
    span: str
    sampled: bool


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Parent | None:
    """The `traceparent` among the headers; None without one that is sound."""
    for name, value in headers:
        if name == b"traceparent":
            found = _PARENT.fullmatch(value.strip())
            if found is None or not found[1].strip(b"0") or not found[2].strip(b"0"):
                return None
            if value.startswith(b"00") and found[4] is not None:  # version 00 ends there
                return None
            return Parent(found[1].decode(), found[2].decode(), bool(int(found[3], 16) & 1))
    return None


_Traced = tuple[str, "Parent | None", "Reply", int]  # trace id, parent, reply, end in ns


class Tracer(Backlog[_Traced]):
    """One process's end of the log of spans. One event loop owns it."""

    def __init__(
        self,
        folder: Path,
        tracing: Tracing,
        *,
        seed: int | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        """Raises ConfigError for a folder that cannot be written."""
        self._share, self._draw, self._clock = tracing.share, random.Random(seed), clock
        super().__init__(SegmentLog(folder, LOG, tracing.limits), LOG, self._line)

    def note(self, headers: Iterable[tuple[bytes, bytes]], reply: Reply) -> str | None:
        """Trace an answer that has just been sent, if it is to be; returns the trace's id."""
        parent = parent_of(headers)
        wanted = self._draw.random() < self._share if parent is None else parent.sampled
        if not wanted:
            return None
        trace = self._id(128) if parent is None else parent.trace
        self.add((trace, parent, reply, self._clock()))
        return trace

    def _line(self, traced: _Traced) -> dict[str, Any]:
        trace, parent, reply, end = traced
        scope = {"scope": {"name": "recray.serving"}, "spans": self._spans(trace, parent, reply, end)}
        service = {"attributes": [_attribute("service.name", "recray")]}
        return {"resourceSpans": [{"resource": service, "scopeSpans": [scope]}]}

    def _spans(self, trace: str, parent: Parent | None, reply: Reply, end: int) -> list[dict[str, Any]]:
        """The answer, from when it was asked for, and its stages one after the other."""
        root, at = self._id(64), end - _ns(reply.timing_ms.get("total", 0.0))
        told = [
            _attribute("recray.generation", reply.generation),
            _attribute("recray.items", len(reply.items)),
            *([_attribute("recray.degraded", "; ".join(reply.degraded))] if reply.degraded else []),
        ]
        spans = [_span(trace, root, parent.span if parent else "", "recommend", SERVER, at, end, told)]
        for stage in STAGES:
            if stage in reply.timing_ms:
                then = at + _ns(reply.timing_ms[stage])
                spans.append(_span(trace, self._id(64), root, stage, INTERNAL, at, then, []))
                at = then
        return spans

    def _id(self, bits: int) -> str:
        return f"{self._draw.getrandbits(bits) or 1:0{bits // 4}x}"


def open_tracer(folder: Path | None, tracing: Tracing) -> Tracer | None:
    """The log in a folder, None where nothing is traced. Raises ConfigError."""
    return Tracer(folder_for("trace", folder), tracing) if tracing.share else None


def _span(
    trace: str, span: str, parent: str, name: str, kind: int, start: int, end: int, told: list[dict[str, Any]]
) -> dict[str, Any]:
    """As OTLP/JSON has it: 64-bit numbers are strings."""
    made = {"traceId": trace, "spanId": span, "name": name, "kind": kind, "attributes": told}
    times = {"startTimeUnixNano": str(start), "endTimeUnixNano": str(end)}
    return {**made, **times, **({"parentSpanId": parent} if parent else {})}


def _attribute(key: str, value: str | int) -> dict[str, Any]:
    told = {"stringValue": value} if isinstance(value, str) else {"intValue": str(value)}
    return {"key": key, "value": told}


def _ns(ms: float) -> int:
    return round(ms * 1e6)
