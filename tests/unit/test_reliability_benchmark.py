"""What the reliability theme counts: answers that no bundle gives, damage, kills; without our server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import reliability
from benchmarks._reliability_kills import PARTS, Kept, Killed
from benchmarks._reliability_load import Answer, K, Load, mixed
from recray.bundles.bundle import Bundle
from recray.errors import InputError
from recray.manifest import open_artefact
from recray.storage import place
from tests.serving_bundles import small_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("reliability")
    return [small_bundle(folder / str(n), blend=share) for n, share in enumerate((1.0, 0.0))]


def test_an_answer_that_its_stamp_does_not_give_is_found(bundles: list[Bundle]) -> None:
    def answer(user: str, by: Bundle, stamp: str) -> Answer:
        items = [(item.item, item.score) for item in by.recommend(user=user, k=K).items]
        return Answer(0.0, user, stamp, items)

    one, two = bundles
    good = [answer(user, by, by.generation) for user in ("u1", "u2") for by in bundles]
    assert mixed(good, bundles) == []
    other = answer("u1", one, two.generation)
    half = Answer(0.0, "u2", one.generation, good[2].items[:4] + good[3].items[4:])
    near = Answer(0.0, "u2", one.generation, [(item, score + 1e-3) for item, score in good[2].items])
    unknown = answer("u1", one, "nobody")
    assert mixed([*good, other, half, near, unknown], bundles) == [other, half, near, unknown]


def test_a_load_counts_what_is_no_answer() -> None:
    with Load("http://127.0.0.1:9", ["u1"], clients=2) as load:
        load.until(lambda: len(load.failed) > 3)
    assert load.answered == load.under_way == 0
    assert {failure.what for failure in load.failed} == {"ConnectError"}


@pytest.mark.parametrize("name", list(reliability.DAMAGES))
def test_every_damage_is_one(bundles: list[Bundle], tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundles[0].artefact.place.uri, copy)
    open_artefact(place(copy), "bundle")
    reliability.DAMAGES[name](copy)
    with pytest.raises(InputError):
        open_artefact(place(copy), "bundle")


def test_rows_of_kills_say_what_was_under_way(monkeypatch: pytest.MonkeyPatch, bundles: list[Bundle]) -> None:
    def killed(*_: object, **__: object) -> Iterator[Killed | Kept]:
        yield Killed("replica of Ranker", 1, 3, 0.1, 4.0, 200)
        yield Killed("replica of Ingress", 4, 3, 0.1, 4.0, 200)
        yield Killed("proxy", 40, 3, 2.5, 4.0, 200)
        yield Kept(90, 0, 1, 7)

    monkeypatch.setattr(reliability, "killed", killed)
    monkeypatch.setattr(reliability, "bundles", lambda *_: bundles)
    rows = list(reliability.kills(True))
    assert [row.value for row in rows] == [1, 4, 40, 1]
    assert [row.given["kept"] for row in rows] == [True, False, True, False]
    assert rows[2].given["seconds_without_an_answer"] == 2.5
    assert set(PARTS) >= {"controller", "redis", "worker node"}
