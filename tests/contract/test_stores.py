"""Every store of events keeps the same: idempotent, by time, bounded; checked beside a list in memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import ConfigError
from recray.feedback.events import REMEMBER, Event, Kept
from recray.feedback.store import SqliteStore, Store, StoreError, open_store
from tests.redis_server import RedisServer

KEPT = 4
_numbers = itertools.count()


class Plain:
    """What a store has to do, in five lines."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[float, int, Event]]] = {}

    def append(self, events: Sequence[Event]) -> list[bool]:
        new = []
        for event in events:
            mine = self.of.setdefault(event.user, [])
            new.append(event.id not in {known.id for _, _, known in mine})
            if new[-1]:
                mine.append((event.time, next(_numbers), event))
        for user in {event.user for event in events}:
            self.of[user] = sorted(self.of[user])[-REMEMBER * KEPT :]
        return new

    def histories(self, users: Sequence[str]) -> list[list[Kept]]:
        return [
            [Kept(e.item, e.time, e.weight) for _, _, e in self.of.get(user, [])[-KEPT:]] for user in users
        ]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that opens to the same store however often."""
    if request.param == "sqlite":
        return str(tmp_path / "state")
    url: str = request.getfixturevalue("redis").url
    return url


@pytest.fixture
def store(where: str) -> Iterator[Store]:
    made = open_store(where, keep=KEPT)
    yield made
    made.close()


@pytest.fixture
def user() -> str:
    """Nobody whom another test knows: Redis is shared."""
    return f"u{next(_numbers)} é"


EVENTS = st.lists(
    st.builds(
        Event,
        user=st.sampled_from(["a", "b}", "ü"]),
        item=st.sampled_from(["x", "y", "", "z\0\n"]),
        time=st.sampled_from([0.0, 1.0, 1.5, 1e9 + 1 / 3, 2e9]),
        id=st.sampled_from("123456789"),
        weight=st.sampled_from([1.0, 0.25, -1.0]),
    ),
    max_size=8,
)


@given(st.lists(EVENTS, max_size=6))
def test_a_store_keeps_what_a_list_would(request_store: Store, calls: list[list[Event]]) -> None:
    prefix = f"{next(_numbers)}-"
    plain = Plain()
    for events in calls:
        mine = [event._replace(user=prefix + event.user) for event in events]
        assert request_store.append(mine) == plain.append(mine)
    users = [prefix + name for name in ("a", "b}", "ü", "nobody")]
    assert request_store.histories(users) == plain.histories(users)


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def request_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store]:
    """One store for all examples."""
    place = str(tmp_path_factory.mktemp("state"))
    made = open_store(place if request.param == "sqlite" else request.getfixturevalue("redis").url, keep=KEPT)
    yield made
    made.close()


def test_the_same_event_again_changes_nothing(store: Store, user: str) -> None:
    event = Event(user, "i1", 5.0, "e1")
    assert store.append([event, event]) == [True, False]
    assert store.append([event._replace(time=9.0, item="other")]) == [False]
    assert store.histories([user]) == [[Kept("i1", 5.0, 1.0)]]


def test_only_the_newest_are_kept_by_time_then_by_arrival(store: Store, user: str) -> None:
    times = [5.0, 3.0, 9.0, 5.0, 5.0, 1.0]
    store.append([Event(user, f"i{n}", time, f"e{n}") for n, time in enumerate(times)])
    assert [kept.item for kept in store.histories([user])[0]] == ["i0", "i3", "i4", "i2"]
    store.append([Event(user, "late", 2.0, "late")])
    assert [kept.item for kept in store.histories([user])[0]] == ["i0", "i3", "i4", "i2"]


def test_what_is_sent_again_is_known_long_after_it_counts_no_more(store: Store, user: str) -> None:
    sent = [Event(user, f"i{n}", 5.0, f"e{n}") for n in range(REMEMBER * KEPT)]
    assert all(store.append(sent))
    kept = store.histories([user])
    assert len(kept[0]) == KEPT
    assert not any(store.append([event._replace(time=9.0) for event in sent]))
    assert store.histories([user]) == kept
    store.append([Event(user, "newest", 6.0, "newest")])
    assert store.append(sent[:1]) == [True], "not forever"
    assert [one.item for one in store.histories([user])[0]] == ["i38", "i39", "i0", "newest"]


def test_what_users_did_is_for_its_owner_alone(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.append([Event("u", "i", 1.0, "e")])
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert "state.sqlite-wal" in found
    assert set(found.values()) == {0o600}
    store.close()


def test_another_process_sees_it_at_once_and_it_stays(where: str, user: str) -> None:
    first, second = (open_store(where, keep=KEPT) for _ in range(2))
    first.append([Event(user, "i1", 5.0, "e1")])
    assert second.histories([user, "nobody"]) == [[Kept("i1", 5.0, 1.0)], []]
    first.close()
    second.close()
    again = open_store(where, keep=KEPT)
    assert again.append([Event(user, "i1", 5.0, "e1")]) == [False]
    again.close()


def test_many_writers_lose_and_double_nothing(where: str, user: str) -> None:
    """Each of four threads sends the same events; each is new once."""
    new: list[bool] = []
    stores = [open_store(where, keep=100) for _ in range(4)]

    def write(store: Store) -> None:
        for n in range(25):
            new.extend(store.append([Event(user, f"i{n}", float(n), f"e{n}")]))

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(new), sum(new)) == (100, 25)
    assert [kept.item for kept in stores[0].histories([user])[0]] == [f"i{n}" for n in range(25)]
    for store in stores:
        store.close()


def test_redis_that_is_away_says_so_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer(tmp_path)
    store = open_store(server.url)
    asks: list[Callable[[], object]] = [
        lambda: store.histories(["u"]),
        lambda: store.append([Event("u", "i", 1.0, "e")]),
    ]
    for ask in asks:
        with pytest.raises(StoreError, match=rf"127\.0\.0\.1:{server.port}: Redis cannot be used now"):
            ask()
    server.start()
    try:
        assert store.append([Event("u", "i", 1.0, "e")]) == [True]
        server.stop()
        with pytest.raises(StoreError):
            store.histories(["u"])
        server.start()
        assert store.histories(["u"]) == [[Kept("i", 1.0, 1.0)]]
    finally:
        server.stop()
        store.close()


def test_a_place_that_cannot_hold_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold the state"):
        open_store(str(tmp_path / "file"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.sqlite").write_text("this is no database, whatever its name says" * 9)
    with pytest.raises(ConfigError, match="cannot hold the state"):
        open_store(str(tmp_path / "broken"))
    with pytest.raises(ConfigError, match="no place for the state"):
        open_store("s3://bucket/state")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    bad = Event("u", "i", 1.0, "e2")._replace(item=None)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        store.append([Event("u", "i", 1.0, "e1"), bad._replace(weight=object())])  # type: ignore[arg-type]
    assert store.histories(["u"]) == [[]]
    assert store.append([Event("u", "i", 1.0, "e1")]) == [True]
    store.close()


SECOND = """
import sys
from pathlib import Path
from recray.feedback.events import Event
from recray.feedback.store import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
for id_ in sys.argv[2:]:
    store.append([Event("u", "i", 1.0, id_)])
print(len(store.histories(["u"])[0]))
store.close()
"""


def test_a_store_beside_another_of_its_process_loses_nothing_of_it(tmp_path: Path) -> None:
    """SQLite's locks are the process's: to open and close the file elsewhere in it ends them."""

    def elsewhere(*ids: str) -> int:
        words = [sys.executable, "-c", SECOND, str(tmp_path), *ids]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    one = SqliteStore(tmp_path)
    one.append([Event("u", "i", 1.0, "first")])
    SqliteStore(tmp_path).close()
    assert elsewhere("other") == 2
    assert one.append([Event("u", "i", 1.0, "last")]) == [True]
    assert elsewhere() == 3
    one.close()
