"""Ships, rollbacks and a canary on a real cluster under load: no request fails, none mixes generations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import recray
from benchmarks._reliability_load import Load, mixed
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


def recomputed(load: Load, bundles: list[Bundle]) -> set[str]:
    """Check every answer against the bundle it was stamped with; returns the stamps seen."""
    assert load.failed == []
    assert mixed(load.answers, bundles) == []
    return {one.generation for one in load.answers}


def uri(bundle: Bundle) -> str:
    return bundle.artefact.place.uri


def state(url: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {ADMIN}"}
    told: dict[str, Any] = httpx.get(f"{url}/admin/generations", headers=headers, timeout=30).json()
    return told


def test_ships_and_rollbacks_under_load(url: str, bundles: list[Bundle], tmp_path: Path) -> None:
    names = [bundle.generation for bundle in bundles]
    with Load(url, USERS) as load:
        load.wait()
        for bundle in (bundles[1], bundles[2], bundles[0]):
            told = recray.ship(bundle, url=url, token=ADMIN)
            assert (told["generation"], told["changed"]) == (bundle.generation, True)
            load.wait()
            assert load.answers[-1].generation == bundle.generation
        same = recray.ship(uri(bundles[0]), url=url, token=ADMIN)
        assert (same["changed"], same["generation"]) == (False, names[0])
        assert "running already" in same["why"]
        told = recray.rollback(url=url, token=ADMIN)
        assert (told["generation"], told["previous"]) == (names[2], names[0])
        load.wait()
        assert load.answers[-1].generation == names[2]

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
        split = {(one.user, one.generation) for one in load.answers[begun:]}
        route = State(current=Generation(names[0], ""), next=Generation(names[1], ""), share=0.5)
        assert split == {(user, route.order(user)[0]) for user in USERS}
        counts = state(url)["counts"]
        assert min(counts[name]["requests"] for name in names[:2]) > 20
        assert sum(one["errors"] + one["refused"] for one in counts.values()) == 0
        assert recray.rollback(url=url, token=ADMIN)["next"] is None
        load.wait()
        assert load.answers[-1].generation == names[0]
    assert recomputed(load, bundles) == set(names)
    assert len(load.answers) > 200
