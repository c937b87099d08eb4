"""Bad rows are dropped, counted and shown; bad files end in one clear line."""

from __future__ import annotations

import json
import lzma
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.data import interactions, readers
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.errors import InputError

HEADER = "user,item,rating,time\n"
GOOD = "".join(f"u{n % 3},i{n},1,{n}\n" for n in range(8))


def prepared(tmp_path: Path, text: str | bytes, name: str = "log.csv", **options: Any) -> Dataset:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return prepare(tmp_path / name, out=tmp_path / "out", **options)


def dropped(data: Dataset) -> dict[str, tuple[int, int]]:
    """reason -> (count, line of the first)"""
    return {reason: (found["count"], found["line"]) for reason, found in data.report["dropped"].items()}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",i1,1,5", "missing user"),
        ("u1,,1,5", "missing item"),
        ("u1,i1,,5", "missing weight"),
        ("u1,i1,many,5", "malformed weight"),
        ("u1,i1,nan,5", "weight is NaN or infinite"),
        ("u1,i1,-inf,5", "weight is NaN or infinite"),
        ("u1,i1,1e999,5", "weight is NaN or infinite"),
        ("u1,i1,1e39,5", "weight too large (above 3.4e+38)"),
        ("u1,i1,-2,5", "weight not above zero (cancelled)"),
        ("u1,i1,0,5", "weight not above zero (cancelled)"),
        ("u1,i1,1,", "missing time"),
        ("u1,i1,1,soon", "malformed time"),
        ("u1,i1,1,99999999999999999999", "malformed time"),
        ("u1,i1,1,-5", "time before 1970"),
        pytest.param(f"u1,i1,1,{int(time.time()) + 3 * 86_400}", "time in the future", id="future"),
        ("u1,i1,1", "wrong number of fields"),
        ("u1,i1,1,5,6", "wrong number of fields"),
        (f"{'u' * 1_000_000},i1,1,5", "user id longer than 1024 characters"),
        (f"u1,{'i' * 1025},1,5", "item id longer than 1024 characters"),
    ],
)
def test_one_bad_row_costs_itself(tmp_path: Path, row: str, reason: str) -> None:
    data = prepared(tmp_path, f"{HEADER}{GOOD}\n{row}\n{GOOD}")
    assert dropped(data) == {reason: (1, 11)}, "the header, eight rows and an empty line come before"
    assert data.report["valid_rows"] == 16
    assert data.n_users == 3


def test_line_numbers_behind_broken_rows_and_quoted_line_breaks(tmp_path: Path) -> None:
    data = prepared(tmp_path, f'{HEADER}{GOOD}"a\nb",i1,1,5\nbroken\n{GOOD}u1,i1,x,5\n')
    assert dropped(data) == {"wrong number of fields": (1, 12), "malformed weight": (1, 21)}


@pytest.mark.parametrize("name", ["log.csv", "log.csv.xz"])
def test_line_numbers_in_later_blocks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recray.data import spans

    monkeypatch.setattr(spans, "BLOCK", 64)
    monkeypatch.setattr(spans.scan, "__defaults__", (64,))
    text = f"{HEADER}{GOOD * 9}u1,i1,x,5\n{GOOD}".encode()
    data = prepared(tmp_path, lzma.compress(text) if name.endswith("xz") else text, name)
    assert dropped(data) == {"malformed weight": (1, 74)}
    assert data.report["valid_rows"] == 80


def test_invalid_utf8(tmp_path: Path) -> None:
    data = prepared(tmp_path, HEADER.encode() + GOOD.encode() + b"\xff\xfe,i1,1,5\n" + "é,i1,1,5\n".encode())
    assert dropped(data) == {"not valid UTF-8": (1, 10)}
    assert "é" in data.users


def test_what_looks_like_nothing_is_an_id(tmp_path: Path) -> None:
    data = prepared(tmp_path, HEADER + "NA,null,1,1\nnan,0,1,1\n 1,001,1,1\n1,1,1,1\n")
    assert data.users.ids_of(range(4)) == ["NA", "nan", " 1", "1"]
    assert data.items.ids_of(range(4)) == ["null", "0", "001", "1"]


def test_the_least_weight_can_be_set(tmp_path: Path) -> None:
    data = prepared(tmp_path, HEADER + "a,x,3,1\na,y,2.9,2\nb,x,5,1\n", min_weight=3)
    assert dropped(data) == {"weight below 3 (cancelled)": (1, 3)}


def test_rows_dropped_by_their_event_are_shown_by_it(tmp_path: Path) -> None:
    text = "user,item,event\nu1,a,view\nu1,b,undo\nu1,c,flood\n"
    weights = {"view": 1.0, "undo": 0.0, "flood": 1e39}
    data = prepared(tmp_path, text, split="none", event_weights=weights)
    assert [(found["line"], found["example"]) for found in data.report["dropped"].values()] == [
        (3, "event 'undo'"),
        (4, "event 'flood'"),
    ]


