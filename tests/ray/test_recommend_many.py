from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recray import api
from recray.bundles import many
from tests.serving_bundles import N_USERS, small_bundle

pytestmark = pytest.mark.ray_cluster


def test_a_cluster_gives_the_same_recommendations(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "CHUNK", 20)
    bundle = small_bundle(tmp_path)
    users = [f"u{row}" for row in range(N_USERS)]
    for workers in (0, 2):
        api.recommend(bundle, users=users, k=5, workers=workers, out=tmp_path / f"{workers}")
    here, there = (pq.read_table(tmp_path / name / many.FILE) for name in ("0", "2"))
    assert here.drop(["score"]) == there.drop(["score"])
    assert there["score"].to_pylist() == pytest.approx(here["score"].to_pylist(), abs=1e-5)
