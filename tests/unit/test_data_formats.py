"""One small log in every shape it may come in gives one dataset."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.data import files, formats, headers, spans
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.errors import InputError
from recray.storage import place

ROWS = [("ann", "007", 5, 1_500_000_000), ("bob", "x y", 3, 1_500_000_100), ("ann", "8", 4, 1_500_000_050),
        ("ann", "x y", 1, 1_600_000_000), ("bob", "007", 2, 1_500_000_000)]  # fmt: skip


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue())
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }
    return pack[suffix](data) if suffix else data


def text(separator: str, header: str | None = "user_id,item_id,rating,timestamp", scale: int = 1) -> bytes:
    lines = [header.replace(",", separator)] if header else []
    lines += [separator.join(map(str, (u, i, r, t * scale))) for u, i, r, t in ROWS]
    return ("\n".join(lines) + "\n").encode()


def content(data: Dataset) -> list[tuple[str, str, float, int]]:
    log = data.interactions("train")
    ids = zip(data.users.ids_of(log.user_rows), data.items.ids_of(log.item_rows))
    return [(u, i, w, t) for (u, i), w, t in zip(ids, log.weights.tolist(), log.times.tolist())]


WANT = sorted(((u, i, float(r), t) for u, i, r, t in ROWS), key=lambda row: (row[0], row[3]))
FILES = {
    "log.csv": text(","), "semi.csv": text(";"), "log.tsv": text("\t"), "log.dat": text("::", None),
    "u.data": text("\t", None), "pipe.txt": text("|"), "bom.csv": b"\xef\xbb\xbf" + text(","),
    "dos.csv": text(",").replace(b"\n", b"\r\n"), "ms.csv": text(",", scale=1000),
    "log.inter": text("\t", "user_id:token,item_id:token,rating:float,timestamp:float"),
    "fractions.csv": text(",").replace(b"0\n", b"0.25\n"),
    "iso.csv": text(",")
    .replace(b"1500000000", b"2017-07-14T02:40:00Z").replace(b"1600000000", b"2020-09-13 12:26:40.5")
    .replace(b"1500000050", b"2017-07-14T04:40:50+02:00").replace(b"1500000100", b"2017-07-14 02:41:40"),
    "zones.csv": text(";")
    .replace(b"1500000000", b"2017-07-14T04:40:00.125+02:00").replace(b"1600000000", b"2020-09-13 12:26:40,5")
    .replace(b"1500000050", b"2017-07-14T04:40:50,75+02").replace(b"1500000100", b"2017-07-14T02:41:40.0Z"),
    "empty lines.csv": b"\n\n" + text(",").replace(b"\n", b"\n\n"),
    "quoted.csv": text(",").replace(b"x y", b'"x y"'),
    "log.jsonl":
    "\n".join(json.dumps(dict(zip(("user", "item", "rating", "time"), r))) for r in ROWS).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_shape_gives_the_same_log(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    data = prepare(tmp_path / name, out=tmp_path / "out", split="none")
    assert content(data) == WANT
    assert data.users.ids_of([0, 1]) == ["ann", "bob"]
    assert data.items.ids_of([0, 1, 2]) == ["007", "x y", "8"]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"log.csv{suffix}").write_bytes(packed(text(","), suffix))
    assert content(prepare(tmp_path / f"log.csv{suffix}", out=tmp_path / "out", split="none")) == WANT


@pytest.mark.parametrize("kind", ["string", "dictionary", "timestamp", "integers", "views"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    user, item, weight, time = (pa.array(column) for column in zip(*ROWS))
    if kind == "dictionary":
        user, item = user.dictionary_encode(), item.dictionary_encode()
    if kind == "views":
        user, item = user.cast(pa.string_view()), item.cast(pa.string_view())
    if kind == "timestamp":
        time = time.cast(pa.timestamp("s")).cast(pa.timestamp("us", tz="UTC"))
    if kind == "integers":
        user = pa.array([1, 2, 1, 1, 2])
    table = pa.table({"user": user, "item": item, "rating": weight, "time": time, "other": user})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=2)
    data = prepare(tmp_path / "log.parquet", out=tmp_path / "out", split="none")
    names = {"ann": "1", "bob": "2"} if kind == "integers" else {"ann": "ann", "bob": "bob"}
    assert content(data) == [(names[u], i, w, t) for u, i, w, t in WANT]


def test_features_of_any_kind_of_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(text(","))
    view, words = pa.string_view(), [["a"], [], None]
    items = {"item": pa.array(["8", "007", "9"]).cast(view), "tags": pa.array(words, pa.list_(view))}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    data = prepare(tmp_path / "log.csv", items=tmp_path / "items.parquet", out=tmp_path / "out", split="none")
    assert data.item_features is not None
    assert data.item_features.column("tags").to_pylist() == [[], None, ["a"], None]


def test_sequences_a_line(tmp_path: Path) -> None:
    (tmp_path / "seq.txt").write_text("u1 a b c d\nu2 b\nu3\nu4 c a \n\nu5 d d a\n")
    data = prepare(tmp_path / "seq.txt", out=tmp_path / "out", split="none")
    assert [data.items.ids_of(data.histories()[u]) for u in range(4)] == [
        list("abcd"),
        ["b"],
        ["c", "a"],
        list("dda"),
    ]
    assert data.users.ids_of(range(4)) == ["u1", "u2", "u4", "u5"]
    (tmp_path / "even.txt").write_text("u1 a b c\nu2 b c a\n")
    data = prepare(tmp_path / "even.txt", columns={"item": "1:"}, out=tmp_path / "out", split="none")
    assert data.items.ids_of(data.histories()[1]) == ["b", "c", "a"]


def test_a_folder_and_several_files_are_one_log(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "day=1"
    folder.mkdir(parents=True)
    head, *lines = text(",").decode().splitlines()
    (folder / "b.csv").write_text("\n".join([head, *lines[2:]]))
    (folder / "a.csv.gz").write_bytes(gzip.compress("\n".join([head, *lines[:2]]).encode()))
    (folder / "README.md").write_text("not data")
    (folder / "_SUCCESS.csv").write_text("not data")
    assert content(prepare(tmp_path / "logs", out=tmp_path / "o1", split="none")) == WANT
    both = [folder / "a.csv.gz", folder / "b.csv"]
    assert content(prepare(both, out=tmp_path / "o2", split="none")) == WANT


def test_a_header_may_hold_a_number(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,2024\nann,007,1\nbob,8,2\n")
    data = prepare(tmp_path / "log.csv", context=["2024"], out=tmp_path / "out", split="none")
    assert data.users.ids_of(range(2)) == ["ann", "bob"]
    assert data.context_values == {"2024": ["", "1", "2"]}


def test_columns_by_name_and_position(tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("invoice,stock_code,quantity,when,customer\n1,A,2,5,c1\n1,B,3,4,c1\n")
    names = {"user": "customer", "item": "stock_code", "time": "when", "weight": "quantity"}
    want = [("c1", "B", 3.0, 4), ("c1", "A", 2.0, 5)]
    assert content(prepare(tmp_path / "shop.csv", columns=names, out=tmp_path / "o", split="none")) == want
    (tmp_path / "bare.csv").write_text("1,A,2,5,c1\n1,B,3,4,c1\n")
    at = {"user": "4", "item": "1", "time": "3", "weight": "2"}
    assert content(prepare(tmp_path / "bare.csv", columns=at, out=tmp_path / "o", split="none")) == want
    (tmp_path / "words.csv").write_text("c1,A\nc1,B\n")
    words = prepare(
        tmp_path / "words.csv", columns={"user": "0", "item": "1"}, out=tmp_path / "o", split="none"
    )
    assert words.report["rows_read"] == 2


def test_spans_cut_where_records_end(tmp_path: Path) -> None:
    lines = ['u,i,"said ""a\nb"""' if n % 3 == 0 else f"u,i,{n}" for n in range(50)]
    whole = "\n".join(["user,item,note", *lines])
    (tmp_path / "log.csv").write_text(whole)
    source = formats.sniff(place(tmp_path / "log.csv"), None, ["note"])
    for size in (7, 64, 1000):
        _, cut = spans.scan(source, size)
        pieces = [b"".join(spans.texts(span)) for span in cut]
        assert b"".join(pieces).decode() == whole
        assert all(piece.count(b'"') % 2 == 0 for piece in pieces)
        assert len(cut) > 1 or size == 1000


