"""Every index of INDEXES: best first, filters exact, files that give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.compression.codec import encode_table
from recray.data.sequences import Histories
from recray.errors import ArtefactError, ConfigError
from recray.models.embeddings import DenseTable
from recray.retrieval.index import INDEXES, build_index, index_class, index_params

N, D = 3000, 24
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in INDEXES),
    ("exact", {"precision": "bf16"}),
    ("exact", {"precision": "f32"}),
    ("exact", {"precision": "bf16", "threads": 2}),
    ("hnsw", {"vectors": "sq8"}),
    ("hnsw", {"links": 16, "ef_search": 300, "threads": 2}),
    ("ivf", {"codes": "sq8", "probes": 60, "threads": 2}),
    ("ivf", {"lists": 40, "probes": 40, "refine": 8}),
]
indexes = pytest.mark.parametrize(("name", "params"), CASES)


def clustered(n: int = N, seed: int = 0) -> Tensor:
    """Vectors in clusters of different lengths, as a trained table has."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((20, D))
    vectors = centres[rng.integers(0, 20, n)] + 0.6 * rng.standard_normal((n, D))
    return torch.from_numpy(vectors.astype(np.float32))


def brute(vectors: Tensor, queries: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """What any exact search must find, in float64."""
    scores = (queries.double() @ vectors.double().T).numpy()
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.isneginf(np.take_along_axis(scores, order, 1)), -1, order)


def recall(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    hits = [len(set(a) & set(b) - {-1}) / max(len(set(b) - {-1}), 1) for a, b in zip(found, wanted)]
    return float(np.mean(hits))


@indexes
def test_the_best_are_found_in_order_with_their_scores(name: str, params: dict[str, Any]) -> None:
    vectors, queries = clustered(), clustered(32, seed=1)
    scores, rows = build_index(name, vectors, params).search(queries, 20)
    assert (scores.dtype, rows.dtype, scores.shape) == (np.float32, np.int64, (32, 20))
    assert recall(rows, brute(vectors, queries, 20)) >= 0.95
    true = np.take_along_axis((queries @ vectors.T).numpy(), rows, 1)
    np.testing.assert_allclose(scores, true, rtol=1e-5, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(line)) == 20 for line in rows.tolist())


@pytest.mark.parametrize("n", [1, 31, 33, 700, 9001])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_the_exact_index_equals_brute_force(n: int, k: int) -> None:
    vectors, queries = clustered(n), clustered(5, seed=2)
    _, rows = build_index("exact", vectors, {"precision": "f32"}).search(queries, k)
    wanted = brute(vectors, queries, k)
    assert np.array_equal(rows[:, : wanted.shape[1]], wanted)
    assert (rows[:, wanted.shape[1] :] == -1).all()


@indexes
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.9])
def test_a_filter_is_obeyed_and_few_allowed_are_searched_exactly(
    name: str, params: dict[str, Any], share: float
) -> None:
    vectors, queries = clustered(), clustered(8, seed=3)
    allowed = np.zeros(N, bool)
    allowed[np.random.default_rng(4).permutation(N)[: int(share * N)]] = True
    scores, rows = build_index(name, vectors, params).search(queries, 10, allowed)
    wanted = brute(vectors, queries, 10, allowed)
    assert allowed[rows[rows >= 0]].all()
    assert ((rows >= 0).sum(axis=1) == min(10, allowed.sum())).all()
    assert np.isneginf(scores[rows < 0]).all()
    if share <= 0.05:
        assert np.array_equal(rows, wanted)
    else:
        assert recall(rows, wanted) >= 0.95


