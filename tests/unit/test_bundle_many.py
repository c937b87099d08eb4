from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray import api
from recray.bundles import many
from recray.bundles.bundle import Bundle
from recray.bundles.changes import change
from recray.bundles.many import read_users
from recray.data import formats, interactions, spans
from recray.errors import InputError
from recray.manifest import Artefact, open_artefact
from recray.storage import place
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


def test_what_no_manifest_can_keep_is_refused_before_the_work(bundle: Bundle, tmp_path: Path) -> None:
    def work(*_: object) -> Iterator[pa.Table]:
        raise AssertionError("it began")

    for odd in ({"filter": {"category": {"book"}}}, {"exclude": {"i1"}}, {"pin": [np.int64(1)]}):
        with pytest.raises(InputError, match="no JSON"):
            many.recommend_many(bundle, ["u1"], k=3, out=place(tmp_path / "out"), block_map=work, asked=odd)


def test_a_file_of_nobody_that_is_known_is_warned_of(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warned = []
    for text in ("1.0\n2.0\n", "1.0\nu2\n"):
        (tmp_path / "users.txt").write_text(text)
        api.recommend(bundle, users=tmp_path / "users.txt", k=3, out=tmp_path / text[-3:-1])
        warned.append([line for line in capsys.readouterr().err.splitlines() if "warning" in line])
    (line,), none = warned
    assert "users.txt" in line
    assert "none of these 2 users" in line
    assert none == []


def test_users_are_read_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_bytes("\ufeffu1\r\n\r\n  u2 \nü3".encode())
    assert read_users(tmp_path / "users.txt") == ["u1", "  u2 ", "ü3"]


@settings(max_examples=50, deadline=None)
@given(
    users=st.lists(
        st.text(st.sampled_from("1a é\t\x0b\x0c\x1c\x85\xa0\u2028\u2029"), min_size=1), min_size=1, max_size=8
    ),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_a_file_of_users_is_read_as_a_log_of_them(users: list[str], end: str) -> None:
    """Each id as `prepare` keeps it, in text and in Parquet."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ["user,item", *(f"{user},i" for user in users)]
        (folder / "log.csv").write_bytes(end.join([*lines, ""]).encode())
        (folder / "users.txt").write_bytes(end.join(users).encode())
        pq.write_table(pa.table({"user": users}), folder / "users.parquet")
        assert read_users(folder / "users.txt") == _prepared(folder / "log.csv") == users
        assert read_users(folder / "users.parquet") == users


COLUMNS = [
    pa.array([1.0, None, 20.0]),  # as pandas writes whole ids with a gap
    pa.array([1.5, 2.0, None]),
    pa.array([7, None, 2**40]),
    pa.array(["007", "", None, " 7"]),
    pa.array([b"a", None, "é".encode()]),
    pa.array(["a", None, "b"]).dictionary_encode(),
    pa.array([1, None, 2]).dictionary_encode(),
    pa.array([True, False]),
    pa.array([18_000], pa.date32()),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_a_column_of_users_is_read_as_in_a_log(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": column, "item": ["i"] * len(column)}), tmp_path / "log.parquet")
    assert read_users(tmp_path / "log.parquet") == _prepared(tmp_path / "log.parquet")


def _prepared(log: Path) -> list[str]:
    """The users of a log as `prepare` reads them, line by line."""
    _, (span,) = spans.scan(formats.sniff(place(log)))
    (block,) = interactions.read_blocks(span, interactions.Rules.today())
    user = block.coded["user"]
    return list(user.words.take(pa.array(user.codes)).to_pylist())


def test_users_are_read_from_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1, 2], "user": ["a", None]}), tmp_path / "two.parquet")
    assert read_users(tmp_path / "two.parquet") == ["a"]
    pq.write_table(pa.table({"id": [7, 8]}), tmp_path / "one.parquet")
    assert read_users(tmp_path / "one.parquet") == ["7", "8"]


def test_what_holds_no_users_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [2]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({}), tmp_path / "empty.parquet")
    pq.write_table(pa.table({"user": [[1]]}), tmp_path / "lists.parquet")
    pq.write_table(pa.table({"user": [b"\xff"]}), tmp_path / "latin.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    for name, said in [("two.parquet", "no column 'user'"), ("broken.parquet", "cannot be read"),
                       ("latin.txt", "cannot be read"), ("none.txt", "cannot be read"),
                       ("empty.parquet", "no column 'user'"), ("lists.parquet", "cannot be read"),
                       ("latin.parquet", "UTF-8")]:  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            read_users(tmp_path / name)
        assert name in str(error.value)


def test_a_changed_bundle_answers_elsewhere_as_here(bundle: Bundle, tmp_path: Path) -> None:
    changed = change(bundle, withdraw=["i1", "i2"])
    made = []
    for name, block_map in (("here", map), ("there", lambda answer, chunks: map(answer, chunks))):
        many.recommend_many(
            changed,
            USERS,
            k=7,
            out=place(tmp_path / name),
            block_map=block_map,  # type: ignore[arg-type]
        )
        made.append(pq.read_table(tmp_path / name / many.FILE))
    assert made[0].equals(made[1])
    assert not {"i1", "i2"} & set(made[0].column("item").to_pylist())
