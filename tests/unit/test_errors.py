from __future__ import annotations

import copy
import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import ArtefactError, BudgetError, ConfigError, InputError, RecrayError


def test_the_message_says_where_what_and_what_to_do() -> None:
    error = InputError("unknown column 'usr'.", where="log.csv", fix="did you mean 'user'?")
    assert str(error) == "log.csv: unknown column 'usr'. did you mean 'user'?"
    assert str(InputError("empty")) == "empty"


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, 2), (ConfigError, 2), (ArtefactError, 2), (BudgetError, 1), (RecrayError, 1)],
)
def test_exit_codes(kind: type[RecrayError], code: int) -> None:
    assert kind("x").exit_code == code
    assert (code == 2) == issubclass(kind, ValueError)


@given(st.text(), st.text(), st.text())
def test_a_message_is_one_line_of_bounded_length(what: str, where: str, fix: str) -> None:
    said = str(InputError(what * 50, where=where, fix=fix))
    assert len(said.splitlines()) <= 1
    assert len(said) < 900 + len(fix)


def test_a_million_characters_are_cut() -> None:
    said = str(InputError(f"the id {'x' * 1_000_000} is too long", where="y" * 1_000_000))
    assert len(said) < 900
    assert said.startswith("yyy")
    assert "1,000,000 characters" in said


def test_an_error_survives_a_process_boundary() -> None:
    error = ConfigError("a", where="b", fix="c")
    twin = copy.copy(error)  # by __reduce__, as between processes
    assert (type(twin), str(twin), twin.where, twin.fix) == (ConfigError, str(error), "b", "c")
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(ArtefactError, match=r"here: gone"),
    ):
        pool.apply(_fail)


def _fail() -> None:
    raise ArtefactError("gone", where="here")