def test_duplicates_are_counted_and_dropped_when_asked(tmp_path: Path) -> None:
    text = HEADER + "a,x,1,1\na,x,2,1\na,x,1,2\nb,x,1,1\n"
    assert prepared(tmp_path, text).report["duplicates"] == 1
    data = prepared(tmp_path, text, dedupe=True, split="none")
    assert data.report["interactions"]["train"] == 3
    assert data.interactions().weights.tolist() == [1, 1, 1], "the first of the two is kept"


def test_mixed_ids_in_json_lines(tmp_path: Path) -> None:
    users = [1, "a", "1", 2.5, True, None, {"x": 1}, 10**30]
    lines = [json.dumps({"user": user, "item": f"i{n}", "extra": n}) for n, user in enumerate(users)]
    data = prepared(tmp_path, "\n".join([*lines, "{broken", "[1]"]), "log.jsonl", split="none")
    assert data.users.ids_of(range(3)) == ["1", "a", str(10**30)]
    assert dropped(data) == {
        "id is neither text nor a whole number": (3, 4),
        "not a JSON object": (2, 9),
        "missing user": (1, 6),
    }


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("log.csv", "", "log.csv: is empty"),
        ("log.csv", "\n\n", "has no rows"),
        ("log.csv", HEADER, "has no rows below its header"),
        (
            "log.csv",
            HEADER + ",x,1,1\na,,1,1\n",
            "nothing is left of 2 rows: 1 missing user (first: line 2 of",
        ),
        ("log.csv", HEADER + "a,x,1,1\n" + "b\n" * 3, "3 of 4 rows cannot be read"),
        ("log.csv", "who,what\na,b\n", "cannot tell which column is the user; it has who, what"),
        ("log.csv", "user\na\n", "has one column only"),
        ("log.json", "[1, 2]\n", "no line is an object"),
        ("log.parquet", b"PAR1 and then nothing", "is not a Parquet file we can read"),
        ("log.csv.gz", b"\x1f\x8b\x08\x00broken", "is cut off or damaged"),
        ("log.csv.xz", lzma.compress(GOOD.encode() * 9000)[:-40], "is cut off or damaged"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str | bytes, words: str) -> None:
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, text, name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"columns": {"user": "usr"}},
            "has no column 'usr'. did you mean 'user'? It has: user, item, rating, time",
        ),
        ({"columns": {"who": "user"}}, "unknown column role 'who'"),
        ({"context": ["weather"]}, "has no column 'weather'"),
        ({"event_weights": {"buy": 2}}, "no event column"),
        ({"split": "tme"}, "did you mean 'time'"),
        ({"items": "nowhere.csv"}, "is not there"),
        ({"test": "nowhere.csv"}, "is not there"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, HEADER + GOOD, **options)
    assert words in str(caught.value)


def test_a_split_by_time_needs_times(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no time column"):
        prepared(tmp_path, "user,item\na,x\na,y\n", split="time")
    with pytest.raises(InputError, match="differ too little"):
        prepared(tmp_path, HEADER + "a,x,1,1\na,y,1,1\nb,z,1,1\n", split="time")


def test_a_context_of_many_values_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"a,x,{n}\n" for n in range(10_001))
    with pytest.raises(InputError, match="'price' has 10001 values"):
        prepared(tmp_path, "user,item,price\n" + rows, context=["price"])


def test_nulls_and_floats_in_parquet(tmp_path: Path) -> None:
    table = pa.table({"user": [1.0, None, 2.0], "item": ["a", "b", None], "rating": [None, 1.0, 2.0]})
    pq.write_table(table, tmp_path / "log.parquet")
    with pytest.raises(
        InputError, match=r"1 missing user .first: line 2 .*1 missing item .*1 missing weight"
    ):
        prepare(tmp_path / "log.parquet", out=tmp_path / "out")
    pq.write_table(table.drop_columns(["rating"]), tmp_path / "log.parquet")
    assert prepare(tmp_path / "log.parquet", out=tmp_path / "out").users.ids_of([0]) == ["1"]


def test_what_is_dropped_gives_no_id(tmp_path: Path) -> None:
    data = prepared(tmp_path, HEADER + "ghost,g,-1,1\na,x,1,1\nghost,x,-1,1\nb,y,1,1\n", split="none")
    assert data.users.ids_of(range(2)) == ["a", "b"]
    assert data.items.ids_of(range(2)) == ["x", "y"]
    assert (data.n_users, data.n_items) == (2, 2)


def test_check_is_told_the_day(tmp_path: Path) -> None:
    """The rules are data: the same block is judged the same anywhere."""
    from recray.data import formats, spans
    from recray.storage import place

    (tmp_path / "log.csv").write_text(HEADER + "a,x,1,1000000\n")
    _, (span,) = spans.scan(formats.sniff(place(tmp_path / "log.csv")))
    raw = next(readers.blocks(span))
    assert len(interactions.check(raw, span, interactions.Rules(now=1_000_000))) == 1
    assert len(interactions.check(raw, span, interactions.Rules(now=0))) == 0


