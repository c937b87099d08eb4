"""Items that are added and withdrawn while serving, without Ray: through the pointer, and back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks._reliability_door import Board
from recray.bundles.bundle import Bundle, open_bundle
from recray.bundles.changes import Added, Changes, with_changes
from recray.cli.main import main
from recray.errors import ArtefactError, InputError
from recray.serving import client, items, parity
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.items import ItemsRequest, carried, changes_of, to_bytes, with_items
from recray.serving.resident import Ack, Resident
from recray.serving.router import Router
from recray.serving.schema import ApiError, parse_body
from recray.serving.settings import Batch
from recray.serving.shipping import Shipper
from tests.serving_bundles import small_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Two of one catalogue that answer differently."""
    folder = tmp_path_factory.mktemp("items")
    return [small_bundle(folder / str(n), blend=blend) for n, blend in enumerate((0.5, 0.0))]


class World:
    """Two ingress replicas over one board; answers come from the first."""

    def __init__(self, bundles: list[Bundle]) -> None:
        self.bundles = {one.artefact.place.uri: one for one in bundles}
        self.board = Board(State(current=Generation(bundles[0].generation, bundles[0].artefact.place.uri)))
        self.opened = 0
        self.replicas = [self.replica(n) for n in range(2)]
        self.router = Router(self.replicas[0], lambda: None)
        self.shipper = Shipper(self.router, self.board, self.everyone, self.count, shelf=self.board)

    def replica(self, n: int) -> Resident[Ingress]:
        return Resident(self.load, self.board.read(), replica=str(n), vary=self.vary)

    def load(self, one: Generation, now: Ingress | None) -> Ingress:
        self.opened += 1
        return self.answering(with_changes(self.bundles[one.uri], changes_of(self.board, one)))

    def vary(self, one: Generation, held: Ingress) -> Ingress:
        assert isinstance(held.front, Bundle)
        made = with_changes(held.front, changes_of(self.board, one))
        parity.sound(made)
        return self.answering(made)

    def answering(self, bundle: Bundle) -> Ingress:
        return Ingress(bundle, Fused(bundle, Batch()))

    async def everyone(self) -> tuple[list[Ack], bool]:
        return [one.follow(self.board.read()) for one in self.replicas], True

    async def count(self) -> list[Any]:
        return []

    def ask(self, *calls: tuple[str, Any]) -> list[httpx.Response]:
        async def scene() -> list[httpx.Response]:
            app = build_asgi(self.router, steps=self.shipper)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as session:
                return [await session.post(path, json=body) for path, body in calls]

        return asyncio.run(scene())

    def items(self, **body: Any) -> dict[str, Any]:
        answer = self.ask(("/admin/items", body))[0]
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def best(self, user: str = "u1", **more: Any) -> list[str]:
        answer = self.ask(("/v1/recommend", {"user": user, "k": 1000, **more}))[0].json()
        return [item["item"] for item in answer["items"]]


def test_what_is_withdrawn_is_gone_at_once_and_what_is_new_is_there(bundles: list[Bundle]) -> None:
    world = World(bundles)
    before = world.best()
    told = world.items(withdraw=before[:2], add=[{"item": "new", "like": before[2:3]}])
    assert told["changed"]
    assert told["generation"].startswith(bundles[0].generation + "+")
    after = world.best()
    assert "new" in after
    assert not set(before[:2]) & set(after)
    assert world.opened == 2, "the models were not opened again"
    assert all(set(one.held) == {told["generation"]} for one in world.replicas)
    told = world.items(restore=before[:1])
    assert before[0] in world.best()
    assert before[1] not in world.best()
    assert world.items(restore=before[:1])["changed"] is False
    world.replicas.append(world.replica(9))
    assert set(world.replicas[-1].held) == {told["generation"]}, "one that is born later knows it, too"
    more = world.items(add=[{"item": "new2", "vector": [0.5] * 16, "features": {"category": "film"}}])
    assert {"new", "new2"} <= set(world.best())
    assert more["generation"] != told["generation"]


def test_withdrawals_outlive_ships_and_rollbacks(bundles: list[Bundle]) -> None:
    world = World(bundles)
    first, second = world.best()[:2]
    world.items(withdraw=[first], add=[{"item": "new", "like": [first]}])
    uri = bundles[1].artefact.place.uri
    told = world.ask(("/admin/ship", {"bundle": uri}))[0].json()
    assert told["generation"].startswith(bundles[1].generation + "+")
    assert first not in world.best(), "it was withdrawn before the ship"
    assert "new" not in world.best(), "the next bundle would be trained with it"
    world.items(withdraw=[second])
    assert world.board.read().previous is not None
    back = world.ask(("/admin/rollback", {}))[0].json()
    assert back["generation"].startswith(bundles[0].generation)
    assert "new" in world.best()
    assert not {first, second} & set(world.best()), "withdrawn while the other bundle answered"
    again = world.ask(("/admin/ship", {"bundle": bundles[0].artefact.place.uri}))[0].json()
    assert (again["changed"], again["generation"]) == (False, back["generation"]), "it is running already"
    world.items(restore=[first, second])
    assert {first, second} <= set(world.best())


