"""The filter against dense linear algebra, and what each of its parts is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from tests.models_data import SmallData, ring

torch.set_num_threads(1)

N = 23


def dense(data: Any, n: int, *, dim: int, alpha: float, low: float, sharpen: float) -> NDArray[Any]:
    """W written out, with nothing cut."""
    x = (data.train.to_csr(n).toarray() > 0).astype(np.float64)
    users, items = np.maximum(x.sum(1), 1), np.maximum(x.sum(0), 1)
    y = x / np.sqrt(users)[:, None]
    gram, norms = y.T @ y, np.sqrt((y**2).sum(0)) + 1e-30
    k = gram / np.outer(norms ** (2 * alpha), norms ** (2 - 2 * alpha))
    r = y / np.sqrt(items)
    smooth = r.T @ r
    for matrix in (k, smooth):
        np.fill_diagonal(matrix, 0)
    k *= (items @ smooth).sum() / (items @ k).sum()
    _, s, v = np.linalg.svd(r)
    v, s = v[: min(dim, len(s))].T, s[: min(dim, len(s))]
    v, s = v[:, s > 1e-4], s[s > 1e-4]
    w = k + low * v @ v.T * np.sqrt(items) / np.sqrt(items)[:, None]
    w = w + w @ v @ np.diag(np.exp(-sharpen * s**2) - 1) @ v.T
    np.fill_diagonal(w, 0)
    return np.asarray(w)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 5, "alpha": 0.7, "low": 0.3, "sharpen": 0.5},
        {"dim": 40, "alpha": 0.5, "low": 0.0, "sharpen": 2.0},
        {"dim": 3, "alpha": 0.6, "low": 1.0, "sharpen": 0.0},
    ],
)
def test_scores_are_the_filter_written_out(options: dict[str, Any]) -> None:
    data = ring()
    model = build_model("spectral", Catalogue(N, {}), options)
    model.fit(data)
    want = np.maximum(dense(data, N, **options), 0)
    asked = [[3], [], [1, 2, 1], [-1, 7]]
    found = model.score(Histories.of(asked)).numpy()  # type: ignore[operator]
    lines = np.stack([want[sorted({i for i in h if i >= 0})].sum(0) for h in asked])
    np.testing.assert_allclose(found, lines, rtol=2e-2, atol=2e-4)


def test_of_each_line_the_greatest_are_kept() -> None:
    whole = build_model("spectral", Catalogue(N, {}), {"dim": 5})
    few = build_model("spectral", Catalogue(N, {}), {"dim": 5, "low": 0.0, "sharpen": 0.0, "neighbours": 4})
    for model in (whole, few):
        model.fit(ring())
    assert few.weights.shape == (N, 4)
    assert (few.weights[:, :-1] >= few.weights[:, 1:]).all()
    assert (whole.weights > 0).sum() > (few.weights > 0).sum()


def test_the_low_pass_joins_what_no_user_joins() -> None:
    """Items 0 and 5 of one block never meet, but share neighbours; item 6 is of the other block."""
    rng = np.random.default_rng(0)
    rows = []
    for u in range(200):
        block = np.arange(6) + 6 * (u % 2)
        picked = rng.choice(block, 3, replace=False)
        rows.append([int(i) for i in picked if not {0, 5} <= set(picked.tolist()) or i != 5])
    scores = {}
    for low in (0.0, 0.5):
        model = build_model("spectral", Catalogue(12, {}), {"dim": 2, "low": low, "sharpen": 0.0})
        model.fit(SmallData(12, Histories.of(rows)))  # type: ignore[arg-type]
        scores[low] = model.score(Histories.of([[0]]))[0]  # type: ignore[operator]
    assert scores[0.0][5] == 0
    assert scores[0.5][5] > 5 * scores[0.5][6].clamp(min=1e-3)


def test_an_item_that_nobody_took_is_no_error() -> None:
    model = build_model("spectral", Catalogue(30, {}), {"dim": 64})
    model.fit(SmallData(30, ring().train))  # type: ignore[arg-type]
    found = model.score(Histories.of([[29], [3]]))  # type: ignore[operator]
    assert torch.isfinite(found).all()
    assert found[0].abs().sum() == 0


@pytest.mark.parametrize(
    "options", [{"dim": 0}, {"neighbours": 0}, {"alpha": 2.0}, {"low": -1.0}, {"sharpen": -1.0}]
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("spectral", Catalogue(N, {}), options)