@pytest.mark.parametrize("row", ['u1,"i1,1,5', 'u1,i1,1,"5', '"u1'])
@pytest.mark.parametrize("after", ["", '"u1","i99",1,5\n'])
def test_an_unclosed_quote_costs_its_row_only(tmp_path: Path, row: str, after: str) -> None:
    data = prepared(tmp_path, HEADER + GOOD + f"{row}\n" + GOOD.replace(",i", ",j") + after)
    assert data.report["rows_read"] == 17 + bool(after)
    assert data.n_items >= 16
    assert [found["line"] for found in data.report["dropped"].values()] in ([10], [])
    assert not any("\n" in found["example"] for found in data.report["dropped"].values())


def test_a_quote_inside_an_id_stays(tmp_path: Path) -> None:
    data = prepared(tmp_path, HEADER + GOOD + 'u1,5" pipe,1,5\n' + GOOD)
    assert (data.report["rows_read"], data.report["dropped"]) == (17, {})


def test_a_time_that_is_nan_does_not_change_the_unit(tmp_path: Path) -> None:
    now = 1_600_000_000
    rows = "".join(f"u{n % 3},i{n},1,{now + n}\n" for n in range(8))
    data = prepared(tmp_path, f"{HEADER}{rows}u1,i1,1,nan\n")
    assert dropped(data) == {"malformed time": (1, 10)}
    assert data.histories("train").times.min() >= now


@pytest.mark.parametrize("options", [{"min_weight": float("nan")}, {"event_weights": {"view": float("inf")}}])
def test_limits_that_are_no_numbers_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give a finite number"):
        prepared(tmp_path, HEADER + GOOD, **options)


def test_what_cannot_be_text_costs_its_row_only(tmp_path: Path) -> None:
    lines = [json.dumps({"user": f"u{n % 3}", "item": f"i{n}"}) for n in range(8)]
    half = '{"user": "u1", "item": "\\ud800"}'
    deep = '{"user": "u1", "item": ' + "[" * 5000 + "]" * 5000 + "}"
    data = prepared(tmp_path, "\n".join([*lines[:4], half, *lines[4:], deep]), "log.jsonl")
    assert dropped(data) == {"not a JSON object": (2, 5)}
    assert data.n_items == 8


def test_a_time_beyond_the_years_of_python_costs_its_row_only(tmp_path: Path) -> None:
    times = pa.array([5, 10**12, 7], pa.timestamp("s", tz="UTC"))
    pq.write_table(
        pa.table({"user": ["a"] * 3, "item": ["x", "y", "z"], "time": times}), tmp_path / "log.parquet"
    )
    data = prepare(tmp_path / "log.parquet", out=tmp_path / "out", split="none")
    assert dropped(data) == {"time in the future": (1, 2)}


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"item": pa.array([["x"], ["y"]])}, "the item column 'item' holds list"),
        ({"item": pa.array([{"a": 1}, {"a": 2}])}, "the item column 'item' holds struct"),
        ({"time": pa.array([1, 2], pa.time32("s"))}, "the time column 'time' holds time32"),
        ({"time": pa.array([[1], [2]])}, "the time column 'time' holds list"),
        ({"weight": pa.array([[1.0], [2.0]])}, "the weight column 'weight' holds list"),
    ],
)
def test_columns_that_hold_something_else(tmp_path: Path, column: dict[str, Any], words: str) -> None:
    table = {"user": pa.array(["a", "b"]), "item": pa.array(["x", "y"])} | column
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    with pytest.raises(InputError, match=words):
        prepare(tmp_path / "log.parquet", out=tmp_path / "out")


def test_an_id_that_is_nan_is_missing(tmp_path: Path) -> None:
    users = pa.array([1.0, float("nan"), 2.0, None], pa.float64())
    pq.write_table(pa.table({"user": users, "item": ["x", "y", "x", "z"]}), tmp_path / "log.parquet")
    data = prepare(tmp_path / "log.parquet", out=tmp_path / "out", split="none")
    assert data.users.values.to_pylist() == ["1", "2"]
    assert dropped(data) == {"missing user": (2, 2)}


def test_the_line_of_an_id_in_a_file_of_sequences(tmp_path: Path) -> None:
    lines = [f"u{n} i{n} i{n + 1}" + " i0" * (n % 3) for n in range(60)]
    lines[40] = f"u40 i1 {'x' * 2000} i2"
    data = prepared(tmp_path, "\n" + "\n".join(lines), "log.txt", columns={"user": "0", "item": "1:"})
    assert dropped(data) == {"item id longer than 1024 characters": (1, 42)}


def test_one_column_is_not_both_user_and_item(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'item' cannot be both user and item"):
        prepared(tmp_path, HEADER + GOOD, columns={"user": "item", "item": "item"})