def test_what_cannot_be_is_refused_and_nothing_changes(bundles: list[Bundle]) -> None:
    world = World(bundles)
    for body, code in (
        ({"withdraw": ["nothing"]}, "items_refused"),
        ({"add": [{"item": "i1", "like": ["i2"]}]}, "items_refused"),
        ({"add": [{"item": "new", "vector": [1.0]}]}, "items_refused"),
        ({"add": [{"item": "new"}]}, "items_refused"),
        ({"add": [{"item": "new", "like": ["i1"], "features": {"colour": "red"}}]}, "items_refused"),
        ({}, "invalid_value"),
        ({"withdraw": "i1"}, "invalid_value"),
        ({"remove": ["i1"]}, "unknown_field"),
        ({"add": [{"item": "new", "like": ["i1"], "price": 3}]}, "unknown_field"),
    ):
        answer = world.ask(("/admin/items", body))[0]
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, code), body
        assert "\n" not in answer.json()["error"]["message"]
    assert world.board.read().version == 1
    names = bundles[0].items.ids_of(range(len(bundles[0].items)))
    assert world.ask(("/v1/recommend", {"user": "u1"}))[0].status_code == 200
    world.board.write(world.board.read().load(Generation("other", ""), 1e12))
    answer = world.ask(("/admin/items", {"withdraw": names[:1]}))[0]
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cannot_now")


@pytest.mark.parametrize(
    ("new", "status"),
    [
        ({"like": ["i1"], "features": {"price": 2**64 - 1}}, 422),
        ({"like": ["i1"], "features": {"price": 1e300}}, 422),
        ({"like": ["i1"], "features": {"price": [1, 2]}}, 422),
        ({"like": ["i1"], "features": {"category": True}}, 422),
        ({"like": ["i1", "i1"], "features": {"category": ""}}, 200),
        ({"vector": [1e308] * 16}, 422),
        ({"vector": [0] * 16}, 200),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_odd_values_are_refused_or_taken(bundles: list[Bundle], new: dict[str, Any], status: int) -> None:
    world = World(bundles)
    answer = world.ask(("/admin/items", {"add": [{"item": "\u0000\u202e new", **new}]}))[0]
    assert answer.status_code == status, answer.text
    assert world.ask(("/v1/recommend", {"user": "u1"}))[0].status_code == 200


def test_changes_are_kept_by_name_and_missed_in_a_line() -> None:
    one = Generation("abc", "/bundles/abc")
    changes = Changes(("i1",), (Added("new", (1.0, 0.5), {"category": "film"}),))
    named = with_items(one, changes)
    board = Board(State(current=one))
    assert (named.bundle, named.changed, one.changed) == ("abc", True, False)
    with pytest.raises(ArtefactError, match="kept no more"):
        changes_of(board, named)
    board.put(named.name, to_bytes(changes))
    assert changes_of(board, named) == changes
    assert changes_of(board, one) == Changes()
    assert with_items(named, Changes()) == one
    assert carried(changes, ["i2", "i3"], ["i1", "i3"]) == Changes(("i2",), changes.added)


def test_changes_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MOST", 3)
    with pytest.raises(ApiError, match="ship a bundle"):
        to_bytes(Changes((), tuple(Added(f"n{n}", (1.0,)) for n in range(4))))
    monkeypatch.setattr(items, "KEPT_BYTES", 10)
    with pytest.raises(ApiError, match="too large"):
        to_bytes(Changes(("i1",)))


def test_numbers_are_ids_too() -> None:
    asked = parse_body({"withdraw": [7, "b"], "add": [{"item": 9, "like": [7]}]}, ItemsRequest).plain()
    assert asked["withdraw"] == ["7", "b"]
    assert asked["add"] == [{"item": "9", "like": ["7"], "features": {}}]


def test_the_verb_sends_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[Any] = []

    def asked(url: str, step: str, body: Any, token: Any, token_file: Any) -> dict[str, Any]:
        sent.append((step, body))
        return {"generation": "g+1", "why": "items changed: g+1"}

    monkeypatch.setattr(client, "_asked", asked)
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"withdraw": ["i1"]}))
    assert main(["ship", str(file)]) == 0
    assert capsys.readouterr() == ("g+1\n", "items changed: g+1\n")
    assert sent == [("items", {"withdraw": ["i1"]})]
    with pytest.raises(InputError, match="--canary"):
        client.ship(file, canary="5%")
    file.write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        client.ship(file)
    with pytest.raises(InputError, match="no JSON file"):
        client.ship(tmp_path / "none.json")


def test_a_front_and_its_bundle_bear_the_same_name(bundles: list[Bundle]) -> None:
    changes = Changes(("i1",))
    opened = with_changes(open_bundle(bundles[0].artefact.place), changes)
    one = with_items(Generation(bundles[0].generation, ""), changes)
    assert opened.generation == one.name
