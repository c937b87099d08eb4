"""What is done with a request before Ray's own handling of it, which costs more than to send it away.

Serve calls `middlewares` in each process in which it listens, and puts what it returns around its own
application (the flag is in `profiles.py`).
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from recray.serving.http import Gate

# Ray's word for a request that goes on where its client goes away: ours has a deadline, and the three tasks
# that would look out for that wait for a turn of the loop each
PATIENT = b"x-request-disconnect-disabled", b"?1"
gate: Gate | None = None  # of the ingress in this process; a proxy has none


def middlewares() -> list[Middleware]:
    """What Serve is to put around its own application, the outermost last."""
    return [Middleware(_Early)]


class _Early:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if gate is None:
            await self._app(scope, receive, send)
        else:
            if scope["type"] == "http":
                scope["headers"] = [*scope["headers"], PATIENT]
            await gate.before(self._app, scope, receive, send)
