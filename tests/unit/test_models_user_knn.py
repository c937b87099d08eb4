"""User neighbours against the formulas written out; histories that nobody has seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recray.data.sequences import Histories
from recray.errors import ConfigError, InputError
from recray.models import build_model, user_knn
from recray.models.base import Catalogue
from recray.models.ratings import item_biases, ratings_of, user_biases
from tests.models_data import SmallData, ring

torch.set_num_threads(1)

N = 23


def fitted(data: Any, n: int = N, **options: Any) -> Any:
    model = build_model("user-knn", Catalogue(n, {}), {"pairs": 4096, **options})
    model.fit(data)
    return model.eval()


def sums_of_the_nearest(similar_BV: NDArray[Any], took_VN: NDArray[Any], k: int) -> NDArray[Any]:
    found = []
    for line in similar_BV:
        near = [v for v in np.argsort(-line, kind="stable")[:k] if line[v] > 0]
        found.append(sum((line[v] * took_VN[v] for v in near), np.zeros(took_VN.shape[1])))
    return np.stack(found)


ASKED = Histories.of([[3, 4, 9], [], [1, 2, 1, 30 - 9], [-1, 7]])


def test_cosine_of_sets() -> None:
    data = ring()
    took = (data.train.to_csr(N).toarray() > 0).astype(float)
    asked = (ASKED.known().to_csr(N).toarray() > 0).astype(float)
    lengths = np.outer(np.sqrt(asked.sum(1)), np.sqrt(took.sum(1)))
    similar = asked @ took.T / (lengths + 2.0)
    nearest = fitted(data, neighbours=1, shrink=2.0).score(ASKED).numpy()
    assert [set(np.unique(line[line > 0]).round(5)) for line in nearest] == [
        {best.round(5)} - {0} for best in similar.max(axis=1).astype(np.float32)
    ]
    whole = fitted(data, neighbours=100, shrink=2.0).score(ASKED).numpy()
    np.testing.assert_allclose(whole, sums_of_the_nearest(similar, took, 100), rtol=1e-4, atol=1e-6)


def test_correlation_of_sets() -> None:
    data = ring()
    took = (data.train.to_csr(N).toarray() > 0).astype(float)
    some = took.sum(1) > 0
    took = took[some & (took.sum(1) < N)]
    asked = (ASKED.known().to_csr(N).toarray() > 0).astype(float)[[0, 2, 3]]
    both = asked @ took.T
    similar = np.array([[np.corrcoef(a, b)[0, 1] for b in took] for a in asked]) * both / (both + 3)
    want = sums_of_the_nearest(np.maximum(similar, 0), took, 100)
    found = (
        fitted(data, neighbours=100, shrink=3.0, similarity="pearson").score(ASKED.take([0, 2, 3])).numpy()
    )
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def ratings(seed: int = 0, users: int = 30, items: int = 9) -> Histories:
    """Two tastes, and users who rate high or low."""
    rng = np.random.default_rng(seed)
    rows, weights = [], []
    for u in range(users):
        picked = np.sort(rng.choice(items, rng.integers(4, items), replace=False))
        rows.append(picked)
        taste = np.where((picked % 2 == 0) == (u % 2 == 0), 1.0, -1.0)
        weights.append(3 + taste + 0.4 * (u % 3 - 1) + 0.2 * rng.standard_normal(len(picked)))
    made = Histories.of(rows)
    return Histories(made.items, made.offsets, np.concatenate(weights).astype(np.float32))


@pytest.mark.parametrize("centre", ["mean", "baseline"])
def test_resnicks_prediction_written_out(centre: str) -> None:
    data = ratings()
    model = fitted(
        SmallData(9, data), 9, weighted=True, similarity="pearson", centre=centre, neighbours=4, shrink=2.0
    )
    table = ratings_of(data, 9).toarray().astype(np.float64)
    given = table != 0
    scale, b_N = item_biases(ratings_of(data, 9))
    b_U = user_biases(ratings_of(data, 9), float(scale[0]), b_N)
    base = scale[0] + b_N + b_U[:, None]
    means = np.repeat((table.sum(1) / given.sum(1))[:, None], 9, 1)
    middle = means if centre == "mean" else base
    d = np.where(given, table - middle, 0)
    want, items = [], Histories.of([[0, 5, 8], [2, -1]])
    for u, asked in ((3, [0, 5, 8]), (4, [2, -1])):
        both = (given[u] & given).sum(1)
        similar = (
            d @ d[u] / np.sqrt(np.maximum(d**2 @ given[u] * (given @ d[u] ** 2), 1e-12)) * both / (both + 2)
        )
        for j in asked:
            if j < 0:
                want.append(scale[0] + b_U[u])
                continue
            near = sorted(
                (v for v in range(30) if given[v, j] and similar[v] > 0), key=lambda v: -similar[v]
            )[:4]
            total = sum(similar[v] for v in near)
            moved = sum(similar[v] * d[v, j] for v in near) / total
            want.append(np.clip(middle[u, j] + moved, scale[1], scale[2]))
    np.testing.assert_allclose(model.predict(data.take([3, 4]), items), want, rtol=1e-4)


def test_cosine_of_ratings_predicts_from_the_mean() -> None:
    model = fitted(SmallData(9, ratings()), 9, weighted=True, neighbours=5)
    new = Histories(np.array([0, 2, 4, 1], np.int32), np.array([0, 4, 4]), np.array([5, 5, 5, 3], np.float32))
    found = model.predict(new, Histories.of([[6, 3], [6]]))
    assert found[0] > found[1]
    assert found[2] == pytest.approx(float(model.scale[0] + model.biases[6]), abs=1e-5)
    bare = Histories.of([[0, 2, 4]])  # taken, not rated
    assert model.predict(bare, Histories.of([[6]])) == pytest.approx(found[2])
    for similarity in ("cosine", "pearson"):  # compared as a set
        scores = fitted(SmallData(9, ratings()), 9, weighted=True, similarity=similarity).score(bare)[0]
        assert scores.max() > 0
    with pytest.raises(ConfigError, match="weighted=true"):
        fitted(ring()).predict(bare, Histories.of([[6]]))


@pytest.mark.parametrize("centre", ["mean", "baseline"])
@pytest.mark.parametrize("similarity", ["cosine", "pearson"])
def test_ratings_are_predicted_a_part_at_a_time(
    centre: str, similarity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, rng = ratings(), np.random.default_rng(5)
    model = fitted(SmallData(9, data), 9, weighted=True, similarity=similarity, centre=centre, neighbours=4)
    asked = Histories.of([rng.integers(-1, 9, rng.integers(0, 4)).tolist() for _ in range(30)])
    whole = model.predict(data, asked)
    compared, similar = list[int](), type(model)._similar

    def noting(self: Any, part: Any, kept: Any, rated: bool) -> Any:
        compared.append(part.shape[0])
        return similar(self, part, kept, rated)

    monkeypatch.setattr(type(model), "_similar", noting)
    monkeypatch.setattr(user_knn, "CELLS", 30 * 7)
    np.testing.assert_allclose(model.predict(data, asked), whole, rtol=1e-12)
    assert compared == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("given", [None, 1.0, 4.0])
def test_a_log_without_ratings_is_refused(given: float | None) -> None:
    bare = ratings()
    weights = None if given is None else np.full(len(bare.items), given, np.float32)
    with pytest.raises(InputError, match=r"all ratings are equal.*--columns weight=NAME"):
        fitted(SmallData(9, Histories(bare.items, bare.offsets, weights)), 9, weighted=True)


def test_a_log_that_is_too_large_keeps_users_by_the_seed() -> None:
    data = ring()
    kept = [fitted(data, pairs=100), fitted(data, pairs=100)]
    other = build_model("user-knn", Catalogue(N, {}), {"pairs": 100})
    told = other.fit(data, seed=1)
    distinct = (data.train.to_csr(N) > 0).nnz
    assert told["pairs"] <= 100 < distinct
    assert told["left_out"] == distinct - told["pairs"]
    assert torch.equal(kept[0].items, kept[1].items)
    assert not torch.equal(kept[0].items, other.items)
    whole = {tuple(sorted(set(h))) for h in (data.train[u].tolist() for u in range(60))}
    users = kept[0].users[kept[0].users >= 0]
    for user in users.unique():
        assert tuple(kept[0].items[kept[0].users == user].tolist()) in whole  # whole histories


def test_a_loaded_state_counts_at_once() -> None:
    first, second = fitted(ring(seed=0)), fitted(ring(seed=1))
    assert not torch.equal(first.score(ASKED), second.score(ASKED))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.score(ASKED), second.score(ASKED))
    second.fit(ring(seed=2))
    assert not torch.equal(first.score(ASKED), second.score(ASKED))


def test_reasons_are_the_neighbours_who_took_it() -> None:
    data = ring()
    model = fitted(data, neighbours=9)
    history = ASKED.take([0])
    scores = model.score(history)[0]
    row = int(scores.argmax())
    found = model.reasons(history, row)
    assert found.kind == "neighbour"
    assert found.weights.sum() == pytest.approx(float(scores[row]), abs=1e-5)
    for user in found.rows:
        assert row in model.items[model.users == int(user)]


def test_nobody_to_compare_with_is_no_error() -> None:
    model = fitted(SmallData(N, Histories.of([[], []])))
    assert model.score(ASKED).abs().sum() == 0
    assert len(model.reasons(ASKED.take([0]), 3).rows) == 0


@pytest.mark.parametrize(
    "options", [{"neighbours": 0}, {"pairs": 0}, {"shrink": -1.0}, {"similarity": "other"}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("user-knn", Catalogue(N, {}), options)