@pytest.mark.parametrize("n", ["1", "1500000000", "-5"])
def test_units_of_time(n: str) -> None:
    assert headers.time_unit([n]) == "s"
    assert headers.time_unit(["1500000000000"]) == "ms"
    assert headers.time_unit(["1500000000000000"]) == "us"
    assert headers.time_unit(["1500000000000000000"]) == "ns"
    assert headers.time_unit(["2020-01-01"]) == "iso"


def test_names_tell_the_suffix_under_the_compression() -> None:
    assert files.suffix_of("a.b/c.TSV.xz") == ".tsv"
    assert files.suffix_of("a.b/c") == ""
    with pytest.raises(InputError, match="not compressed"):
        files.compression_of(place("x.csv.gz"), b"user,item")
    with pytest.raises(InputError, match="zip archive"):
        files.compression_of(place("x.csv"), b"PK\x03\x04....")


def test_times_are_found_where_user_and_item_are_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("customer,sku,date\n" + "".join(f"a,i{n},{9 - n}\n" for n in range(6)))
    data = prepare(tmp_path / "log.csv", columns={"user": "customer", "item": "sku"}, out=tmp_path / "out")
    assert data.report["has_times"]
    assert data.items.ids_of(data.cases("test").targets.items) == ["i0"], "the newest"


def test_a_file_without_times_takes_those_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("user,item,time\na,x,2\na,y,1\n")
    (tmp_path / "b.csv").write_text("user,item\nb,x\n")
    data = prepare([tmp_path / "a.csv", tmp_path / "b.csv"], out=tmp_path / "out", split="none")
    assert not data.report["has_times"]
    assert f"warning: {tmp_path / 'b.csv'} has no times" in capsys.readouterr().err
