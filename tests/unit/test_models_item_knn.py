"""Item neighbours against the formula written out, and their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_data import ring

from recray.data.sequences import Histories
from recray.models import build_model, item_knn
from recray.models.base import Catalogue

torch.set_num_threads(1)


def plain(matrix: np.ndarray, shrink: float) -> np.ndarray:
    norms = np.sqrt((matrix**2).sum(0))
    similar = matrix.T @ matrix / (np.outer(norms, norms) + shrink)
    np.fill_diagonal(similar, 0)
    return similar


@pytest.mark.parametrize("room", [1 << 24, 50])  # one block, and many
def test_scores_are_the_sums_of_the_k_nearest(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_knn, "_BLOCK", room)
    data = ring()
    model = build_model("item-knn", Catalogue(23, {}), {"neighbours": 4, "shrink": 3.0})
    model.fit(data)
    similar = plain(data.train.to_csr(23).toarray(), 3.0)
    kept = np.zeros_like(similar)
    for i, row in enumerate(similar):
        best = np.argsort(-row)[:4]
        kept[i, best] = row[best]
    asked = Histories.of([[3], [], [1, 2, 1], [-1, 7]])
    want = np.stack(
        [sum((kept[i] for i in h if i >= 0), np.zeros(23)) for h in ([3], [], [1, 2, 1], [-1, 7])]
    )
    np.testing.assert_allclose(model.score(asked).numpy(), want, rtol=1e-4, atol=1e-6)


def test_shrinking_prefers_the_better_supported_neighbour() -> None:
    together = [[0, 1]] * 20 + [[0, 1, 2]] + [[0]] * 9  # item 2 came once, always with 0 and 1
    data = ring()
    object.__setattr__(data, "train", Histories.of(together))
    order = {}
    for shrink in (0.0, 50.0):
        model = build_model("item-knn", Catalogue(23, {}), {"shrink": shrink})
        model.fit(data)
        order[shrink] = model.score(Histories.of([[2]]))[0]
    assert order[0.0][0] > 0
    assert order[50.0].max() < order[0.0].max()
    first = build_model("item-knn", Catalogue(23, {}), {"shrink": 50.0})
    first.fit(data)
    assert first.score(Histories.of([[0]]))[0, 1] > 5 * first.score(Histories.of([[0]]))[0, 2]


@pytest.mark.parametrize("how", ["tfidf", "bm25"])
def test_a_user_of_many_items_says_less(how: str) -> None:
    wide, narrow = list(range(20)), [0, 21]
    matrix = Histories.of([wide, narrow]).to_csr(23)
    before = matrix.copy()
    made = item_knn.weighted(matrix, how)
    assert made[1, 0] > made[0, 0] > 0
    assert (matrix != before).nnz == 0  # the given matrix is left alone
    repeated = item_knn.weighted(Histories.of([[0, 0, 0, 1], [2]]).to_csr(3), how)
    assert 1 < repeated[0, 0] / repeated[0, 1] < 3  # counts saturate
