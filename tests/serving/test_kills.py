"""A slice of the kills of the reliability theme: replicas, controller and proxy, under load, with events."""

from __future__ import annotations

import shutil

import pytest

from benchmarks._reliability_kills import STAGES, Kept, Killed, killed
from tests.serving_bundles import small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_what_a_kill_loses(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on this machine")
    pytest.importorskip("redis")
    bundle = small_bundle(tmp_path_factory.mktemp("kills"))
    parts = (*STAGES, "controller", "proxy")
    *kills, kept = killed(bundle, [f"u{n}" for n in range(0, 80, 3)], parts=parts, calm_s=0.5)
    assert [one.part for one in kills if isinstance(one, Killed)] == list(parts)
    for one in kills:
        assert isinstance(one, Killed)
        assert one.answered > 0, "it answers again"
        if one.part != "proxy":  # there is one proxy: until the next listens nobody is answered
            assert one.lost <= one.under_way, one
    assert isinstance(kept, Kept)
    assert kept.sent > 0
    assert (kept.lost, kept.doubled) == (0, 0)
