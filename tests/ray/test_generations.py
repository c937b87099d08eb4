"""Ships, rollbacks and a canary on a real cluster under load: no request fails, none mixes generations."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import recray
from recray.bundles.bundle import Bundle
from recray.errors import InputError
from recray.serving.generations import Generation, State
from tests.serving_bundles import small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ADMIN = "admin-of-the-test"
USERS = [f"u{n}" for n in range(0, 80, 3)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Three of one catalogue that answer differently."""
    folder = tmp_path_factory.mktemp("generations")
    plans = ({}, {"blend": 0.0}, {"blend": 0.3, "candidates": 60})
    return [small_bundle(folder / str(n), **plan) for n, plan in enumerate(plans)]


@pytest.fixture(scope="module", params=["fused", "split"])
def url(
    request: pytest.FixtureRequest,
    ray_cluster: str,
    bundles: list[Bundle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Two replicas of every deployment."""
    from recray.serving.on_ray import serving

    names = ["Ingress"] if request.param == "fused" else ["Ingress", "Retriever", "Ranker"]
    token = tmp_path_factory.mktemp("admin") / "token"
    token.write_text(ADMIN)
    lines = [
        "applications:",
        "  - args:",
        f"      layout: {request.param}",
        f"      admin_token_file: {token}",
        "    deployments:",
        *(f"      - {{name: {n}, num_replicas: 2, ray_actor_options: {{num_cpus: 0.1}}}}" for n in names),
    ]
    config = tmp_path_factory.mktemp("config") / "two.yaml"
    config.write_text("\n".join(lines))
    with serving(bundles[0].artefact.place.uri, config=str(config), port=0) as made:
        yield made


class Load:
    """Clients that ask without pause; what each was answered, and its stamp."""

    def __init__(self, url: str, clients: int = 6) -> None:
        self.url, self.clients = url, clients
        self.answers: list[tuple[str, str, list[tuple[str, float]]]] = []
        self.failed: list[str] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(60)

    def wait(self, more: int = 40) -> None:
        """Until so many more have been answered."""
        goal = len(self.answers) + more
        self._until(lambda: len(self.answers) >= goal)

    def wait_for_all(self) -> int:
        """Until every user has been answered once more; returns how many answers there were before."""
        begun = len(self.answers)
        self._until(lambda: {user for user, *_ in self.answers[begun:]} == set(USERS))
        return begun

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.02)

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as session:
            await asyncio.gather(*(self._client(session, n) for n in range(self.clients)))

    async def _client(self, session: httpx.AsyncClient, at: int) -> None:
        while not self._done.is_set():
            user = USERS[at % len(USERS)]
            at += 1
            answer = await session.post("/v1/recommend", json={"user": user, "k": 8})
            if answer.status_code != 200:
                self.failed.append(answer.text)
                continue
            body = answer.json()
            items = [(item["item"], item["score"]) for item in body["items"]]
            self.answers.append((user, body["generation"], items))


def recomputed(load: Load, bundles: list[Bundle]) -> set[str]:
    """Check every answer against the bundle it was stamped with; returns the stamps seen."""
    by_name = {bundle.generation: bundle for bundle in bundles}
    known = {
        (user, name): [(i.item, i.score) for i in bundle.recommend(user=user, k=8).items]
        for name, bundle in by_name.items()
        for user in USERS
    }
    assert load.failed == []
    for user, name, items in load.answers:
        want = known[user, name]
        assert [item for item, _ in items] == [item for item, _ in want], (user, name)
        assert [score for _, score in items] == pytest.approx([score for _, score in want], abs=1e-5)
    return {name for _, name, _ in load.answers}


def uri(bundle: Bundle) -> str:
    return bundle.artefact.place.uri


def state(url: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    told: dict[str, Any] = httpx.get(f"{url}/admin/generations", headers=headers, timeout=30).json()
    return told


def test_ships_and_rollbacks_under_load(url: str, bundles: list[Bundle], tmp_path: Path) -> None:
    names = [bundle.generation for bundle in bundles]
    with Load(url) as load:
        load.wait()
        for bundle in (bundles[1], bundles[2], bundles[0]):
            told = recray.ship(bundle, url=url, token=ADMIN)
            assert (told["generation"], told["changed"]) == (bundle.generation, True)
            load.wait()
            assert load.answers[-1][1] == bundle.generation
        same = recray.ship(uri(bundles[0]), url=url, token=ADMIN)
        assert (same["changed"], same["generation"]) == (False, names[0])
        assert "running already" in same["why"]
        told = recray.rollback(url=url, token=ADMIN)
        assert (told["generation"], told["previous"]) == (names[2], names[0])
        load.wait()
        assert load.answers[-1][1] == names[2]

        broken = tmp_path / "broken"
        shutil.copytree(uri(bundles[1]), broken)
        part = next((broken / "retriever" / "tables").iterdir())
        data = bytearray(part.read_bytes())
        data[-1] ^= 1
        part.write_bytes(data)
        with pytest.raises(InputError, match="altered") as refused:
            recray.ship(broken, url=url, token=ADMIN)
        assert "\n" not in str(refused.value)
        assert state(url)["generation"] == names[2]
        recray.ship(bundles[0], url=url, token=ADMIN)
        load.wait()

        told = recray.ship(bundles[1], canary="50%", url=url, token=ADMIN)
        assert (told["generation"], told["next"], told["share"]) == (names[0], names[1], 0.5)
        load.wait(20)  # those that were under way are answered as they were stamped
        begun = load.wait_for_all()
        split = {(user, name) for user, name, _ in load.answers[begun:]}
        route = State(current=Generation(names[0], ""), next=Generation(names[1], ""), share=0.5)
        assert split == {(user, route.order(user)[0]) for user in USERS}
        counts = state(url)["counts"]
        assert min(counts[name]["requests"] for name in names[:2]) > 20
        assert sum(one["errors"] + one["refused"] for one in counts.values()) == 0
        assert recray.rollback(url=url, token=ADMIN)["next"] is None
        load.wait()
        assert load.answers[-1][1] == names[0]
    assert recomputed(load, bundles) == set(names)
    assert len(load.answers) > 200