@indexes
@pytest.mark.parametrize("share", [None, 0.02, 0.9])
def test_what_is_barred_of_one_query_is_left_out_of_its_list_alone(
    name: str, params: dict[str, Any], share: float | None
) -> None:
    vectors, queries = clustered(), clustered(9, seed=8)
    allowed = None if share is None else np.random.default_rng(6).random(N) < share
    best = brute(vectors, queries, 30, allowed)
    lines = [best[b, : 4 * b].tolist() for b in range(9)]  # of the first nothing, of the last 32 are barred
    lines[3] += [-1, lines[3][0], -1]  # nothing, and what is there already
    index = build_index(name, vectors, params)
    scores, rows = index.search_without(queries, 10, Histories.of(lines), allowed)
    for b, line in enumerate(lines):
        left = np.ones(N, bool) if allowed is None else allowed.copy()
        left[[row for row in line if row >= 0]] = False
        wanted = brute(vectors, queries[b : b + 1], 10, left)
        assert not set(line) & set(rows[b].tolist()) - {-1}
        assert recall(rows[b : b + 1], wanted) >= 0.9
        if name == "exact":
            assert np.array_equal(rows[b : b + 1], wanted)
    assert (np.diff(scores, axis=1) <= 0).all()


@indexes
def test_more_than_there_is_gives_all_and_then_nothing(name: str, params: dict[str, Any]) -> None:
    vectors, queries = clustered(40), clustered(3, seed=5)
    scores, rows = build_index(name, vectors, params).search(queries, 50)
    assert np.array_equal(np.sort(rows[:, :40], axis=1), np.tile(np.arange(40), (3, 1)))
    assert (rows[:, 40:] == -1).all()
    assert np.isneginf(scores[:, 40:]).all()


@indexes
def test_a_batch_answers_as_each_alone(name: str, params: dict[str, Any]) -> None:
    index, queries = build_index(name, clustered(), params), clustered(17, seed=6)
    scores, rows = index.search(queries, 30)
    for b in range(17):
        alone_scores, alone_rows = index.search(queries[b : b + 1], 30)
        assert np.array_equal(alone_rows[0], rows[b])
        assert np.array_equal(alone_scores[0], scores[b])
    assert index.search(queries[:0], 30)[1].shape == (0, 30)


@indexes
@pytest.mark.parametrize("codec", ["f32", "int4"])
def test_files_over_an_encoded_table_give_the_same_answers(
    name: str, params: dict[str, Any], codec: str, tmp_path: Path
) -> None:
    table, queries = encode_table(codec, clustered()), clustered(16, seed=7)
    index = build_index(name, table, params)
    index.save(tmp_path)
    stored = sum(p.stat().st_size for p in tmp_path.iterdir())
    links = getattr(index.params, "links", 0)
    assert stored <= N * (8 * links + 24), "vectors are stored again"
    back = index_class(name).load(tmp_path, table, index_params(name, params))
    for ours, theirs in zip(index.search(queries, 10), back.search(queries, 10)):
        assert np.array_equal(ours, theirs)
    assert back.nbytes == index.nbytes > 0
    assert recall(back.search(queries, 10)[1], brute(table.dense(), queries, 10)) >= 0.95


def test_equal_scores_go_by_row() -> None:
    vectors = torch.ones(200, 4)
    for name in INDEXES:
        rows = build_index(name, vectors).search(torch.ones(2, 4), 5)[1]
        assert (np.diff(rows, axis=1) > 0).all()


def test_building_twice_gives_the_same_file(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        build_index("hnsw", clustered(500)).save(tmp_path / folder)
    assert (tmp_path / "a/hnsw.faiss").read_bytes() == (tmp_path / "b/hnsw.faiss").read_bytes()


def test_a_graph_of_another_table_or_no_graph_is_refused(tmp_path: Path) -> None:
    build_index("hnsw", clustered(50)).save(tmp_path)
    load, params = index_class("hnsw").load, index_params("hnsw", {})
    with pytest.raises(ArtefactError, match="50 rows"):
        load(tmp_path, DenseTable.of(clustered(60)), params)
    (tmp_path / "hnsw.faiss").write_bytes(b"what is this")
    with pytest.raises(ArtefactError, match="faiss"):
        load(tmp_path, DenseTable.of(clustered(50)), params)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("hnsw", {"m": 4}),
        ("hnsw", {"links": 1}),
        ("ivf", {"probes": 0}),
        ("ivf", {"codes": "pq2"}),
        ("exact", {"threads": 0}),
        ("exakt", {}),
    ],
)
def test_unknown_names_and_values_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_index(name, clustered(10), params)
