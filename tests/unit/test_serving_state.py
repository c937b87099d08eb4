"""Events over the HTTP door, without Ray: kept, repeated, refused, recalled, logged; and histories joined."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.bundles.bundle import Bundle
from recray.errors import ConfigError
from recray.feedback.events import Event, Kept, order
from recray.feedback.log import Limits, read
from recray.feedback.store import SqliteStore, StoreError
from recray.serving import state as states
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.schema import EventsRequest
from recray.serving.settings import Batch, GraphArgs
from recray.serving.state import Patience, UserState, events_of, open_state, settled
from tests.serving_bundles import small_bundle

NOW = 1_700_000_000.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("serving"), ranker=False)


class Failing:
    """A store that fails while it is told to."""

    def __init__(self, store: SqliteStore) -> None:
        self.store, self.away, self.asked = store, False, 0

    def _check(self) -> None:
        self.asked += 1
        if self.away:
            raise StoreError("away")

    def histories(self, users: Sequence[str]) -> list[list[Kept]]:
        self._check()
        return self.store.histories(users)

    def append(self, events: Sequence[Event]) -> list[bool]:
        self._check()
        return self.store.append(events)

    def close(self) -> None:
        self.store.close()


class Door:
    """The HTTP door before a bundle in process; each call is one request."""

    def __init__(self, bundle: Bundle, users: UserState | None) -> None:
        self.bundle, self.users = bundle, users

    def ask(self, *calls: tuple[str, Any], headers: dict[str, str] | None = None) -> list[httpx.Response]:
        async def scene() -> list[httpx.Response]:
            app = build_asgi(Ingress(self.bundle, Fused(self.bundle, Batch())), users=self.users)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                found = []
                for path, body in calls:
                    if path == "wait":
                        await asyncio.sleep(body)
                        continue
                    found.append(await client.post(path, json=body, headers=headers or {}))
                return found

        return asyncio.run(scene())


def recommend(user: str, k: int = 20) -> tuple[str, dict[str, Any]]:
    return "/v1/recommend", {"user": user, "k": k}


def did(user: str, *items: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/events", {"user": user, "events": [{"item": item, **more} for item in items]}


def items_of(answer: httpx.Response) -> list[str]:
    return [item["item"] for item in answer.json()["items"]]


@pytest.mark.parametrize("user", ["u1", "nobody"])
def test_events_change_the_very_next_answer(bundle: Bundle, tmp_path: Path, user: str) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path)))
    (before,) = door.ask(recommend(user))
    first, second = items_of(before)[:2]
    sent, after = door.ask(did(user, first, "unknown-item", second, time=1_700_000_000), recommend(user))
    assert sent.status_code == 200
    assert sent.json() == {"request_id": sent.json()["request_id"], "accepted": 3, "repeated": 0}
    assert items_of(after) != items_of(before)
    assert not {first, second} & set(items_of(after)), "what was consumed is not answered"
    row = int(bundle.users.rows_of([user])[0])
    known = bundle.items.ids_of(bundle.histories[row]) if row >= 0 else []
    want = bundle.recommend(history=[*known, first, second], k=20)
    assert items_of(after) == [item.item for item in want.items]
    assert after.json()["degraded"] == []
    assert before.json()["degraded"] == ([] if user == "u1" else ["unknown user"])


def test_a_given_history_and_other_users_are_untouched(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path)))
    body = {"user": "u1", "history": ["i1", "i2"]}
    (alone, other) = door.ask(("/v1/recommend", body), recommend("u2"))
    _, after, other_after = door.ask(did("u1", "i3", "i4"), ("/v1/recommend", body), recommend("u2"))
    assert items_of(alone) == items_of(after)
    assert items_of(other) == items_of(other_after)


@pytest.mark.parametrize("more", [{"event_id": "e"}, {"time": 5.5}, {}], ids=["id", "time", "request id"])
def test_a_retry_doubles_nothing(bundle: Bundle, tmp_path: Path, more: dict[str, Any]) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path / "state"), tmp_path / "log"))
    headers = {"x-request-id": "the-same"}
    answers = door.ask(*[did("u1", "i3", **more)] * 3, headers=headers)
    assert [answer.json()["repeated"] for answer in answers] == [0, 1, 1]
    assert len({line["event_id"] for line in read(tmp_path / "log", "events")}) == 1
    assert len(SqliteStore(tmp_path / "state").histories(["u1"])[0]) == 1


def test_what_is_given_back_is_logged_and_is_no_history(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path / "state"), tmp_path / "log"))
    (before,) = door.ask(recommend("u1"))
    item = items_of(before)[0]
    _, after = door.ask(did("u1", item, event="return"), recommend("u1"))
    assert items_of(after) == items_of(before)
    (line,) = read(tmp_path / "log", "events")
    assert (line["event"], line["weight"], line["item"]) == ("return", 0.0, item)


def test_impressions_are_logged_with_the_request(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path), tmp_path))
    one, _ = door.ask(recommend("u1", 3), ("/v1/recommend", {"history": ["i1"]}), ("wait", 0.3))
    first, second = read(tmp_path, "impressions")
    assert first["request_id"] == one.json()["request_id"]
    assert first["items"] == items_of(one)
    assert (first["user"], first["generation"]) == ("u1", bundle.generation)
    assert second["user"] is None


@pytest.mark.parametrize(
    ("body", "code", "where"),
    [
        ([], "invalid_value", "body"),
        ({}, "invalid_value", "body.user"),
        ({"user": "u"}, "invalid_value", "body.events"),
        ({"user": "u", "events": []}, "invalid_value", "body.events"),
        ({"user": "u", "events": [{"item": "i"}] * 1001}, "invalid_value", "body.events"),
        ({"user": "u", "events": [{}]}, "invalid_value", "body.events.0.item"),
        ({"user": "u", "events": [{"item": "i", "kind": "x"}]}, "unknown_field", "body.events.0.kind"),
        ({"user": "u", "events": [{"item": "i", "time": -1}]}, "invalid_value", "body.events.0.time"),
        ({"user": "u", "events": [{"item": "i", "time": "now"}]}, "invalid_value", "body.events.0.time"),
        ({"user": "u", "events": [{"item": "i", "time": 1.7e12}]}, "invalid_value", "body.events.0.time"),
        ({"user": "u", "events": [{"item": "i", "weight": 1e9}]}, "invalid_value", "body.events.0.weight"),
        ({"user": "u", "events": [{"item": "i", "event": ""}]}, "invalid_value", "body.events.0.event"),
        ({"user": "u", "events": [{"item": "i", "request_id": "a b"}]}, "invalid_value",
         "body.events.0.request_id"),
        ({"user": "u", "events": [{"item": "i", "event_id": "x" * 1001}]}, "invalid_value",
         "body.events.0.event_id"),
    ],
)  # fmt: skip
def test_bad_events(bundle: Bundle, tmp_path: Path, body: Any, code: str, where: str) -> None:
    door = Door(bundle, UserState(SqliteStore(tmp_path)))
    bad, good = door.ask(("/v1/events", body), did("u", "i"))
    assert (bad.status_code, bad.json()["error"]["code"], bad.json()["error"]["where"]) == (422, code, where)
    assert good.status_code == 200


def test_a_server_without_state_says_so(bundle: Bundle) -> None:
    sent, answer = Door(bundle, None).ask(did("u1", "i1"), recommend("u1"))
    assert (sent.status_code, sent.json()["error"]["code"]) == (404, "no_state")
    assert answer.json()["degraded"] == []


def test_a_store_that_is_away_degrades_answers_and_refuses_events(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "FIRST_S", 0.05)
    store = Failing(SqliteStore(tmp_path / "state"))
    door = Door(bundle, UserState(store, tmp_path / "log"))
    (before,) = door.ask(recommend("u1"))
    item = items_of(before)[0]
    store.away = True
    sent, without, given_history = door.ask(
        did("u1", item), recommend("u1"), ("/v1/recommend", {"user": "u1", "history": ["i1"]})
    )
    assert (sent.status_code, sent.headers["retry-after"]) == (503, "1")
    assert sent.json()["error"]["where"] == "state"
    assert (without.status_code, without.json()["degraded"]) == (200, ["state unavailable"])
    assert items_of(without) == items_of(before)
    assert given_history.json()["degraded"] == []
    assert list(read(tmp_path / "log", "events")) == [], "what was refused is not logged"
    store.away = False
    sent, after = door.ask(("wait", 0.1), did("u1", item), recommend("u1"))
    assert sent.json()["repeated"] == 0
    assert item not in items_of(after)


def test_a_log_that_is_full_refuses_events_too(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = UserState(SqliteStore(tmp_path / "state"), tmp_path / "log")
    assert users._events is not None

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(users._events, "write", full)
        (sent,) = Door(bundle, users).ask(did("u1", "i1", event_id="e"))
    assert sent.status_code == 503
    (again,) = Door(bundle, users).ask(did("u1", "i1", event_id="e"))
    assert again.status_code == 200
    assert [line["event_id"] for line in read(tmp_path / "log", "events")] == ["e"]


def test_the_access_log_names_no_user(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="recray.access"):
        Door(bundle, UserState(SqliteStore(tmp_path))).ask(did("mary", "pills"), recommend("mary"))
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "recray.access"]
    assert [line["route"] for line in lines] == ["/v1/events", "/v1/recommend"]
    assert not any(word in caplog.text for word in ("mary", "pills"))


def test_what_failed_is_left_alone_ever_longer() -> None:
    now, asked, away = [0.0], [0], [True]
    patience = Patience(lambda: now[0])

    def work() -> str:
        asked[0] += 1
        if away[0]:
            raise StoreError("away")
        return "here"

    for _ in range(400):
        with pytest.raises(StoreError):
            patience.ask(work)
        now[0] += 0.1
    assert asked[0] == 9  # at 0, .5, 1.5, 3.5, 7.5, 15.5, 23.5, 31.5, 39.5
    away[0] = False
    now[0] += 8
    assert patience.ask(work) == "here"
    away[0] = True
    with pytest.raises(StoreError):
        patience.ask(work)
    now[0] += 0.5
    away[0] = False
    assert patience.ask(work) == "here"


def test_what_an_event_leaves_open_is_filled_in() -> None:
    sent = [
        {"item": "a"},
        {"item": "b", "time": 3},
        {"item": "c", "event": "buy", "weight": 2, "event_id": 7},
    ]
    ask = EventsRequest.model_validate({"user": "u", "events": sent})
    assert events_of(ask, "r", NOW) == [
        Event("u", "a", NOW, "r.0"),
        Event("u", "b", 3.0, "@3.0 b"),
        Event("u", "c", NOW, "7", 2.0, "buy"),
    ]


def joined(rows: Any, times: Any, newer: Any, at: Any) -> Any:
    """The rows that `order` places."""
    return np.concatenate([rows, newer])[order(rows, times, newer, at)]


HISTORY = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=8).map(
    lambda pairs: sorted(pairs, key=lambda pair: pair[1])
)


@given(HISTORY, HISTORY)
def test_histories_are_joined_by_time_and_nothing_counts_twice(
    base: list[tuple[int, int]], events: list[tuple[int, int]]
) -> None:
    rows, times = (np.array([pair[n] for pair in base], np.int64) for n in (0, 1))
    newer, at = (np.array([pair[n] for pair in events], np.float64) for n in (0, 1))
    got = joined(rows.astype(np.int32), times, newer.astype(np.int32), at + 0.25)
    fresh = [(row, second + 0.25) for row, second in events if (row, second) not in base]
    want = [row for row, _ in sorted([*base, *fresh], key=lambda pair: pair[1])]
    assert got.tolist() == want
    got = joined(rows.astype(np.int32), None, newer.astype(np.int32), at)
    again = {row for row, _ in events}
    assert got.tolist() == [row for row, _ in base if row not in again] + [row for row, _ in events]


def test_what_came_without_a_time_stays_the_newest_of_its_history() -> None:
    rows, times = np.array([1, 2, 9], np.int32), np.array([100, 200, 0])
    newer, at = np.array([3, 5], np.int32), np.array([150.0, 300.0])
    assert joined(rows, times, newer, at).tolist() == [1, 3, 2, 9, 5]


def test_places_are_settled_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = settled(GraphArgs(bundle="b", state="users"), 1)
    assert (made.state, made.feedback) == (str(tmp_path / "users"), None)
    assert settled(GraphArgs(bundle="b"), 3) == GraphArgs(bundle="b")
    with pytest.raises(ConfigError, match="folder of one machine, and the cluster has 2"):
        settled(GraphArgs(bundle="b", state="users"), 2)
    with pytest.raises(ConfigError, match="give --state, too"):
        settled(GraphArgs(bundle="b", feedback="logs"), 1)
    with pytest.raises(ConfigError, match="no place for the state"):
        settled(GraphArgs(bundle="b", state="https://x/y"), 1)


def test_the_logs_lie_with_the_state_or_where_they_are_wanted(tmp_path: Path) -> None:
    assert open_state(None) is None
    for feedback, folder in ((None, tmp_path / "state"), ("logs", tmp_path / "logs")):
        users = open_state(str(tmp_path / "state"), None if feedback is None else str(tmp_path / feedback))
        assert users is not None
        assert users._events is not None
        assert users._events._folder == folder
        users.close()
    pytest.importorskip("redis")
    users = open_state("redis://127.0.0.1:1/0")
    assert users is not None
    assert users._events is None, "Redis has no folder"
    users.close()


@pytest.mark.parametrize("around", ["{}", "user:{}", "us@er:{}", "{}@x"])
@pytest.mark.parametrize("cut", ["S3/CRET", "12/S3CRET", "S3?CRET", "12?CRET", "S3#CRET", "[S3", "S3\u2100"])
def test_a_redis_url_that_cannot_be_read_is_not_told(cut: str, around: str) -> None:
    pytest.importorskip("redis")
    with pytest.raises(ConfigError, match="the URL cannot be read") as raised:
        open_state(f"redis://{around.format(':' + cut)}@host.example:6379/0")
    told = str(raised.value)
    assert told.startswith("redis: ")
    assert not any(part in told for part in ("S3", "CRET", "12", "user", "example", "6379"))


def test_a_store_that_cannot_write_is_read_all_the_same(bundle: Bundle, tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state")
    door = Door(bundle, UserState(store))
    (before,) = door.ask(recommend("u1"))
    item = items_of(before)[0]
    (sent,) = door.ask(did("u1", item))
    assert sent.status_code == 200

    def full(events: Any) -> Any:
        raise StoreError("database or disk is full")

    store.append = full  # type: ignore[method-assign]
    refused, after = door.ask(did("u1", items_of(before)[1]), recommend("u1"))
    assert refused.status_code == 503
    assert after.json()["degraded"] == []
    assert item not in items_of(after)


def test_new_events_count_beside_repeated_ones(bundle: Bundle, tmp_path: Path) -> None:
    class Steps:
        acted: ClassVar[list[Any]] = []

        def clicked(self, user: str, events: Any) -> None:
            self.acted.extend(events)

    async def scene() -> list[dict[str, Any]]:
        fused = Ingress(bundle, Fused(bundle, Batch()))
        app = build_asgi(fused, users=UserState(SqliteStore(tmp_path)), steps=Steps())  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            told = []
            for count in (1, 3):
                events = [{"item": "i1", "event_id": str(n), "event": f"e{n}"} for n in range(count)]
                answer = await client.post("/v1/events", json={"user": "u1", "events": events})
                told.append(answer.json())
            return told

    first, second = asyncio.run(scene())
    assert (first["accepted"], first["repeated"]) == (1, 0)
    assert (second["accepted"], second["repeated"]) == (3, 1)
    assert [event for _, event in Steps.acted] == ["e0", "e1", "e2"]


def test_logs_grow_old_without_events(bundle: Bundle, tmp_path: Path) -> None:
    users = UserState(SqliteStore(tmp_path / "state"), tmp_path / "log", Limits(total_s=0.05, segment_s=0.01))
    door = Door(bundle, users)
    door.ask(recommend("u1"), did("u1", "i1"), ("wait", 0.2))

    async def later() -> None:
        users.tidy()
        await asyncio.sleep(0.3)
        users.tidy()
        await asyncio.sleep(0.2)

    asyncio.run(later())
    assert not [*read(tmp_path / "log", "events"), *read(tmp_path / "log", "impressions")]
