"""The serving benchmark's own parts: load that counts right, and rows that compare what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from benchmarks import _serving_overload, serving
from benchmarks._serving_flood import Flood, flood
from benchmarks._serving_load import Load, _closed, generator


@contextmanager
def server(status: str, delay: float) -> Iterator[str]:
    """Answers every POST with `status` after `delay` seconds, on kept connections."""
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
                await asyncio.sleep(delay)
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    made = loop.run_until_complete(asyncio.start_server(answer, "127.0.0.1", 0))
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.sockets[0].getsockname()[1]}/v1/recommend"
    finally:
        loop.call_soon_threadsafe(made.close)
        for task in asyncio.all_tasks(loop):
            loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.call_later, 0.05, loop.stop)
        thread.join(10)
        loop.close()


def test_our_client_counts_answers_and_errors() -> None:
    with server("200 OK", 0.01) as url:
        load = asyncio.run(_closed(url, [b"{}", b"{}"], clients=4, seconds=0.3))
        assert load.errors == 0
        assert 0 < load.rps * 0.3 <= 4 * 31
        assert load.p99_ms >= load.p50_ms >= 10
    with server("503 Service Unavailable", 0.01) as url:
        load = asyncio.run(_closed(url, [b"{}"], clients=1, seconds=0.1))
    assert 0 < load.errors <= 11
    assert load.rps == 0
    load = asyncio.run(_closed(url, [b"{}"], clients=1, seconds=0.05))
    assert load.errors > 0, "nobody listens there now"
    assert load.rps == 0
    assert generator() in ("wrk", "asyncio")


def test_a_flood_tells_answers_refusals_and_faults_apart() -> None:
    bodies = [b"{}", b'{"k": 3}']
    with server("200 OK", 0.01) as url:
        seen = flood(url, bodies, rate=200, seconds=0.5, lines=20)
        assert (len(seen.took), seen.asked, seen.other) == (100, 100, {})
        assert seen.ms(50) >= 10
        assert seen.rps == pytest.approx(100 / seen.seconds)
        assert seen.whole == 0, "the body says nothing of it"
    with server("503 Service Unavailable\r\nRetry-After: 3", 0) as url:
        seen = flood(url, bodies, rate=200, seconds=0.2, lines=20)
        assert (seen.retry_after, seen.took, seen.other) == ([3] * 40, [], {})
    with server("503 Service Unavailable", 0) as url:
        assert flood(url, bodies, rate=200, seconds=0.2, lines=20).other == {"503": 40}
    with pytest.raises(ConnectionRefusedError):
        flood(url, bodies, rate=200, seconds=0.05)
    made = Flood(2, 1.0)
    made.note(b"HTTP/1.1 200 OK", b'{"items":[],"degraded":[],"timing_ms":{}}', 0.5)
    made.note(b"HTTP/1.1 200 OK", b'{"items":[],"degraded":["popular: late"]}', 0.7)
    assert (made.whole, made.rps) == (1, 2.0)


def test_rows_of_an_overload_are_kept_only_where_all_held() -> None:
    good = Flood(200, 1.0, took=[0.1] * 95, whole=50, retry_after=[1, 2] * 52)
    answers, tail = _serving_overload.rows("fused", 100.0, good)
    assert answers.given["kept"]
    assert tail.given["kept"]
    assert (answers.value, answers.peer_value, tail.value) == (95, 100, pytest.approx(100))
    for seen in (
        Flood(200, 1.0, took=[0.1] * 80),
        Flood(200, 1.0, took=[0.1] * 95, other={"500": 1}),
    ):
        assert not next(_serving_overload.rows("fused", 100.0, seen)).given["kept"]
    late = Flood(200, 1.0, took=[0.1] * 90 + [0.3] * 10)
    assert not list(_serving_overload.rows("fused", 100.0, late))[1].given["kept"]


def test_rows_hold_each_layout_against_its_peer() -> None:
    seen = serving.Seen()
    rps = {"noop": 1000.0, "fused": 500.0, "split": 200.0, "uvicorn": 600.0, "naive": 20.0}
    for name, value in rps.items():
        loads = [Load(value * share, 1000 / value, 2000 / value, 0) for share in (0.5, 1.0, 2.0)]
        seen.closed[name] = dict.fromkeys(serving.CLIENTS, loads)
        seen.open[name] = [Load(value, 2.0, 4.0 if name == "noop" else 8.0, 0)]
    rows = {row.name: row for row in serving._rows("work", seen, serving.QUICK) if row.peer != "uvicorn"}
    noop, naive = (
        rows["fused, 64 clients"],
        [r for r in serving._rows("w", seen, serving.QUICK) if r.peer == "naive-graph"],
    )
    assert (noop.value, noop.peer, noop.peer_value) == (500, "no-op", 1000)
    assert (noop.given["kept"], noop.given["goal_kept"]) == (True, False)
    assert [row.given["kept"] for row in naive] == [True, True]
    assert [row.value / row.peer_value for row in naive if row.peer_value] == [25, 10]
    assert rows["fused, one client"].given["kept"]
    tail = rows["fused, p99 over p50 at 70 % of its peak"]
    assert tail.ratio == pytest.approx(0.5)
    assert not tail.given["kept"]
