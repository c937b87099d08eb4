"""New and withdrawn items beside an index that stays: as if one index held them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recray.errors import ArtefactError
from recray.retrieval.delta import Delta
from recray.retrieval.index import INDEXES, build_index

N, M, D = 1500, 40, 12
DRAW = np.random.default_rng(3)
VECTORS = DRAW.standard_normal((N + M, D)).astype(np.float32)
QUERIES = torch.from_numpy(DRAW.standard_normal((6, D)).astype(np.float32))
GONE = [0, 3, 700, N + 2, *range(900, 950)]


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("share", [None, 0.01, 0.6])
def test_the_list_is_that_of_one_index_over_all(index: str, share: float | None) -> None:
    old = build_index(index, torch.from_numpy(VECTORS[:N]))
    delta = Delta(N, VECTORS[N:], GONE)
    allowed = None if share is None else DRAW.random(N + M) < share
    left = np.ones(N + M, bool) if allowed is None else allowed.copy()
    left[GONE] = False
    scores, rows = delta.search(old, QUERIES, 20, allowed)
    whole = (QUERIES.double().numpy() @ VECTORS.astype(float).T) + np.where(left, 0, -np.inf)
    wanted = np.argsort(-whole, axis=1, kind="stable")[:, :20]
    wanted = np.where(np.isneginf(np.take_along_axis(whole, wanted, 1)), -1, wanted)
    assert left[rows[rows >= 0]].all()
    if index == "exact" or share == 0.01:
        assert np.array_equal(rows, wanted)
    _, alone = old.search(QUERIES, 20, left[:N])
    for line, best, kept in zip(rows, whole, alone):  # what an approximate index misses, it misses here
        both = [*kept[kept >= 0], *(np.flatnonzero(left[N:]) + N)]
        assert line[line >= 0].tolist() == sorted(both, key=lambda row: -best[row])[:20]
    found = rows >= 0
    np.testing.assert_allclose(
        scores[found], np.take_along_axis(whole, np.maximum(rows, 0), 1)[found], atol=1e-4
    )


def test_nothing_changed_is_the_index_alone() -> None:
    old = build_index("exact", torch.from_numpy(VECTORS[:N]))
    for ours, theirs in zip(Delta(N).search(old, QUERIES, 7, None), old.search(QUERIES, 7)):
        assert np.array_equal(ours, theirs)


def test_vectors_of_old_and_new_rows_and_at_length_one() -> None:
    old, delta = build_index("exact", torch.from_numpy(VECTORS[:N])), Delta(N, VECTORS[N:])
    rows = np.array([0, N - 1, N, N + M - 1])
    assert np.array_equal(delta.vectors(old, rows).numpy(), VECTORS[rows])
    lengths = np.linalg.norm(delta.unit().vectors_MD, axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_a_file_gives_the_same_back_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    for delta in (Delta(N, VECTORS[N:], GONE), Delta(N, None, [7, 0]), Delta(N)):
        delta.save(tmp_path)
        back = Delta.load(tmp_path, N)
        assert np.array_equal(back.vectors_MD, delta.vectors_MD)
        assert np.array_equal(back.withdrawn, delta.withdrawn)
        assert len(back) == len(delta)
    with pytest.raises(ArtefactError, match="1500 rows"):
        Delta.load(tmp_path, N + 1)
    (tmp_path / "delta.safetensors").write_bytes(b"what is this")
    with pytest.raises(ArtefactError, match="not a delta"):
        Delta.load(tmp_path, N)
