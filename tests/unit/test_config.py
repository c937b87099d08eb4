from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray import config, recipes
from recray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 3
    kind: Literal["a", "b"] = "a"
    maybe: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    free: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_build_makes_nested_values_of_the_right_types() -> None:
    made = config.build(
        Outer,
        {"name": "x", "count": "4", "maybe": None, "sizes": [5, "6"], "inner": {"rate": 1, "on": "yes"}},
    )
    assert made == Outer(name="x", count=4, sizes=(5, 6), inner=Inner(rate=1.0, on=True))
    quoted = config.override(Outer(name="x"), ["free.column='3'", 'free.other="true"', "free.bare=3"])
    assert quoted.free == {"column": "3", "other": "true", "bare": 3}
    assert config.build(Outer, config.as_dict(made)) == made


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "x", "cuont": 1}, "unknown setting 'cuont'. did you mean 'count'"),
        ({"name": "x", "inner": {"rat": 1}}, "unknown setting 'inner.rat'"),
        ({"name": "x", "count": "many"}, "count is 'many'. it must be of type int"),
        ({"name": "x", "count": 1.5}, "count is 1.5"),
        ({"name": "x", "count": float("inf")}, "count is inf"),
        ({"name": "x", "count": True}, "count is True"),
        ({"name": "x", "kind": "c"}, "choose one of a, b"),
        ({"name": "x", "inner": {"rate": "nan"}}, "inner.rate is 'nan'"),
        ({"name": "x", "inner": {"rate": "inf"}}, "inner.rate is 'inf'"),
        ({"name": "x", "inner": {"rate": float("-inf")}}, "inner.rate is -inf"),
        ({"name": 3}, "name is 3"),
        ({"name": True}, "name is True"),
        ({"name": "x", "inner": {"on": 2}}, "inner.on is 2"),
        ({"name": "x", "inner": {"rate": True}}, "inner.rate is True"),
        ({"name": "x", "inner": {"on": "perhaps"}}, "inner.on is 'perhaps'"),
        ({"name": "x", "inner": 3}, "inner must be a group"),
        ({"name": "x", "free": 3}, "free must be a mapping"),
        ({"name": "x", "sizes": "1,b"}, "sizes is 'b'"),
        ({}, "incomplete settings Outer"),
    ],
)
def test_build_refuses_what_it_does_not_know(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        config.build(Outer, values)


def test_override_changes_one_thing_by_its_type() -> None:
    changed = config.override(
        Outer(name="x"),
        [
            "count=1e3",
            "inner.rate=5",
            "free.dim=64",
            "free.deep.er=true",
            "maybe=7",
            "maybe=none",
            "sizes=[3,4]",
        ],
    )
    assert changed.count == 1000
    assert changed.inner == Inner(rate=5.0)
    assert changed.free == {"dim": 64, "deep": {"er": True}}
    assert changed.maybe is None
    assert changed.sizes == (3, 4)


@pytest.mark.parametrize(
    "word", ["count", "=3", "cuont=3", "inner.rat=1", "name.x=1", "inner=3", "count=three", "free.a.b=1"]
)
def test_override_refuses(word: str) -> None:
    with pytest.raises(ConfigError):
        config.override(Outer(name="x", free={"a": 1}), [word])


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer(name="x").count = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("1e3", 1000.0),
        ("true", True),
        ("None", None),
        ("[1, b]", [1, "b"]),
        ("x", "x"),
    ],
)
def test_guess(text: str, value: object) -> None:
    assert config.guess(text) == value


NAMES = st.sampled_from(["count", "kind", "maybe", "inner", "sizes", "free", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(st.dictionaries(NAMES, VALUES))
def test_whatever_is_given_is_built_or_refused(values: dict[str, Any]) -> None:
    try:
        made = config.build(Outer, {"name": "n", **values})
    except ConfigError:
        return
    assert isinstance(made.count, int)
    assert isinstance(made.inner, Inner)
    assert config.build(Outer, config.as_dict(made)) == made


@pytest.mark.parametrize(
    ("text", "seconds"), [("10ms", 0.01), ("1.5 s", 1.5), ("250us", 25e-5), ("2m", 120.0), ("1H", 3600.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert config.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "size"), [("64MB", 64_000_000), ("1 KiB", 1024), ("0.5gb", 5 * 10**8)])
def test_bytes(text: str, size: int) -> None:
    assert config.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "10", "ms", "-1ms", "0s", "10 parsecs", "nanms", "1e999s", "10ms 5"])
def test_units_are_asked_for(text: str) -> None:
    with pytest.raises(ConfigError, match="write for example"):
        config.parse_duration(text, what="p99")
    with pytest.raises(ConfigError, match="write for example"):
        config.parse_bytes(text)


@given(st.text(max_size=12))
def test_no_text_breaks_a_parser(text: str) -> None:
    for parse in (config.parse_duration, config.parse_bytes, config.parse_share):
        try:
            assert parse(text) > 0
        except ConfigError:
            pass


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("100%", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert config.parse_share(text) == pytest.approx(share)
    with pytest.raises(ConfigError):
        config.parse_share(f"-{text}")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'sasrek'. did you mean 'sasrec'"):
        recipes.recipe("sasrek")
    assert recipes.recipe("sasrec", ["train.epochs=5", "options.dim=128"]).train.epochs == 5
    with pytest.raises(ConfigError, match=r"train\.epoks"):
        recipes.recipe("sasrec", ["train.epoks=5"])
