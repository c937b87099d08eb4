"""What one ingress replica notes of its requests: counts always, answers and spans where they are wanted.

It is called after an answer has been sent, so nobody waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from recray.serving import answers, metrics
from recray.serving.answers import AnswerLog
from recray.serving.metrics import Meter
from recray.serving.schema import RecommendRequest
from recray.serving.tracing import Tracer

if TYPE_CHECKING:
    from recray.serving.http import Reply
    from recray.serving.ingress import Ingress

TIDY_S = 60.0  # between two looks at what is too old


class Seen:
    """The notes of one process. One event loop owns it."""

    def __init__(
        self,
        meter: Meter | None = None,
        kept: AnswerLog | None = None,
        held: Callable[[], Mapping[str, Ingress]] = dict,
        tracer: Tracer | None = None,
    ) -> None:
        """kept: where answers are logged. held: the generations that can answer here. tracer: of spans."""
        self.meter, self.kept, self._held = meter or Meter(), kept, held
        self.tracer, self._tidied = tracer, time.monotonic()

    def answered(self, scope: Scope, ask: RecommendRequest, reply: Reply) -> None:
        """Note one answer to POST /v1/recommend."""
        metrics.answered(self.meter, reply.generation, reply.timing_ms, reply.degraded)
        if self.kept is not None:
            self.kept.keep(scope["state"]["request_id"], ask, reply)
        if self.tracer is not None:
            trace = self.tracer.note(scope["headers"], reply)
            if trace is not None:
                scope["state"]["noted"]["trace_id"] = trace  # for the access log

    def similar(self, reply: Reply) -> None:
        """Note one answer of similar items, whose events count as answers' do."""
        self.meter.count("answers", reply.generation[: metrics.NAME])

    def refused(self, code: str) -> None:
        """Note a request that was answered with an error, by its code."""
        self.meter.count("refused", code)

    def tidy(self) -> bool:
        """Delete what has been kept for too long, on a thread; for whoever comes by now and then. Whether it
        was time to."""
        now = time.monotonic()
        if now < self._tidied + TIDY_S:
            return False
        self._tidied = now
        for log in (self.kept, self.tracer):
            if log is not None:
                asyncio.get_running_loop().run_in_executor(None, log.tidy)
        return True

    def route(self, told: Callable[[dict[str, Any]], Response]) -> Route:
        """Of what was answered, see `answers`."""
        return answers.route(self.kept, lambda name: self._held().get(name), told)
