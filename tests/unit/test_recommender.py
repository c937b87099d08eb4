"""Retrieve, leave out, rank: against a plain reading of the definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, Context, ModelConfig, Ranker, Retriever
from recray.models.embeddings import DenseTable
from recray.recommender import Candidates, Recommender
from recray.retrieval.delta import Delta
from recray.retrieval.index import INDEXES, build_index

N, D = 400, 8
CATALOGUE = Catalogue(N, {"day": 3})


class Mean(Retriever):
    """K queries: the mean of the history, turned by another matrix each."""

    name = "mean"

    def __init__(self, kinds: int = 1) -> None:
        super().__init__(CATALOGUE, ModelConfig())
        torch.manual_seed(0)
        self.tables["item"] = DenseTable(N, D)
        self.turn = torch.nn.Parameter(torch.randn(kinds, D, D))

    def encode(self, histories: Histories) -> Tensor:
        rows, lengths = histories.padded()
        mean_BD = self.tables["item"](torch.from_numpy(rows)).sum(1) / torch.from_numpy(lengths)[:, None]
        return torch.einsum("bd,kde->bke", mean_BD, self.turn)


class NoVectors(Mean):
    """The same scores, given as a whole."""

    has_vectors = False  # type: ignore[assignment]

    def score(self, histories: Histories) -> Tensor:
        with torch.inference_mode():
            return (self.encode(histories) @ self.tables["item"].dense().T).amax(1)  # type: ignore[operator]


class Wise(Ranker):
    """Likes rows by a fixed wave; the day moves it."""

    name = "wise"

    def __init__(self, n_items: int = N) -> None:
        super().__init__(Catalogue(n_items, {"day": 3}), ModelConfig())

    def inputs(self, histories: Histories, candidates: Any, context: Context | None = None) -> Any:
        raise NotImplementedError

    def score(self, histories: Histories, candidates: Any, context: Context | None = None) -> Tensor:
        day = np.zeros(len(histories)) if not context else context["day"]
        made = np.sin(candidates * 1.7 + np.asarray(day)[:, None]).astype(np.float32)
        return torch.from_numpy(np.where(candidates < 0, -np.inf, made).astype(np.float32))


POPULARITY = np.random.default_rng(5).integers(0, 9, N).astype(np.float32)
HISTORIES = Histories.of([[3, 9, 27], [5], [7, 7, 300, 12], list(range(60, 120)), [399]])


def made(retriever: Retriever, index: str = "exact", **more: Any) -> Recommender:
    built = build_index(index, retriever.tables["item"]) if retriever.has_vectors else None  # type: ignore[arg-type]
    return Recommender(retriever, built, popularity=POPULARITY, **more)


def plain(
    retriever: Mean, histories: Histories, k: int, exclude: Histories, allowed: NDArray[np.bool_]
) -> list[list[int]]:
    with torch.inference_mode():
        query = retriever.encode(histories).double()
        scores = (query @ retriever.tables["item"].dense().double().T).amax(1).numpy()  # type: ignore[operator]
    scores[:, ~allowed] = -np.inf
    for b in range(len(histories)):
        scores[b, exclude[b]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[int(i) for i in line if scores[b, i] > -np.inf][:k] for b, line in enumerate(order)]


def lists(rows: NDArray[np.int64]) -> list[list[int]]:
    return [[int(i) for i in line if i >= 0] for line in rows]


@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("left", [0, 1, 7, 39, N])
@pytest.mark.parametrize("k", [1, 10])
def test_retrieval_is_an_exact_filtered_search(kinds: int, index: str, left: int, k: int) -> None:
    allowed = np.zeros(N, bool)
    allowed[np.random.default_rng(left).permutation(N)[:left]] = True
    model = Mean(kinds)
    found = made(model, index).retrieve(HISTORIES, k, HISTORIES, allowed)
    assert lists(found.rows) == plain(model, HISTORIES, k, HISTORIES, allowed)
    assert (np.isneginf(found.scores) == (found.rows < 0)).all()


def test_a_model_without_vectors_answers_the_same() -> None:
    everything = np.ones(N, bool)
    ours = made(NoVectors(2)).retrieve(HISTORIES, 20, HISTORIES)
    assert lists(ours.rows) == plain(Mean(2), HISTORIES, 20, HISTORIES, everything)
    few = everything & (np.arange(N) % 17 == 0)
    ours = made(NoVectors(2)).retrieve(HISTORIES, 20, HISTORIES, few)
    assert lists(ours.rows) == plain(Mean(2), HISTORIES, 20, HISTORIES, few)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", [Mean(), NoVectors()])
def test_a_batch_answers_as_each_alone_and_in_two_steps(blend: float, model: Mean) -> None:
    recommender = made(model, ranker=Wise(), candidates=30, blend=blend)
    mixed = Histories.of([*(HISTORIES[b] for b in range(5)), [], [-1, -1]])
    days = {"day": np.array([0, 1, 2, 0, 1, 2, 0], np.int32)}
    together = recommender.recommend(mixed, 10, mixed, None, days)
    for b in range(7):
        one, day = mixed.take([b]), {"day": days["day"][b : b + 1]}
        found = recommender.retrieve(one, recommender.depth(10), one)
        scores = recommender.rank(one, found, day)
        alone = recommender.top(one, found, scores, 10)
        assert np.array_equal(alone.rows[0], together.rows[b])
        np.testing.assert_allclose(alone.scores[0], together.scores[b], rtol=1e-5)  # of a matmul's width
        assert alone.sources[0] == together.sources[b]
    assert together.sources == ["ranker"] * 5 + ["popular"] * 2


def test_scores_blend_as_stated() -> None:
    found = made(Mean()).retrieve(HISTORIES, 25, HISTORIES)
    ranker_scores = Wise().score(HISTORIES, found.rows).numpy()

    def z(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    for blend in (0.25, 0.5):
        ours = made(Mean(), ranker=Wise(), blend=blend).rank(HISTORIES, found)
        np.testing.assert_allclose(ours, (1 - blend) * z(ranker_scores) + blend * z(found.scores), atol=1e-5)
    assert np.array_equal(made(Mean(), ranker=Wise(), blend=0.0).rank(HISTORIES, found), ranker_scores)
    assert np.array_equal(made(Mean(), ranker=Wise(), blend=1.0).rank(HISTORIES, found), found.scores)
    assert np.array_equal(made(Mean()).rank(HISTORIES, found), found.scores)


def test_nobody_gets_what_is_popular_and_allowed() -> None:
    nobody, exclude = Histories.of([[], []]), Histories.of([[], [int(POPULARITY.argmax())]])
    allowed = np.arange(N) % 3 > 0
    ranked = made(Mean(), ranker=Wise()).recommend(nobody, 12, exclude, allowed)
    for b in range(2):
        wanted = [i for i in np.lexsort((np.arange(N), -POPULARITY)) if allowed[i] and i not in exclude[b]]
        assert ranked.rows[b].tolist() == wanted[:12]
        assert ranked.scores[b].tolist() == POPULARITY[wanted[:12]].tolist()
    assert ranked.sources == ["popular", "popular"]


def test_more_places_than_items_are_left_empty() -> None:
    ranked = made(Mean(), ranker=Wise(), candidates=5).recommend(HISTORIES, N + 50, HISTORIES)
    assert ranked.rows.shape == (5, N + 50)
    assert [(line >= 0).sum() for line in ranked.rows] == [
        N - len(set(HISTORIES[b].tolist())) for b in range(5)
    ]
    assert made(Mean()).recommend(Histories.of([]), 3).rows.shape == (0, 3)


def test_equal_scores_go_by_row() -> None:
    model = NoVectors()
    model.turn.data.zero_()
    assert made(model).recommend(HISTORIES, 4, HISTORIES).rows[1].tolist() == [0, 1, 2, 3]
    found = Candidates(np.array([[9, 4, 6, -1]]), np.array([[1.0, 1.0, 2.0, -np.inf]], np.float32))
    ranked = made(Mean()).top(HISTORIES.take([0]), found, found.scores, 5)
    assert ranked.rows.tolist() == [[6, 4, 9, -1, -1]]


@pytest.mark.parametrize("model", [Mean(), NoVectors()])
def test_similar_leaves_the_item_out(model: Mean) -> None:
    ranked = made(model).similar(5, 7)
    assert len(set(ranked.rows[0]) - {5}) == 7
    if model.has_vectors:
        vectors = model.tables["item"].dense().detach().double()  # type: ignore[operator]
        cosine = torch.nn.functional.cosine_similarity(vectors, vectors[5:6]).numpy()
        wanted = [i for i in np.argsort(-cosine) if i != 5][:7]
        assert ranked.rows[0].tolist() == wanted
        np.testing.assert_allclose(ranked.scores[0], cosine[wanted], atol=1e-5)


NEW, WITHDRAWN = st.lists(st.integers(0, N - 1), max_size=4), st.sets(st.integers(0, N + 3), max_size=40)


@settings(max_examples=40, deadline=None)
@given(changes=st.lists(st.tuples(NEW, WITHDRAWN), min_size=1, max_size=3), row=st.integers(0, N + 3))
def test_similar_after_changes_of_items_is_over_what_is_left(
    changes: list[tuple[list[int], set[int]]], row: int
) -> None:
    """And the index that it searches is made once, since new and withdrawn items are not in it."""
    first = made(Mean())
    before = first.similar(5, 7)
    old = first.retriever.item_vectors().detach().numpy()
    now = first
    for like, gone in changes:
        new = -old[like] * 3 + 1
        now = now.with_delta(Delta(N, new, [at for at in gone if at < N + len(new)]))
        row = min(row, N + len(new) - 1)
        unit = np.concatenate([old, new]).astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        left = np.setdiff1d(np.arange(len(unit)), [row, *gone])
        wanted = left[np.argsort(-(unit @ unit[row])[left], kind="stable")][:9]
        ranked = now.similar(row, 9)
        np.testing.assert_allclose(ranked.scores[0], (unit @ unit[row])[wanted], atol=1e-5)
        assert set(ranked.rows[0]) <= set(left)
        np.testing.assert_allclose(ranked.scores[0], (unit @ unit[row])[ranked.rows[0]], atol=1e-5)
    assert now._cosine is first._cosine
    assert np.array_equal(first.similar(5, 7).rows, before.rows)


def test_a_ranker_of_another_catalogue_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 items"):
        made(Mean(), ranker=Wise(7))
