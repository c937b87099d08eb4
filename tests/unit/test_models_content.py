"""Content: its three parts against the formulas, profiles, planted likeness, and nothing to compare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data.item_features import ItemFeatures
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.content import angles_of, described, values_of, words_of
from tests.models_data import SmallData

torch.set_num_threads(1)

TEXTS = ["Red wine, red grapes", "red wine", "Blue cheese", "blue wine cheese knife", "", "42"]


def test_words_are_tf_idf_written_out() -> None:
    found = words_of(TEXTS).toarray()
    df = {"red": 2, "wine": 3, "blue": 2, "cheese": 2}  # grapes, knife and 42 are in one text each
    weight = {word: math.log(7 / (1 + n)) for word, n in df.items()}
    first = {"red": (1 + math.log(2)) * weight["red"], "wine": weight["wine"]}
    length = math.sqrt(sum(v**2 for v in first.values()))
    assert sorted(found[0][found[0] > 0]) == pytest.approx(sorted(v / length for v in first.values()))
    np.testing.assert_allclose((found**2).sum(1), [1, 1, 1, 1, 0, 0], rtol=1e-6)
    assert (found @ found.T)[0, 1] > (found @ found.T)[0, 3] > (found @ found.T)[0, 2] == 0


def features(**given: Any) -> ItemFeatures:
    n = len(next(iter(given.values())))
    empty = {
        "names": (), "sizes": (), "categories": np.zeros((n, 0), np.int32),
        "numbers": np.zeros((n, 0), np.float32), "number_names": (), "texts": [""] * n,
    }  # fmt: skip
    return ItemFeatures(**{**empty, **given})


def test_a_rare_value_in_common_says_more_and_places_of_a_cell_are_one_list() -> None:
    codes = np.array([[1, 2, 1], [2, 1, 1], [1, 0, 1], [2, 3, 2], [0, 0, 0], [3, 2, 2]], np.int32)
    some = features(categories=codes, names=("genres", "genres#2", "kind"), sizes=(4, 4, 3))
    found = values_of(some)
    likeness = (found @ found.T).toarray()
    assert found.shape[1] == 7
    assert likeness[0, 1] == pytest.approx(1)  # the same genres in another order
    assert likeness[3, 5] == pytest.approx(1)
    assert likeness[0, 2] < 1
    assert likeness[4].sum() == 0


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_numbers_are_most_like_themselves(z: list[float]) -> None:
    found = angles_of(np.array(z, np.float32)[:, None]).toarray()
    likeness = found @ found.T
    np.testing.assert_allclose(np.diag(likeness), 1, rtol=1e-5)
    want = [[math.cos(math.atan(a) - math.atan(b)) for b in z] for a in z]
    np.testing.assert_allclose(likeness, want, atol=1e-5)


def test_parts_are_weighted_cosines() -> None:
    codes = np.array([[1], [1], [2], [2], [1], [2]], np.int32)
    some = features(texts=TEXTS, categories=codes, names=("kind",), sizes=(3,), numbers=np.ones((6, 1)))
    lines = described(some, 2.0, 1.0, 0.5)
    words, values = words_of(TEXTS), values_of(some)
    want = 2 * (words @ words.T) + (values @ values.T)
    np.testing.assert_allclose((lines @ lines.T).toarray(), want.toarray() + 0.5, atol=1e-5)
    assert described(some, 0.0, 0.0, 0.0).nnz == 0


def shop(texts: list[str]) -> Any:
    return SmallData(len(texts), Histories.of([[0, 1]] * 3), item_features=pa.table({"text": texts}))


WORDS = [["sun", "sea", "sand", "shell"], ["snow", "ski", "ice", "skate"]]
POSTS = [" ".join(np.random.default_rng(i).permutation(WORDS[i % 2])[:3]) + f" {i}" for i in range(60)]


def fitted(**options: Any) -> Any:
    model = build_model("content", Catalogue(60, {}), {"dim": 8, **options})
    model.fit(shop(POSTS))
    return model


def test_likes_are_found_and_numbered_words_do_not_part_them() -> None:
    scores = fitted().score(Histories.of([[0, 2], [1]])).numpy()
    assert scores[0, ::2].min() > scores[0, 1::2].max()
    assert scores[1, 1::2].min() > scores[1, ::2].max()
    assert np.abs(scores).max() <= 1 + 1e-5


def test_inner_products_survive_the_svd() -> None:
    vectors = fitted(dim=16).item_vectors().detach()
    words = words_of(POSTS)
    np.testing.assert_allclose((vectors @ vectors.T).numpy(), (words @ words.T).toarray(), atol=1e-3)
    assert vectors.shape == (60, 16)


def test_newer_items_say_more_and_weights_count() -> None:
    mixed = Histories(np.array([0, 1], np.int32), np.array([0, 2]), np.array([5, 1], np.float32))
    newer = fitted(decay=0.5).score(mixed)[0]
    assert newer[3] > newer[2]
    heavier = fitted(decay=1.0, weighted=True).score(mixed)[0]
    assert heavier[2] > heavier[3]


def test_reasons_sum_to_the_score() -> None:
    model = fitted()
    history = Histories.of([[0, 7, 2, -1, 0]])
    scores = model.score(history)[0]
    for row in (4, 5):
        found = model.reasons(history, row)
        assert sorted(found.rows) == [0, 2, 7]
        assert found.weights.sum() == pytest.approx(float(scores[row]), abs=1e-5)
    assert model.reasons(history, 4).rows[0] == 0


def test_nothing_to_compare_is_told_in_one_line() -> None:
    for data in (SmallData(2, Histories.of([[0, 1]])), shop(["one", "two"])):
        model = build_model("content", Catalogue(2, {}), {"dim": 4})
        with pytest.raises(ConfigError, match="no item features to compare") as told:
            model.fit(data)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("options", [{"dim": 0}, {"decay": 0.0}, {"decay": 1.1}, {"text": -1.0}])
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("content", Catalogue(2, {}), options)
