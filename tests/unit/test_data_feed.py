"""Feeding: mapped columns are what Parquet holds, made once, made again when damaged; batches made ahead."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data import feed, parts
from recray.data.dataset import Dataset, open_dataset
from recray.data.prepare import prepare
from recray.data.sequences import Histories
from recray.errors import InputError
from recray.models.base import Catalogue
from recray.models.neumf import NeuMF
from recray.models.sasrec import SASRec
from tests.models_data import ring

ROW = st.tuples(
    st.sampled_from("abcdefgh"), st.sampled_from("uvwxyz"), st.integers(0, 9), st.sampled_from(["", "p", "q"])
)


def prepared(folder: Path, rows: Any) -> Dataset:
    """A dataset of several parts, each of several row groups."""
    log = folder / "log.csv"
    log.write_text("user,item,time,weather\n" + "".join(f"{','.join(map(str, row))}\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.bounds, "__defaults__", (15,))
        patch.setattr(parts, "ROW_GROUP", 4)
        return prepare(log, context=["weather"], out=folder / "data")


def many(seed: int = 0, rows: int = 120) -> list[tuple[str, str, int, str]]:
    rng = np.random.default_rng(seed)
    return [(f"u{rng.integers(12)}", f"i{rng.integers(20)}", t, "pq"[rng.integers(2)]) for t in range(rows)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every split is large, and the cache is a folder of the test."""
    monkeypatch.setattr(feed, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recray" / "columns"


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def in_memory(folder: Path, split: str = "train") -> Histories:
    """What Parquet holds, decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "SMALL", 1 << 30)
        return open_dataset(folder / "data").histories(split)


def equal(a: Histories, b: Histories) -> bool:
    pairs = ((a.items, b.items), (a.offsets, b.offsets), (a.weights, b.weights), (a.times, b.times))
    return all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in pairs)


@settings(max_examples=6)
@given(rows=st.lists(ROW, min_size=1, max_size=60))
def test_mapped_is_what_parquet_holds(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    folder = tmp_path_factory.mktemp("feed")
    data = prepared(folder, rows)
    assert feed.histories(data) is data.histories()  # small: held
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "SMALL", 0)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for split in ("train", "valid"):
            if not data.has_split(split):
                continue
            held = in_memory(folder, split)
            assert equal(feed.histories(data, split, whole=True), held)
            assert equal(feed.histories(data, split), Histories(held.items, held.offsets))
            weather = feed.context(data, split, ["weather"])["weather"]
            assert weather.tolist() == data.interactions(split).context["weather"].tolist()
    shutil.rmtree(folder)


def test_ranks_read_the_same_batches_from_mapped_files(tmp_path: Path, cache: Path) -> None:
    data = prepared(tmp_path, many())
    model = NeuMF(Catalogue(data.n_items, data.context_sizes), NeuMF.Config(dim=4))

    def share(source: Any, rank: int) -> list[Any]:
        return list(model.batches(source, batch_size=4, epoch=1, seed=2, rank=rank, world=2))

    mapped = [share(data, rank) for rank in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "SMALL", 1 << 30)
        held = [share(data, rank) for rank in (0, 1)]
    assert len(folders(cache)) == 3  # items, offsets, weather: no times and weights, nobody asked for them
    for (a, context), (b, want) in zip([*mapped[0], *mapped[1]], [*held[0], *held[1]], strict=True):
        np.testing.assert_array_equal(context, want)
        for name in ("inputs", "targets", "negatives", "log_q", "seed", "positions"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("kind", [SASRec, NeuMF])
def test_a_model_skips_steps_by_dropping_them(kind: Any) -> None:
    data = ring(columns=("weather",))
    model = kind(Catalogue(data.n_items, data.context_sizes), kind.Config(dim=4))
    asked = {"batch_size": 4, "epoch": 1, "seed": 2, "rank": 1, "world": 2}
    whole, rest = (list(model.batches(data, skip=skip, **asked)) for skip in (0, 5))
    assert len(whole) == len(rest) + 5 > 6
    for a, b in zip(whole[5:], rest, strict=True):
        if kind is NeuMF:
            np.testing.assert_array_equal(a[1], b[1])
            a, b = a[0], b[0]
        np.testing.assert_array_equal(a.inputs, b.inputs)
        assert a.seed == b.seed


def test_the_context_that_is_hidden_is_the_same_at_every_world_size() -> None:
    data = ring(columns=("weather",))
    model = NeuMF(Catalogue(data.n_items, data.context_sizes), NeuMF.Config(dim=4))

    def known(world: int) -> dict[int, int]:
        return {
            int(at): int(row)
            for rank in range(world)
            for batch, rows in model.batches(data, batch_size=8, epoch=1, seed=2, rank=rank, world=world)
            for at, row in zip(batch.at[batch.at >= 0], rows[batch.at >= 0, 0])
        }

    alone = known(1)
    assert known(3) == alone
    hidden = np.mean([row == 0 != data.context["weather"][at] for at, row in alone.items()])
    assert 0.03 < hidden < 0.17


def test_files_are_made_once_and_found_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(tmp_path, many())
    first = feed.histories(data)
    monkeypatch.setattr(feed, "_read", None)  # nothing may be read of Parquet again
    assert feed.histories(data).items is first.items
    assert equal(feed.histories(open_dataset(tmp_path / "data")), first)


def test_what_is_mapped_cannot_be_written(tmp_path: Path, cache: Path) -> None:
    mapped = feed.histories(prepared(tmp_path, many()))
    with pytest.raises(ValueError, match="read-only"):
        mapped.items[0] = 1


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 4)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["column.bin", "manifest.json"])
def test_damaged_files_are_made_again(
    tmp_path: Path, cache: Path, damage: Callable[[Path], None], name: str
) -> None:
    data = prepared(tmp_path, many())
    feed.histories(data)
    for folder in folders(cache):
        damage(folder / name)
    again = feed.histories(open_dataset(tmp_path / "data"), whole=True)
    assert equal(again, in_memory(tmp_path))


def test_ranks_that_start_together_make_one_set(tmp_path: Path, cache: Path) -> None:
    prepared(tmp_path, many())
    found: list[Histories] = []
    ranks = [
        threading.Thread(target=lambda: found.append(feed.histories(open_dataset(tmp_path / "data"))))
        for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 4
    assert all(equal(one, found[0]) for one in found)
    assert len(folders(cache)) == 2


def test_old_files_and_litter_are_swept_and_mapped_ones_stay_readable(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old = feed.histories(prepared(tmp_path / "a", many(1)))
    want = old.items.tolist()
    before = folders(cache)
    litter = cache / f".{'0' * 32}.abcdefgh.partial"
    others = cache / "of somebody else"
    litter.mkdir()
    others.mkdir()
    for folder in before:
        os.utime(folder / "manifest.json", (1, time.time() - feed.KEEP_S - 9))
    feed.histories(prepared(tmp_path / "b", many(2)))
    assert others.exists()
    assert not litter.exists()
    assert not any(folder.exists() for folder in before)
    assert old.items.tolist() == want
    others.rmdir()
    kept = folders(cache)
    monkeypatch.setattr(feed, "KEEP_BYTES", 0)  # fresh, but too much
    feed.histories(open_dataset(tmp_path / "a" / "data"))
    assert len(folders(cache)) == 1
    assert not set(folders(cache)) & set(kept)


def test_no_room_is_said_in_one_line(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(tmp_path, many())
    monkeypatch.setattr(feed.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(InputError, match=r"columns: has no room for 0\.0 GiB.*XDG_CACHE_HOME"):
        feed.histories(data)


def test_a_cache_that_cannot_be_used_falls_back_to_a_temporary_folder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(feed.tempfile, "tempdir", str(tmp_path / "tmp"))
    data = prepared(tmp_path, many())
    assert equal(feed.histories(data, whole=True), in_memory(tmp_path))
    (root,) = (tmp_path / "tmp").glob("recray-columns-*")
    assert len(folders(root)) == 4
    assert root.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(root)
    root.symlink_to(tmp_path / "data")  # somebody's trap: what is behind it would be swept
    with pytest.raises(InputError, match="cannot be written"):
        feed.histories(open_dataset(tmp_path / "data"))


def counting(n: int, made: list[int], closed: list[bool]) -> Iterator[int]:
    try:
        for i in range(n):
            made.append(i)
            yield i
    finally:
        closed.append(True)


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within a few seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.002)
    return true()


@settings(max_examples=20)
@given(n=st.integers(0, 30), depth=st.integers(1, 4))
def test_prefetched_is_the_source_in_order(n: int, depth: int) -> None:
    closed: list[bool] = []
    with feed.Prefetched(counting(n, [], closed), depth) as values:
        assert list(values) == list(range(n))
        assert next(values, None) is None
    assert closed == [True]


def test_at_most_depth_are_made_ahead() -> None:
    made: list[int] = []
    with feed.Prefetched(counting(9, made, []), 3) as values:
        assert until(lambda: len(made) == 3)
        time.sleep(0.02)
        assert made == [0, 1, 2]
        assert next(values) == 0
        assert until(lambda: len(made) == 4)


def test_an_error_comes_where_its_value_would_have() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise InputError("broken")

    with feed.Prefetched(source()) as values:
        assert next(values) == 1
        with pytest.raises(InputError, match="broken"):
            next(values)
        assert list(values) == []


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_a_taker_who_stops_early_ends_the_thread_and_closes_the_source(how: str) -> None:
    closed: list[bool] = []
    source = counting(1000, [], closed)  # held here, so that nobody else closes it
    values = feed.Prefetched(source)
    thread = values._thread
    assert next(values) == 0
    if how == "close":
        values.close()
        assert list(values) == []
    elif how == "with":
        with values:
            pass
    else:
        del values
        gc.collect()
    assert until(lambda: not thread.is_alive())
    assert closed == [True]


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.03)
            yield i

    with feed.Prefetched(slow()) as values:
        assert list(values) == [0, 1, 2]
        assert values.waited > 0.05
    with feed.Prefetched(iter(range(3))) as values:
        assert until(lambda: len(values._shelf.values) == 2)
        next(values)
        next(values)
        assert values.waited < 0.05
