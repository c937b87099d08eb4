"""The artefact: what goes in comes out, by split and by part; features, links, context, events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data import dataset, feed, parts, spans
from recray.data.dataset import Dataset, open_dataset
from recray.data.prepare import prepare
from recray.errors import ArtefactError, InputError

ROWS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz"), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


def log(folder: Path, rows: Any, name: str = "log.csv", header: str = "user,item,time") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def content(data: Dataset, split: str, part: tuple[int, int] | None = None) -> list[tuple[str, str, int]]:
    made = data.interactions(split, part)
    users, items = data.users.ids_of(made.user_rows), data.items.ids_of(made.item_rows)
    return list(zip(users, items, made.times.tolist()))


@settings(max_examples=20)
@given(rows=ROWS, n=st.integers(1, 4), size=st.integers(1, 20))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: Any, n: int, size: int) -> None:
    folder = tmp_path_factory.mktemp("round")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.bounds, "__defaults__", (size,))
        patch.setattr(parts, "ROW_GROUP", 3)
        patch.setattr(spans.scan, "__defaults__", (32,))
        data = prepare(log(folder, rows), out=folder / "out")
    order = list(dict.fromkeys(row[0] for row in rows))
    assert data.users.ids_of(range(data.n_users)) == order
    assert data.items.ids_of(range(data.n_items)) == list(dict.fromkeys(row[1] for row in rows))
    want: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
    for user in order:
        mine = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        cut = len(mine) - 2 if len(mine) >= 3 else len(mine)
        for split, some in (("train", mine[:cut]), ("valid", mine[cut : cut + 1]), ("test", mine[cut + 1 :])):
            want[split] += some
    for split, found in want.items():
        assert content(data, split) == found
        assert [row for i in range(n) for row in content(data, split, (i, n))] == found
        assert data.has_split(split) == bool(found)
        whole = data.histories(split)
        assert len(whole) == data.n_users
        pieces = [data.histories(split, (i, n)) for i in range(n)]
        each = [h[b].tolist() for h in pieces for b in range(len(h))]
        assert each == [whole[b].tolist() for b in range(len(whole))]
    shutil.rmtree(folder)


def test_cases_know_what_came_before(tmp_path: Path) -> None:
    rows = [("a", f"i{t}", t, f"w{t % 2}") for t in range(5)] + [("b", "i0", 1, ""), ("c", "i1", 2, "w1")]
    data = prepare(
        log(tmp_path, rows, header="user,item,time,weather"), context=["weather"], out=tmp_path / "o"
    )
    valid, test = data.cases("valid"), data.cases("test")
    assert (valid.user_rows.tolist(), test.user_rows.tolist()) == ([0], [0])
    assert (valid.histories[0].tolist(), valid.targets[0].tolist()) == ([0, 1, 2], [3])
    assert (test.histories[0].tolist(), test.targets[0].tolist()) == ([0, 1, 2, 3], [4])
    assert data.context_values == {"weather": ["", "w0", "w1"]}
    assert data.context_sizes == {"weather": 3}
    assert (valid.context["weather"].tolist(), test.context["weather"].tolist()) == ([2], [1])
    assert data.interactions("train").context["weather"].tolist() == [1, 2, 1, 0, 2]
    assert len(test.take(np.array([0, 0]))) == 2


def test_only_the_files_and_row_groups_of_a_part_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.bounds, "__defaults__", (50,))
    monkeypatch.setattr(parts, "ROW_GROUP", 10)
    rows = [(f"u{u}", f"i{n}", n) for u in range(40) for n in range(5)]
    data = prepare(log(tmp_path, rows), out=tmp_path / "out", split="none")
    assert len(data.report["parts"]["train"]) == 4
    groups: list[int] = []
    real = dataset.pq.ParquetFile

    class Counting(real):  # type: ignore[misc, valid-type]
        def read_row_groups(self, row_groups: list[int], *args: Any, **kwargs: Any) -> Any:
            groups.extend(row_groups)
            return super().read_row_groups(row_groups, *args, **kwargs)

    monkeypatch.setattr(dataset.pq, "ParquetFile", Counting)
    part = data.interactions("train", (3, 20))
    assert part.user_rows.tolist() == [6] * 5 + [7] * 5
    assert groups == [3], "of 20 row groups in 4 files the one of users 6 and 7"


def test_events_multiply_weights(tmp_path: Path) -> None:
    rows = [
        ("a", "x", 1, 2, "view"),
        ("a", "y", 2, 2, "buy"),
        ("a", "z", 3, 2, "view"),
        ("b", "x", 1, 1, "share"),
    ]
    path = log(tmp_path, rows, header="user,item,time,rating,event")
    data = prepare(path, event_weights={"buy": 5, "share": 0}, split="none", out=tmp_path / "o")
    made = data.interactions()
    assert made.weights.tolist() == [2, 10, 2]
    assert made.events is not None
    assert [made.event_names[e] for e in made.events.tolist()] == ["view", "buy", "view"]
    assert data.report["dropped"]["weight not above zero (cancelled)"]["count"] == 1


def test_given_splits(tmp_path: Path) -> None:
    train = log(tmp_path, [("a", "x", 5), ("b", "y", 1), ("a", "y", 3)])
    test = log(tmp_path, [("a", "new"), ("c", "x")], "test.csv", "user,item")
    data = prepare(train, test=test, out=tmp_path / "o")
    assert content(data, "train") == [("a", "y", 3), ("a", "x", 5), ("b", "y", 1)]
    assert content(data, "test") == [("a", "new", 0), ("c", "x", 0)]
    assert data.users.ids_of(range(3)) == ["a", "b", "c"]
    assert not data.has_split("valid")
    cases = data.cases("test")
    assert [h.tolist() for h in (cases.histories[0], cases.histories[1])] == [[1, 0], []]


def test_features_are_aligned_and_bring_cold_items(tmp_path: Path) -> None:
    path = log(tmp_path, [("a", "x", 1), ("b", "01", 2), ("a", "y", 3)])
    (tmp_path / "items.csv").write_text(
        "title,item_id,price\nOne,01,1.5\nCold,c,2\nAgain,01,9\n,y,\nNobody,,1\n"
    )
    (tmp_path / "users.inter").write_text("user_id:token\tage:float\tzip:token\nb\t33\t02139\nz\t1\t1\n")
    (tmp_path / "links.txt").write_text("a b\nb q\n")
    about = {
        "items": tmp_path / "items.csv",
        "users": tmp_path / "users.inter",
        "links": tmp_path / "links.txt",
    }
    data = prepare(path, out=tmp_path / "o", **about)
    assert data.items.ids_of(range(data.n_items)) == ["x", "01", "y", "c"]
    assert data.report["items_in_log"] == 3
    assert data.report["items_file"] == {"rows": 3, "skipped": 2}
    assert data.item_features.to_pydict() == {
        "title": [None, "One", None, "Cold"], "price": [None, 1.5, None, 2.0],
    }  # fmt: skip
    assert data.users.ids_of(range(data.n_users)) == ["a", "b", "z", "q"]
    assert data.user_features.to_pydict() == {
        "age": [None, 33.0, 1.0, None],
        "zip": [None, "02139", "1", None],
    }
    assert data.links is not None
    assert data.links.tolist() == [[0, 1], [1, 3]]
    assert len(data.histories()) == 4


def test_latin_1_features_are_read_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log(tmp_path, [("a", "1", 1)])
    (tmp_path / "movies.dat").write_bytes("1::Am\xe9lie (2001)::Comedy|Romance\n".encode("latin-1"))
    data = prepare(path, items=tmp_path / "movies.dat", out=tmp_path / "o")
    assert data.item_features.to_pylist() == [{"column_1": "Am\xe9lie (2001)", "column_2": "Comedy|Romance"}]
    assert "is not UTF-8; it is read as Latin-1" in capsys.readouterr().err


def test_an_unchanged_input_is_not_prepared_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log(tmp_path, [("a", "x", 1), ("b", "y", 2)])
    first = prepare(path, out=tmp_path / "o")
    at = (tmp_path / "o" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(path, out=tmp_path / "o").artefact.hash == first.artefact.hash
    assert "already holds this dataset" in capsys.readouterr().err
    assert (tmp_path / "o" / "manifest.json").stat().st_mtime_ns == at
    assert prepare(path, dedupe=True, out=tmp_path / "o").artefact.hash != first.artefact.hash
    log(tmp_path, [("a", "x", 1), ("b", "z", 2)])
    assert prepare(path, out=tmp_path / "o").items.ids_of([1]) == ["z"]


def test_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(log(tmp_path, [("a", "x", 1), ("", "y", 2), ("a", "x", 1)]), out=tmp_path / "o")
    said = capsys.readouterr()
    assert said.out == ""
    assert "separated by ','; user=user, item=item, time=time" in said.err
    assert "3 rows read, 2 valid: 1 users, 1 items" in said.err
    assert "left out 1: missing user (first at log.csv:3: user '')" in said.err
    assert "1 duplicates (same user, item and time), kept; --dedupe drops them" in said.err


def test_asking_for_what_is_not_there(tmp_path: Path) -> None:
    data = prepare(log(tmp_path, [("a", "x", 1)]), out=tmp_path / "o", split="none")
    with pytest.raises(InputError, match="has no test split"):
        data.cases("test")
    with pytest.raises(InputError, match="unknown split 'tset'"):
        data.interactions("tset")
    with pytest.raises(InputError, match="no cases in split 'train'"):
        data.cases("train")
    assert len(data.interactions("valid")) == 0
    assert data.links is data.item_features is None
    with pytest.raises(ArtefactError, match="is not there"):
        open_dataset(tmp_path / "nothing")
    part = tmp_path / "o" / "interactions" / "train" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtefactError, match="was altered"):
        open_dataset(tmp_path / "o")


@pytest.mark.data
def test_online_retail(shared_data: Path, tmp_path: Path) -> None:
    """The published figures of the cleaned set: 397,924 rows, 4,339 customers, 3,665 products."""
    columns = {"user": "customer", "item": "stock_code", "time": "time_utc", "weight": "quantity"}
    data = prepare(shared_data / "online_retail" / "transactions.tsv.xz", columns=columns, out=tmp_path / "o")
    report = data.report
    assert (report["rows_read"], report["valid_rows"]) == (541_909, 397_924)
    assert (data.n_users, data.n_items) == (4339, 3665)
    assert {reason: found["count"] for reason, found in report["dropped"].items()} == {
        "missing user": 135_080, "weight not above zero (cancelled)": 8_905,
    }  # fmt: skip
    assert sum(report["interactions"].values()) == 397_924


@pytest.mark.data
def test_sets_read_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    both = [
        prepare(shared_data / "ml100k" / name, out=tmp_path / name)
        for name in ("u.data.xz", "ml-100k.inter.xz")
    ]
    for data in both:
        assert (data.n_users, data.n_items, data.report["valid_rows"]) == (943, 1682, 100_000)
        assert data.interactions("test").times.max() <= 893_286_638
    np.testing.assert_array_equal(both[0].histories().items, both[1].histories().items)
    beauty = prepare(shared_data / "s3rec_beauty" / "Beauty.txt.xz", out=tmp_path / "b")
    assert (beauty.n_users, beauty.n_items, beauty.report["valid_rows"]) == (22_363, 12_101, 198_502)
    gowalla = shared_data / "lightgcn_gowalla"
    data = prepare(gowalla / "train.sorted.txt.xz", test=gowalla / "test.txt.xz", out=tmp_path / "g")
    assert data.report["interactions"] == {"train": 810_128, "valid": 0, "test": 217_242}


def test_a_context_column_may_have_the_name_of_a_role(tmp_path: Path) -> None:
    rows = [("a", "x", 1, "buy"), ("b", "y", 2, ""), ("a", "y", 3, "view")]
    path = log(tmp_path, rows, header="user,item,time,event")
    data = prepare(path, context=["event", "time"], split="none", out=tmp_path / "o")
    made = data.interactions()
    assert made.events is not None
    assert [made.event_names[e] for e in made.events.tolist()] == ["buy", "view", ""]
    assert made.context["event"].tolist() == [1, 2, 0]
    assert data.context_values["time"] == ["", "1", "2", "3"]


def test_a_limit_draws_some_of_the_cases(tmp_path: Path) -> None:
    rows = [(f"u{u}", f"i{(u + t) % 9}", t) for u in range(30) for t in range(4)]
    data = prepare(log(tmp_path, rows), out=tmp_path / "out")
    whole, some = data.cases("valid"), data.cases("valid", 7, seed=3)
    assert len(some) == 7
    assert data.cases("valid", 7, seed=3).user_rows.tolist() == some.user_rows.tolist()
    assert data.cases("valid", 7, seed=4).user_rows.tolist() != some.user_rows.tolist()
    assert len(data.cases("valid", 30)) == len(whole) == 30
    same = whole.take(np.searchsorted(whole.user_rows, some.user_rows))
    assert same.histories.items.tolist() == some.histories.items.tolist()
    assert same.targets.items.tolist() == some.targets.items.tolist()


def test_a_large_split_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"u{u}", f"i{(u + t) % 9}", t) for u in range(9) for t in range(4)]
    held = prepare(log(tmp_path, rows), out=tmp_path / "out").cases("test")
    monkeypatch.setattr(feed, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = open_dataset(tmp_path / "out")
    mapped = data.cases("test")
    assert not data.histories("train").items.flags.writeable
    for a, b in ((mapped.histories, held.histories), (mapped.targets, held.targets)):
        for name in ("items", "offsets", "weights", "times"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def with_items(tmp_path: Path, text: str, name: str = "items.csv", **more: Any) -> Dataset:
    """Ten items by three users, and a file about the items."""
    (tmp_path / "log.csv").write_text("user,item\n" + "".join(f"u{n % 3},{n}\n" for n in range(10)))
    (tmp_path / name).write_text(text)
    return prepare(tmp_path / "log.csv", items=tmp_path / name, split="none", out=tmp_path / "out", **more)


def test_a_stray_quote_in_a_feature_file_costs_its_line_only(tmp_path: Path) -> None:
    rows = [f"{n},{chr(34) if n == 2 else ''}title {n},g{n % 2}\n" for n in range(10)]
    data = with_items(tmp_path, "\n\nitem,title,genre\n" + "".join(rows))
    features = data.item_features
    assert features is not None
    assert features.column("genre").null_count == 0
    assert data.report["items_file"] == {"rows": 10, "skipped": 0}


def test_rows_of_features_that_are_left_out_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_items(
        tmp_path,
        "item,title,genre\n" + "".join(f"{n},a, b,g\n" if n > 2 else f"{n},a,g\n" for n in range(10)),
    )
    told = capsys.readouterr().err
    assert "items file: 3 rows, 7 left out" in told
    assert "7 rows are left out and 3 read" in told


def test_features_whose_ids_are_none_of_the_log_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"Film {n},x{n},g\n" for n in range(10))
    with pytest.raises(
        InputError, match="has no item of the log; its ids were taken from the column 'title'"
    ):
        with_items(tmp_path, "title,code,genre\n" + rows)
    rows = "".join(f"Film {n},{n},g\n" for n in range(10))
    assert with_items(tmp_path, "title,id,genre\n" + rows).n_items == 10


def test_ids_of_json_features_stay_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\na,2020-01-01\nb,2020-01-02\n")
    lines = "".join(json.dumps({"item": f"2020-01-0{n}", "size": n}) + "\n" for n in (1, 2))
    (tmp_path / "items.jsonl").write_text(lines)
    data = prepare(tmp_path / "log.csv", items=tmp_path / "items.jsonl", split="none", out=tmp_path / "out")
    assert data.n_items == 2
    assert data.item_features is not None
    assert data.item_features.column("size").to_pylist() == [1, 2]


def test_features_that_cannot_be_told_apart_or_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has two columns named 'tag'"):
        with_items(tmp_path, "item,tag:token,tag:float\n0,a,1\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder: is a folder"):
        prepare(tmp_path / "log.csv", items=tmp_path / "folder", out=tmp_path / "other")
