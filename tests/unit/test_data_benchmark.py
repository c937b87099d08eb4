"""The contract of benchmark rows, and that both sides of the data benchmark do the same work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import data as theme
from benchmarks import rows
from recray.data.dataset import open_dataset

KEYS = {"theme", "name", "work", "metric", "value", "unit", "peer", "peer_value", "ratio", "given", "seeds",
        "interval", "command", "hardware", "versions", "date"}  # fmt: skip


def test_rows_are_complete_and_ratios_above_one_are_better(tmp_path: Path) -> None:
    def bench(quick: bool) -> Iterator[rows.Row]:
        """A bench."""
        assert quick
        yield rows.Row(name="a", work="w", metric="seconds", value=2, unit="s", peer="numpy", peer_value=6)
        yield rows.Row(
            name="b", work="w", metric="rows/s", value=2, unit="rows/s", peer="numpy", peer_value=6
        )
        yield rows.Row(name="c", work="w", metric="rows/s", value=2, unit="rows/s", peer="absent")

    assert rows.main("data", bench, ["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    made = json.loads((tmp_path / "rows.json").read_text())
    assert [set(row) for row in made] == [KEYS] * 3
    assert [row["ratio"] for row in made] == [3, pytest.approx(1 / 3), None]
    assert made[0]["command"].startswith("python -m benchmarks.data --quick --json")
    assert made[0]["versions"]["numpy"] == np.__version__
    assert made[0]["hardware"]["cores"] >= 1
    with pytest.raises(ValueError, match="unknown theme"):
        rows.main("date", bench, [])


def test_a_part_that_runs_again_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    def bench(quick: bool, only: str) -> Iterator[rows.Row]:
        """A bench."""
        for name in ("a", "b"):
            for peer in ("x", "y"):
                if only in name:
                    yield rows.Row(
                        name=name, work="w", metric="s", value=len(only), unit="s", peer=peer, peer_value=1
                    )

    for words in ([], ["--only", "b"]):
        assert rows.main("data", bench, ["--json", str(tmp_path / "rows.json"), *words], choose=True) == 0
    made = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["name"], row["peer"], row["value"]) for row in made] == [
        ("a", "x", 0), ("a", "y", 0), ("b", "x", 1), ("b", "y", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_pandas_and_recray_make_the_same_of_the_log(tmp_path: Path, kind: str) -> None:
    theme.make_log(tmp_path, 3000)
    log = tmp_path / f"log.{kind}"
    valid = theme.ours(log, tmp_path / "ours")
    assert theme.in_pandas(log, tmp_path / "theirs") == valid < 3000
    data = open_dataset(tmp_path / "ours")
    for split in ("train", "valid", "test"):
        mine, other = data.interactions(split), pd.read_parquet(tmp_path / "theirs" / f"{split}.parquet")
        np.testing.assert_array_equal(mine.user_rows, other.user_row)
        np.testing.assert_array_equal(mine.item_rows, other.item_row)
        np.testing.assert_array_equal(mine.times, other.time)
        np.testing.assert_array_equal(mine.weights, other.weight)
    assert (
        data.items.values.to_pylist() == pd.read_parquet(tmp_path / "theirs" / "items.parquet").id.to_list()
    )
