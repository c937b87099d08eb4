"""What a server process does with its garbage and with its threads."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
import time
from typing import cast

import pytest

from recray.errors import InputError
from recray.serving import process


def test_what_is_there_is_left_out_of_later_collections() -> None:
    before = gc.get_threshold()
    held = [[] for _ in range(1000)]  # type: list[list[int]]
    try:
        process.freeze()
        assert gc.get_freeze_count() >= len(held)
        assert not any(one is held for one in gc.get_objects())
        assert gc.get_threshold() == (process.YOUNG, *before[1:])
        new: list[object] = []
        assert any(one is new for one in gc.get_objects())
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_threads_take_turns_sooner_than_python_has_it() -> None:
    before = sys.getswitchinterval()
    try:
        process.take_turns()
        assert sys.getswitchinterval() < before
    finally:
        sys.setswitchinterval(before)


def test_a_free_port_is_none_that_a_connection_could_get(monkeypatch: pytest.MonkeyPatch) -> None:
    port = process.check_free("127.0.0.1", 0)
    assert port in process.FREE
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(InputError, match="cannot listen there") as told:
            process.check_free("127.0.0.1", port)
        assert "--port" in str(told.value)
        monkeypatch.setattr(process, "FREE", range(port, port + 9))
        assert process.check_free("127.0.0.1", 0) in process.FREE[1:]
    with pytest.raises(InputError):
        process.check_free("127.0.0.1", 1 << 16)


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_all_who_wait_are_taken_at_once_and_answered(library: str) -> None:
    many = 50
    loops = pytest.importorskip(library)

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async def turns() -> int:
        loop = asyncio.get_running_loop()
        process.accept_all(loop)
        listening = socket.create_server(("127.0.0.1", 0))
        server = await loop.create_server(Echo, sock=listening)
        asked = [socket.create_connection(listening.getsockname()) for _ in range(many)]
        for number, line in enumerate(asked):
            line.sendall(b"%d" % number)
            line.setblocking(False)
        got: list[bytes] = []
        turn = 0
        while len(got) < many and turn < many:
            turn += 1
            time.sleep(0.002)  # a long turn
            await asyncio.sleep(0)
            for line in asked[len(got) :]:
                try:
                    got.append(line.recv(100))
                except BlockingIOError:
                    break
        assert got == [b"%d" % number for number in range(many)]
        for line in asked:
            line.close()
        server.close()
        await asyncio.sleep(0.05)
        return turn

    loop = loops.new_event_loop()
    try:
        assert loop.run_until_complete(turns()) < many // 4
    finally:
        loop.close()
