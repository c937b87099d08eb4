"""Tokens: where they come from, and that nothing listens to others without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from recray.errors import InputError
from recray.serving import auth


def test_the_nearest_token_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(auth.TOKEN_ENV, raising=False)
    assert auth.find_token() is None
    monkeypatch.setenv(auth.TOKEN_ENV, "of-the-environment")
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert auth.find_token() == "of-the-environment"
    assert auth.find_token(token_file=str(file)) == "of-the-file"
    assert auth.find_token("given", str(file)) == "given"


def test_of_a_graph_s_tokens_the_nearest_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    file = {"token_file": str(tmp_path / "token"), "layout": "fused"}
    for env in (auth.TOKEN_ENV, auth.ADMIN_ENV):
        monkeypatch.delenv(env, raising=False)
    assert auth.with_digests({"layout": "fused"}, None) == {"layout": "fused"}
    monkeypatch.setenv(auth.TOKEN_ENV, "of-the-environment")
    for args, given, wanted in (
        ({}, None, "of-the-environment"),
        (file, None, "of-the-file"),
        ({**file, "token_digest": auth.digest("of-the-args")}, None, "of-the-args"),
        ({**file, "token_digest": auth.digest("of-the-args")}, "given", "given"),
    ):
        made = auth.with_digests(args, given)
        assert made.pop("token_digest") == auth.digest(wanted)
        assert made == ({"layout": "fused"} if args else {})
    monkeypatch.setenv(auth.ADMIN_ENV, "keeper")
    assert auth.with_digests({}, None)["admin_token_digest"] == auth.digest("keeper")
    with pytest.raises(InputError):
        auth.with_digests({}, "")


@pytest.mark.parametrize("bad", ["", "two words", "tokén", "line\nbreak"])
def test_unusable_tokens_are_refused_without_being_shown(bad: str) -> None:
    with pytest.raises(InputError) as error:
        auth.find_token(bad)
    assert not bad or bad not in str(error.value)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        auth.find_token(token_file=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.3", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_nothing_listens_to_others_without_a_token(host: str, loopback: bool) -> None:
    assert auth.is_loopback(host) is loopback
    auth.check_exposure(host, auth.digest("secret"))
    if loopback:
        auth.check_exposure(host, None)
    else:
        with pytest.raises(InputError, match=auth.TOKEN_ENV):
            auth.check_exposure(host, None)


def test_only_the_right_bearer_opens() -> None:
    key = auth.digest("secret")
    assert auth.allowed("Bearer secret", key)
    assert auth.allowed("bearer  secret", key)
    for wrong in (None, "", "secret", "Bearer", "Bearer secret2", "Basic secret", "Bearer Secret"):
        assert not auth.allowed(wrong, key)
    assert auth.allowed(None, None)
