"""The words of a space, and the points they mean."""

from __future__ import annotations

import numpy as np
import pytest

from recray.errors import ConfigError
from recray.tuning.space import Space

WORDS = ["lr=1e-4..1e-2@log", "dim=32..64", "codec=f32,int8", "drop=0..0.5"]


def test_words_give_kinds_scales_and_choices() -> None:
    lr, dim, codec, drop = Space.parse(WORDS).dimensions.values()
    assert (lr.kind, lr.log, lr.low, lr.high) == ("float", True, 1e-4, 1e-2)
    assert (dim.kind, dim.count) == ("int", 33)
    assert codec.choices == ("f32", "int8")
    assert (drop.kind, drop.log, drop.count) == ("float", False, None)


def test_choices_keep_their_types() -> None:
    space = Space.parse(["k=1,2.5,true,none,word"])
    assert space.dimensions["k"].choices == (1, 2.5, True, None, "word")


@pytest.mark.parametrize(
    "word",
    [
        "k",
        "k=",
        "=1..2",
        "k=2..1",
        "k=1..1",
        "k=a..b",
        "k=0..1@log",
        "k=1..2@cube",
        "k=a,,b",
        "k=a,a",
        "k=1..inf",
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_word(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Space.parse([word])
    assert word.split("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_twice_and_an_empty_space_are_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        Space.parse(["k=1..2", "k=3..4"])
    with pytest.raises(ConfigError, match="empty"):
        Space.parse([])


def test_samples_lie_inside_and_reach_both_ends_of_integers_evenly() -> None:
    space, rng = Space.parse(WORDS), np.random.default_rng(0)
    points = [space.sample(rng) for _ in range(3000)]
    assert all(space.holds(point) for point in points)
    counts = np.bincount([int(p["dim"]) - 32 for p in points], minlength=33)  # type: ignore[arg-type]
    assert counts.min() > 45, "each of 33 whole numbers is as likely as another"
    assert np.median([p["lr"] for p in points]) == pytest.approx(1e-3, rel=0.15)  # type: ignore[type-var]


def test_a_float_is_the_same_in_every_file() -> None:
    value = Space.parse(["x=0..1.0"]).sample(np.random.default_rng(1))["x"]
    assert value == float(f"{value:.6g}")


def test_encode_is_a_distance() -> None:
    space = Space.parse(WORDS)
    low = space.encode({"lr": 1e-4, "dim": 32, "codec": "f32", "drop": 0.0})
    high = space.encode({"lr": 1e-2, "dim": 64, "codec": "int8", "drop": 0.5})
    middle = space.encode({"lr": 1e-3, "dim": 48, "codec": "f32", "drop": 0.25})
    np.testing.assert_allclose(low, 0)
    np.testing.assert_allclose(high, 1)
    np.testing.assert_allclose(middle, [0.5, 0.5, 0, 0.5], atol=1e-12)


def test_a_small_space_is_enumerated_and_an_endless_one_is_not() -> None:
    space = Space.parse(["a=1..3", "b=x,y"])
    points = list(space.points())
    assert space.size == len(points) == 6
    assert points[:2] == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}]
    assert Space.parse(["a=0..1.5"]).size is None


def test_holds_knows_names_kinds_and_ends() -> None:
    space = Space.parse(["a=1..3", "b=x,y"])
    assert space.holds({"a": 2, "b": "x"})
    for wrong in (
        {"a": 2},
        {"a": 4, "b": "x"},
        {"a": 1.5, "b": "x"},
        {"a": 2, "b": "z"},
        {"a": True, "b": "x"},
    ):
        assert not space.holds(wrong)
