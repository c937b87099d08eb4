from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray import api
from recray.bundles import many
from recray.bundles.bundle import Bundle
from recray.bundles.many import read_users
from recray.errors import InputError
from recray.manifest import Artefact, open_artefact
from tests.serving_bundles import N_ITEMS, N_USERS, small_bundle

USERS = [f"u{row}" for row in range(N_USERS)] + ["nobody", "u3"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundle"))


def test_each_user_gets_what_they_get_alone(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "CHUNK", 32)
    (tmp_path / "users.txt").write_text("\n".join(USERS))
    made = api.recommend(bundle, users=tmp_path / "users.txt", k=7, out=tmp_path / "out")
    assert isinstance(made, Artefact)
    found = open_artefact(tmp_path / "out", "recommendations")
    assert found.manifest.report == {"users": N_USERS + 1, "unknown_users": 1, "rows": 7 * (N_USERS + 1)}
    assert found.manifest.parents["bundle"]["hash"] == bundle.artefact.hash
    lines = pq.read_table(tmp_path / "out" / many.FILE).to_pylist()
    assert [line["user"] for line in lines[::7]] == USERS[:-1]
    for at, user in enumerate(USERS[:-1]):
        alone, mine = bundle.recommend(user, k=7), lines[7 * at : 7 * (at + 1)]
        assert [line["place"] for line in mine] == list(range(1, 8))
        assert [(line["item"], line["source"]) for line in mine] == [(i.item, i.source) for i in alone.items]
        assert [line["score"] for line in mine] == pytest.approx([i.score for i in alone.items], abs=1e-5)


def test_k_beyond_the_catalogue_gives_what_is_left(bundle: Bundle, tmp_path: Path) -> None:
    api.recommend(bundle, users=["nobody", "u1"], k=10**6, out=tmp_path / "out")
    lines = pq.read_table(tmp_path / "out" / many.FILE).to_pylist()
    left = len(bundle.recommend("u1", k=10**6).items)
    assert len(lines) == len(bundle.items) + left
    assert left < len(bundle.items) <= N_ITEMS


def test_nobody_to_answer_and_a_bad_k_leave_nothing(bundle: Bundle, tmp_path: Path) -> None:
    for users, k in (([], 3), (["u1"], 0)):
        with pytest.raises(InputError):
            api.recommend(bundle, users=users, k=k, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_users_are_read_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_bytes("\ufeffu1\r\n\r\n  u2 \nü3".encode())
    assert read_users(tmp_path / "users.txt") == ["u1", "u2", "ü3"]


def test_users_are_read_from_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2], "user": ["a", None]}), tmp_path / "two.parquet")
    assert read_users(tmp_path / "two.parquet") == ["a"]
    pq.write_table(pa.table({"id": [7, 8]}), tmp_path / "one.parquet")
    assert read_users(tmp_path / "one.parquet") == ["7", "8"]


def test_what_holds_no_users_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "two.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for name, said in [("two.parquet", "no column 'user'"), ("broken.parquet", "cannot be read"),
                       ("latin.txt", "cannot be read"), ("none.txt", "cannot be read")]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            read_users(tmp_path / name)
