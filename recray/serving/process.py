"""What a server process needs besides its graph: a free port, signals that unwind, a log, patience."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from recray.errors import InputError, RecrayError

# among which a free port is looked for: whoever is told of one listens there later, and any other could until
# then be an outgoing connection's (on Linux 32768 and on) or of Ray's own (1xxxx, 30000 and on)
FREE = range(20_000, 30_000)
START_S = 120.0  # what the whole graph may take to be ready
YOUNG = 10_000  # new objects that call for a collection of them; 700 are Python's default
TURN_S = 1e-4  # after which a thread that waits for the interpreter gets it; 5e-3 is Python's default


def check_free(host: str, port: int) -> int:
    """The port, or a free one of `FREE` for 0. Raises InputError when somebody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    why = ""
    for tried in [port] if port else [*random.SystemRandom().sample(FREE, 9), 0]:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), tried))
                return int(probe.getsockname()[1])
            except (OSError, OverflowError) as error:
                why = str(error.strerror if isinstance(error, OSError) else error)
    raise InputError(f"cannot listen there ({why})", where=f"{host}:{port}", fix="choose another --port")


def root_url(host: str, port: int) -> str:
    """Where a client on this machine finds a server that listens on `host`."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def wait_ready(url: str) -> None:
    """Ask `<url>/readyz` until it answers 200. Raises RecrayError when that takes too long."""
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # our own, not through a proxy
    deadline = time.monotonic() + START_S
    while True:
        try:
            with ask(f"{url}/readyz", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise RecrayError(
                    f"the graph is not ready after {START_S:.0f} s: {error}", where=url
                ) from None
        time.sleep(0.05)


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def freeze() -> None:
    """Leave all that is there now, before anything is served, out of every later collection of garbage.

    A collection of all looks at each object, some hundred thousand of imported modules among them, while
    every thread waits: 140 ms where it was measured. So nothing that is loaded by now may count on being
    collected when it is replaced. The youngest are looked at less often, too, since what a request makes
    goes with it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])


def take_turns() -> None:
    """Let a model's thread and the event loop work side by side.

    The thread gives the interpreter up at each product, and would get it back only when the loop has nothing
    left to do, or after five milliseconds: at each of some hundred products a batch.
    """
    sys.setswitchinterval(TURN_S)


def accept_all(loop: asyncio.AbstractEventLoop) -> None:
    """Have a server that this loop starts later on a given socket take all connections that wait, at once.

    libuv takes one a turn of its loop (1.45 and later). A turn is long where much is asked, and just there
    connections become more: the last of a hundred would wait for a hundred turns, a health check among them.
    """
    create = loop.create_server
    kept: set[asyncio.Task[Any]] = set()  # a loop holds its tasks only weakly

    async def create_server(
        protocol: Callable[[], asyncio.BaseProtocol], *at: Any, sock: socket.socket | None = None, **how: Any
    ) -> asyncio.Server:
        def taken() -> asyncio.BaseProtocol:
            """Called for the one that the loop has taken."""
            while sock is not None:
                try:
                    other, _ = sock.accept()
                except OSError:  # nobody else waits, or nobody listens any more
                    break
                other.setblocking(False)
                task = loop.create_task(loop.connect_accepted_socket(protocol, other, ssl=how.get("ssl")))
                kept.add(task)
                task.add_done_callback(kept.discard)
            return protocol()

        return await create(taken, *at, sock=sock, **how)

    loop.create_server = create_server  # type: ignore[method-assign, assignment]


def log_to_stderr(name: str) -> None:
    """Let a logger write its bare messages to standard error, and nowhere else."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
