"""What a bundle is looked at for before it may take another's place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recray.bundles.bundle import Bundle
from recray.bundles.changes import change
from recray.data.ids import Ids
from recray.errors import InputError
from recray.recommender import Recommender
from recray.serving import parity
from tests.serving_bundles import small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("parity"))


class Wrong(Recommender):
    """A recommender whose answers somebody spoils."""

    def __init__(self, plain: Recommender, spoil: Any) -> None:
        self.__dict__.update(plain.__dict__)
        self.spoil = spoil

    def rank(self, histories: Any, candidates: Any, context: Any = None) -> Any:
        return self.spoil(histories, super().rank(histories, candidates, context))


def spoilt(bundle: Bundle, spoil: Any) -> Bundle:
    return dataclasses.replace(bundle, recommender=Wrong(bundle.recommender, spoil))


def test_a_sound_bundle_passes(bundle: Bundle, tmp_path: Path) -> None:
    assert parity.sound(bundle) > 0
    assert parity.sound(small_bundle(tmp_path, ranker=False, index="hnsw"), beside=bundle) > 0
    parity.same_catalogue(bundle, bundle)


def test_answers_that_are_not_sound(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(histories: Any, scores: Any) -> Any:
        return np.where(np.isfinite(scores), np.inf, scores).astype(np.float32)

    def crowd(histories: Any, scores: Any) -> Any:
        return scores + np.float32(len(histories))

    with pytest.raises(InputError, match="no number"):
        parity.sound(spoilt(bundle, infinite))
    with pytest.raises(InputError, match="otherwise than one request alone") as error:
        parity.sound(spoilt(bundle, crowd))
    assert str(error.value).startswith(bundle.generation)
    assert "\n" not in str(error.value)


def test_a_slow_one_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.1, 0.01, 0.02, 0.01, 0.1, 0.01])  # disturbed once; then really slow
    monkeypatch.setattr(parity, "_seconds", lambda *_: next(times))
    assert parity.sound(bundle, beside=bundle) == 0.02
    monkeypatch.setattr(parity, "TRIES_S", 0.0)
    with pytest.raises(InputError, match=r"takes 100\.0 ms for 9 requests, the running one 10\.0"):
        parity.sound(bundle, beside=bundle)


def test_what_would_turn_requests_down_is_refused(bundle: Bundle) -> None:
    fewer = dataclasses.replace(bundle, context_values={})
    with pytest.raises(InputError, match="no context column weather"):
        parity.same_catalogue(fewer, bundle)
    assert bundle.item_features is not None
    without = dataclasses.replace(bundle, item_features=bundle.item_features.drop_columns(["price"]))
    with pytest.raises(InputError, match="no item column price"):
        parity.same_catalogue(without, bundle)
    other = dataclasses.replace(bundle, items=Ids([f"x{n}" for n in range(len(bundle.items))]))
    with pytest.raises(InputError, match="knows 0% of the items"):
        parity.same_catalogue(other, bundle)
    parity.same_catalogue(bundle, fewer)


def test_users_of_whom_all_is_withdrawn_are_no_fault(bundle: Bundle) -> None:
    left = bundle.items.values.to_pylist()[-1]
    none = change(bundle, withdraw=bundle.items.values.to_pylist())
    assert parity.sound(none) > 0
    one = change(bundle, withdraw=[item for item in bundle.items.values.to_pylist() if item != left])
    assert parity.sound(one) > 0
