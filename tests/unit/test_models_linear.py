"""EASE against the closed form in float64, its truncation, and its refusal of what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model, linear
from recray.models.base import Catalogue
from recray.models.linear import inverse_gram, memory_needed, most_items
from tests.models_data import ring

torch.set_num_threads(1)

N = 23


def closed_form(reg: float) -> np.ndarray:
    x = (ring().train.to_csr(N).toarray() > 0).astype(np.float64)
    p = np.linalg.inv(x.T @ x + reg * np.eye(N))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    return np.asarray(b)


def fitted(**options: Any) -> Any:
    model = build_model("ease", Catalogue(N, {}), options)
    model.fit(ring())
    return model


def test_scores_are_the_closed_form() -> None:
    asked = [[3], [], [1, 2, 1], [-1, 7]]
    b = np.maximum(closed_form(20.0), 0)
    want = np.stack([b[sorted({i for i in h if i >= 0})].sum(0) for h in asked])
    found = fitted(reg=20.0).score(Histories.of(asked)).numpy()
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)


def test_of_each_line_the_greatest_are_kept() -> None:
    model = fitted(reg=20.0, neighbours=3)
    b = closed_form(20.0)
    for i in range(N):
        best = np.maximum(np.sort(b[i])[::-1][:3], 0)
        np.testing.assert_allclose(model.weights[i].numpy(), best, rtol=1e-3, atol=1e-6)
    assert (b < 0).any()


@pytest.mark.parametrize("tile", [1, 4, 2048])
def test_the_inverse_is_whole_whatever_the_tiles(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_TILE", tile)
    monkeypatch.setattr(linear, "CELLS", 40)
    x = (np.random.default_rng(0).random((50, 11)) < 0.3).astype(np.float32)
    found = inverse_gram(sparse.csr_matrix(x), 2.5)
    np.testing.assert_allclose(found, np.linalg.inv(x.T @ x + 2.5 * np.eye(11)), rtol=1e-3, atol=1e-6)
    assert found.dtype == np.float32


def test_the_most_popular_alone() -> None:
    counts = np.asarray((ring().train.to_csr(N) > 0).sum(0)).ravel()
    model = fitted(reg=20.0, items=8)
    scores = model.score(Histories.of([list(range(N))]))[0]
    told = set(np.flatnonzero(scores.numpy()).tolist())
    assert len(told) == 8
    assert counts[list(told)].min() >= np.delete(counts, list(told)).max()
    silent = next(i for i in range(N) if i not in told)
    assert model.score(Histories.of([[silent]])).abs().sum() == 0


def test_what_does_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("ease", Catalogue(100_000, {}), {"neighbours": 1, "memory_gib": 8.0})
    with pytest.raises(ConfigError) as refused:
        model.fit(ring())
    said = str(refused.value)
    assert "\n" not in said
    assert "37.6 GiB for 100,000 items and 8.0 GiB are free" in said
    items = int(said.split("options.items=")[1].split()[0])
    assert memory_needed(items) <= 8 * 2**30 < memory_needed(items + 200)
    monkeypatch.setattr(linear, "free_memory", lambda: 100)
    with pytest.raises(ConfigError, match="are free"):
        fitted()


@settings(max_examples=60, deadline=None)
@given(st.integers(1 << 29, 1 << 40))
def test_the_most_items_just_fit(memory: int) -> None:
    most = most_items(memory)
    assert memory_needed(most) <= memory < memory_needed(most + 100)


def test_memory_is_what_it_says() -> None:
    assert memory_needed(40_981) < 7 * 2**30  # Gowalla fits into 10 GiB
    assert linear.free_memory() > 1 << 20


def test_reasons_sum_to_the_score() -> None:
    model = fitted()
    history = Histories.of([[3, 4, 3, -1]])
    scores = model.score(history)[0]
    for row in (2, 5, 20):
        found = model.reasons(history, row)
        assert sorted(found.rows) == [3, 4]
        assert found.weights.sum() == pytest.approx(float(scores[row]), abs=1e-6)


@pytest.mark.parametrize("options", [{"reg": 0.0}, {"neighbours": 0}, {"items": -1}, {"memory_gib": -1.0}])
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("ease", Catalogue(N, {}), options)
