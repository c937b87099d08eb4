"""One machine and a cluster prepare the same dataset, file by file."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recray.data import on_ray, parts, spans
from recray.data.prepare import prepare
from recray.errors import InputError

pytestmark = pytest.mark.ray_cluster
HEADER = "user,item,rating,time,kind,weather"


def lines(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    made = [
        f"u{rng.integers(60)},i{rng.integers(40)},{rng.integers(0, 5)},{rng.integers(10**9)},"
        f"{rng.choice(['view', 'buy', ''])},w{rng.integers(4)}"
        for _ in range(n)
    ]
    made[n // 2] = "broken"
    made[n // 3] = "u1,i1,nan,5,view,w1"
    return made


@pytest.fixture
def logs(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "a.csv").write_text("\n".join([HEADER, *lines(900, 0)]))
    (folder / "b.csv.xz").write_bytes(lzma.compress("\n".join([HEADER, *lines(500, 1)]).encode()))
    return [folder / "a.csv", folder / "b.csv.xz"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": "time", "dedupe": True, "columns": {"event": "kind", "weight": "rating", "time": "time"},
         "context": ["weather"], "event_weights": {"buy": 3, "view": 0.5}},
        {"test": "given"},
    ],
    ids=["leave-one-out", "by time with everything", "given splits"],
)  # fmt: skip
def test_both_ways_make_the_same_files(
    ray_cluster: str,
    tmp_path: Path,
    logs: list[Path],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans.scan, "__defaults__", (4000,))  # several blocks a file
    monkeypatch.setattr(parts.bounds, "__defaults__", (300,))  # several parts
    if options.get("test"):
        options = {"test": logs[1]}
        logs = logs[:1]
    here = prepare(logs, out=tmp_path / "here", **options)
    there = prepare(logs, out=tmp_path / "there", workers=2, **options)
    assert there.artefact.hash == here.artefact.hash, "the hash covers ids and every part file"
    assert there.report == here.report
    assert len(here.report["parts"]["train"]) > 2
    assert here.report["dropped"]["wrong number of fields"]["line"] == 452


def test_a_bad_log_is_told_of_likewise(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\n,x\n")
    with pytest.raises(InputError, match=r"nothing is left of 1 rows: 1 missing user .first: line 2"):
        prepare(tmp_path / "log.csv", out=tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_mapping_keeps_the_order(ray_cluster: str) -> None:
    with on_ray.mapping(2) as block_map:
        assert list(block_map(lambda x: x * x, range(20))) == [x * x for x in range(20)]
