"""Item neighbours against the formula written out, their weights, ratings, and several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse

from recray.data.sequences import Histories
from recray.errors import ConfigError, InputError
from recray.models import build_model, item_knn, neighbours
from recray.models.base import Catalogue
from recray.models.neighbours import strongest, strongest_dense, truncated_svd
from recray.models.ratings import REG_ITEM, REG_USER, item_biases, ratings_of, user_biases
from tests.models_data import SmallData, ring

torch.set_num_threads(1)

N = 23


def plain(matrix: NDArray[Any], shrink: float, alpha: float = 0.5) -> NDArray[Any]:
    norms = np.sqrt((matrix**2).sum(0))
    similar = matrix.T @ matrix / (np.outer(norms ** (2 * alpha), norms ** (2 - 2 * alpha)) + shrink)
    np.fill_diagonal(similar, 0)
    return np.asarray(similar)


@pytest.mark.parametrize("room", [1 << 24, 50])  # one block, and many
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_scores_are_the_sums_of_the_k_nearest(
    alpha: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "CELLS", room)
    data = ring()
    model = build_model("item-knn", Catalogue(N, {}), {"neighbours": 4, "shrink": 3.0, "alpha": alpha})
    model.fit(data)
    similar = plain(data.train.to_csr(N).toarray(), 3.0, alpha)
    kept = np.zeros_like(similar)
    for i, row in enumerate(similar):
        best = np.argsort(-row, kind="stable")[:4]
        kept[i, best] = row[best]
    asked = [[3], [], [1, 2, 1], [-1, 7]]
    want = np.stack([sum((kept[i] for i in h if i >= 0), np.zeros(N)) for h in asked])
    np.testing.assert_allclose(model.score(Histories.of(asked)).numpy(), want, rtol=1e-4, atol=1e-6)  # type: ignore[operator]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 3), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(1, 9)
)
def test_the_strongest_are_a_stable_sort(cells: list[list[int]], k: int) -> None:
    table = np.array(cells, np.float32) / 4
    rows, values = strongest(sparse.csr_matrix(table), k)
    for line, found, value in zip(table, rows, values, strict=True):
        order = [i for i in np.argsort(-line, kind="stable") if line[i] > 0][:k]
        assert found.tolist() == (order + [-1] * k)[:k]
        assert value.tolist() == ([*line[order], *[0] * k])[:k]
    dense, weights = strongest_dense(torch.from_numpy(table), k)
    assert weights.tolist() == values.tolist()
    for line, found, value in zip(table, dense, weights, strict=True):
        assert line[found[found >= 0]].tolist() == value[found >= 0].tolist()
        assert (value[found < 0] == 0).all()


def test_shrinking_prefers_the_better_supported_neighbour() -> None:
    together = [[0, 1]] * 20 + [[0, 1, 2]] + [[0]] * 9  # item 2 came once, always with 0 and 1
    data = SmallData(N, Histories.of(together))
    order = {}
    for shrink in (0.0, 50.0):
        model = build_model("item-knn", Catalogue(N, {}), {"shrink": shrink})
        model.fit(data)  # type: ignore[arg-type]
        order[shrink] = model.score(Histories.of([[2]]))[0]  # type: ignore[operator]
    assert order[0.0][0] > 0
    assert order[50.0].max() < order[0.0].max()
    found = model.score(Histories.of([[0]]))[0]  # type: ignore[operator]
    assert found[1] > 5 * found[2]


def test_above_a_half_popular_items_are_told_and_say_less() -> None:
    data = ring()
    asked = Histories.of([[1, 2]])
    counts = data.train.to_csr(N).sum(0)
    told = []
    for alpha in (0.5, 0.9):
        model = build_model("item-knn", Catalogue(N, {}), {"alpha": alpha, "neighbours": 22, "shrink": 0})
        model.fit(data)
        scores = model.score(asked)[0].numpy()  # type: ignore[operator]
        told.append(np.corrcoef(scores, np.asarray(counts).ravel())[0, 1])
    assert told[1] > told[0]


@pytest.mark.parametrize("how", ["unit", "tfidf", "bm25"])
def test_a_user_of_many_items_says_less(how: str) -> None:
    wide, narrow = list(range(20)), [0, 21]
    matrix = Histories.of([wide, narrow]).to_csr(N)
    before = matrix.copy()
    made = item_knn.weighted(matrix, how)
    assert made[1, 0] > made[0, 0] > 0
    assert (matrix != before).nnz == 0  # the given matrix is left alone
    repeated = item_knn.weighted(Histories.of([[0, 0, 0, 1], [2]]).to_csr(3), how)
    assert 1 < repeated[0, 0] / repeated[0, 1] <= 3.001  # counts saturate
    if how == "unit":
        np.testing.assert_allclose(made.multiply(made).sum(1).ravel(), 1, rtol=1e-6)


def rated(seed: int = 0, users: int = 40, items: int = 12) -> Histories:
    """Ratings of two tastes: the first six items, or the last six, are rated high."""
    rng = np.random.default_rng(seed)
    rows, weights = [], []
    for u in range(users):
        picked = np.sort(rng.choice(items, rng.integers(6, items), replace=False))
        liked = (picked < 6) == (u % 2 == 0)
        rows.append(picked)
        weights.append(np.where(liked, 4.5, 1.5) + 0.5 * rng.standard_normal(len(picked)) - 0.3 * (u % 3))
    made = Histories.of(rows)
    return Histories(made.items, made.offsets, np.concatenate(weights).astype(np.float32))


def test_biases_solve_their_equations() -> None:
    ratings = ratings_of(rated(), 12)
    scale, b_N = item_biases(ratings)
    table = ratings.toarray()
    given = table != 0
    assert scale.tolist() == pytest.approx([table[given].mean(), table[given].min(), table[given].max()])
    b_U = user_biases(ratings, float(scale[0]), b_N)
    want_U = (given * (table - scale[0] - b_N)).sum(1) / (REG_USER + given.sum(1))
    np.testing.assert_allclose(b_U, want_U, rtol=1e-5)
    want_N = (given * (table - scale[0] - b_U[:, None])).sum(0) / (REG_ITEM + given.sum(0))
    np.testing.assert_allclose(b_N, want_N, atol=2e-3)  # the turns have settled


def test_ratings_of_repeats_their_mean_and_unknown_items_are_not_there() -> None:
    histories = Histories(
        np.array([3, -1, 3, 1], np.int32), np.array([0, 4]), np.array([5, 1, 2, 0], np.float32)
    )
    made = ratings_of(histories, 5)
    assert made.indices.tolist() == [1, 3]
    assert made.data.tolist() == [0, 3.5]  # a rating of 0 is one
    assert ratings_of(Histories.of([[1, 2]]), 5).nnz == 0


def test_adjusted_predictions_are_the_formula_written_out() -> None:
    data = rated()
    model = build_model(
        "item-knn", Catalogue(12, {}), {"similarity": "adjusted", "neighbours": 5, "shrink": 4.0, "most": 2}
    )
    model.fit(SmallData(12, data))  # type: ignore[arg-type]
    table = ratings_of(data, 12).toarray().astype(np.float64)
    given = table != 0
    scale, b_N = item_biases(ratings_of(data, 12))
    b_U = user_biases(ratings_of(data, 12), float(scale[0]), b_N)
    d = np.where(given, table - scale[0] - b_N - b_U[:, None], 0)
    both = given.T.astype(float) @ given
    similar = d.T @ d / np.sqrt((d**2).T @ given * (given.T @ d**2)) * both / (both + 4)
    np.fill_diagonal(similar, 0)
    similar[similar < np.sort(similar, axis=1)[:, -5][:, None]] = 0
    similar = np.maximum(similar, 0)
    asked = Histories.of([[0, 7, 11], [], [3, -1]])
    predicted = model.predict(data.take([0, 1, 2]), asked)  # type: ignore[operator]
    want = []
    for u, items in ((0, [0, 7, 11]), (2, [3, -1])):
        for j in items:
            if j < 0:
                want.append(scale[0] + b_U[u])
                continue
            near = sorted(
                (i for i in range(12) if given[u, i] and similar[j, i] > 0), key=lambda i: -similar[j, i]
            )
            near = near[:2]
            weight = sum(similar[j, i] for i in near)
            moved = sum(similar[j, i] * d[u, i] for i in near) / weight if near else 0
            want.append(np.clip(scale[0] + b_U[u] + b_N[j] + moved, scale[1], scale[2]))
    np.testing.assert_allclose(predicted, want, rtol=1e-4)


def test_ratings_follow_the_taste_of_a_new_user() -> None:
    model = build_model("item-knn", Catalogue(12, {}), {"similarity": "adjusted", "shrink": 1.0})
    model.fit(SmallData(12, rated()))  # type: ignore[arg-type]
    new = Histories(np.array([0, 1, 2, 8], np.int32), np.array([0, 4, 4]), np.array([5, 5, 4, 1], np.float32))
    found = model.predict(new, Histories.of([[4, 10], [4]]))  # type: ignore[operator]
    assert found[0] > 3.8
    assert found[1] < 2.5
    assert found[2] == pytest.approx(
        float(model.scale[0] + model.biases[4]), abs=1e-5
    )  # nobody's: the baseline
    plain_one = build_model("item-knn", Catalogue(12, {}), {})
    with pytest.raises(ConfigError, match="similarity=adjusted"):
        plain_one.predict(new, Histories.of([[4], []]))  # type: ignore[operator]


@pytest.mark.parametrize("given", [None, 1.0, 4.0])
def test_a_log_without_ratings_is_refused(given: float | None) -> None:
    bare = rated()
    weights = None if given is None else np.full(len(bare.items), given, np.float32)
    model = build_model("item-knn", Catalogue(12, {}), {"similarity": "adjusted"})
    with pytest.raises(InputError, match=r"all ratings are equal.*--columns weight=NAME"):
        model.fit(SmallData(12, Histories(bare.items, bare.offsets, weights)))  # type: ignore[arg-type]


def test_reasons_sum_to_the_score() -> None:
    model = build_model("item-knn", Catalogue(N, {}), {"neighbours": 6})
    model.fit(ring())
    history = Histories.of([[3, 4, 3, -1]])
    scores = model.score(history)[0]  # type: ignore[operator]
    for row in (2, 5, 20):
        found = model.reasons(history, row)
        assert found is not None
        assert sorted(found.rows) == [3, 4]
        assert found.weights.sum() == pytest.approx(float(scores[row]), abs=1e-6)


def test_the_svd_is_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((60, 50)) @ np.diag(0.8 ** np.arange(50)) @ rng.standard_normal((50, 90))
    found, vectors = truncated_svd(sparse.csr_matrix(dense.astype(np.float32)), 8, 0)
    _, s, v = np.linalg.svd(dense)
    np.testing.assert_allclose(found.numpy(), s[:8], rtol=1e-3)
    np.testing.assert_allclose(np.abs(v[:8] @ vectors.numpy()), np.eye(8), atol=1e-2)
    again = truncated_svd(sparse.csr_matrix(dense.astype(np.float32)), 8, 0)[1]
    other = truncated_svd(sparse.csr_matrix(dense.astype(np.float32)), 8, 1)[1]
    assert torch.equal(vectors, again)
    torch.testing.assert_close(vectors[:, :4], other[:, :4], atol=1e-3, rtol=0)  # the sign is settled


@pytest.mark.parametrize(
    "options", [{"neighbours": 0}, {"shrink": -1.0}, {"most": 0}, {"alpha": 1.5}, {"weighting": "idf"}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("item-knn", Catalogue(N, {}), options)
