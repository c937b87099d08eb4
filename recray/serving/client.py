"""Asking a running server over HTTP: `ship`, `rollback` and `why`, the verbs."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from recray.config import parse_share
from recray.errors import InputError, RecrayError
from recray.serving import auth
from recray.storage import place

URL = "http://127.0.0.1:8000"
WAIT_S = 900.0  # what a server may take to load a bundle everywhere


def ship(
    bundle: Any,
    *,
    canary: str | float | None = None,
    url: str = URL,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Let a running server answer from another bundle, without a request that fails or mixes the two.

    Every replica loads it beside what answers now and looks at its answers before the first user gets one.

    Args:
        bundle: an opened one, or its path or URI as the server's machines reach it; or a file of other items
            for the bundle that runs, `{"withdraw": [ids], "restore": [ids], "add": [{"item": id, "like":
            [ids]}]}` with a name that ends in `.json`.
        canary: "5%", the share of the users who get it at first, the same ones each time; it is rolled back
            by itself when their errors or p99 leave their band. The same bundle without it: all users.
        url: where the server listens.
        token, token_file: the admin's; also `$RECRAY_ADMIN_TOKEN`.

    Returns: the generation that answers, the one before, the one on canary, and whether anything changed.

    Raises:
        InputError: the bundle was refused (the running one goes on), another step is under way, or the token.
        RecrayError: the server cannot do it now.

    Example: `recray.ship("runs/bundle-2", canary="5%")`
    """
    artefact = getattr(bundle, "artefact", bundle)  # of an opened bundle
    where = str(getattr(artefact, "place", artefact))
    if where.endswith(".json"):
        return _asked(url, "items", _items(where, canary), token, token_file)
    if "://" not in where or where.startswith("file://"):
        where = place(where).uri  # the server's folder is another
    body: dict[str, Any] = {"bundle": where}
    if canary is not None:
        body["canary"] = share_of(canary)
    return _asked(url, "ship", body, token, token_file)


def rollback(
    *,
    url: str = URL,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Let a running server answer from the generation before again, or without the canary, at once.

    Args:
        url, token, token_file: as of `ship`.

    Returns: as `ship`.

    Raises:
        InputError: there is nothing to go back to, or the token.
        RecrayError: the server cannot do it now.

    Example: `recray.rollback()["generation"]`
    """
    return _asked(url, "rollback", {}, token, token_file)


def _items(path: str, canary: object) -> dict[str, Any]:
    """The body of a file of items. Raises InputError for what is none."""
    if canary is not None:
        raise InputError("items change for all users", where=path, fix="leave --canary out")
    try:
        made = json.loads(place(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"is no JSON file ({error})", where=path) from None
    if not isinstance(made, dict):
        raise InputError("is no JSON object", where=path, fix='write {"withdraw": ["id"]}')
    return made


def why(
    request_id: str,
    *,
    k: int = 10,
    url: str = URL,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """An answer that a running server kept (`answers:` in its file), made again, and why its items are in it.

    Args:
        request_id: of the answer. k: how many of its items are explained, at most 20.
        url: where the server listens.
        token, token_file: the user's; also `$RECRAY_TOKEN`.

    Returns: what was asked, `answered` as it was sent, the same `again`, whether they are equal, `reasons`.

    Raises:
        InputError: no such answer is kept, its bundle is gone, or the token.
        RecrayError: the server cannot do it now.

    Example: `recray.why("3f2b8c1d")["answered"]["items"]`
    """
    found = auth.find_token(token, None if token_file is None else os.fspath(token_file))
    where = f"v1/why/{urllib.parse.quote(request_id, safe='')}?k={k}"
    return _answer(url, where, None, found, f"give the token with --token-file or ${auth.TOKEN_ENV}")


def share_of(text: str | float) -> float:
    """ "5%" or 0.05 as a number between 0 and 1. Raises InputError."""
    share = parse_share(str(text), what="canary")
    if share == 1:
        raise InputError("a canary of all users is none", fix="leave it out")
    return share


def _asked(
    url: str, step: str, body: dict[str, Any], token: str | None, token_file: str | os.PathLike[str] | None
) -> dict[str, Any]:
    found = auth.find_token(token, None if token_file is None else os.fspath(token_file), env=auth.ADMIN_ENV)
    fix = f"give the admin's token with --token-file or ${auth.ADMIN_ENV}"
    return _answer(url, f"admin/{step}", body, found, fix)


def _answer(url: str, path: str, body: dict[str, Any] | None, found: str | None, fix: str) -> dict[str, Any]:
    """The answer to a POST, or without a body to a GET; fix: where the token is wrong."""
    if not _is_address(url):
        raise InputError("is not a server's address", where=url, fix=f"write it as {URL}")
    headers = {"content-type": "application/json"}
    if found is not None:
        headers["authorization"] = f"Bearer {found}"
    asked = urllib.request.Request(
        f"{url.rstrip('/')}/{path}", None if body is None else json.dumps(body).encode(), headers
    )
    try:
        with _opener().open(asked, timeout=WAIT_S) as answer:
            told: dict[str, Any] = json.loads(answer.read())
            return told
    except urllib.error.HTTPError as error:
        with error:
            raise _error(error, url, fix) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise InputError(
            f"no server of ours answers ({why})",
            where=url,
            fix="start one with `recray serve`, or give --url",
        ) from None


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0  # what is no port raises
    except ValueError:
        return False
    return sound and url.startswith(("http://", "https://")) and url.isprintable() and " " not in url


def _opener() -> urllib.request.OpenerDirector:
    """It knows no proxy and follows no redirect, which would take the token along: it goes to nobody else."""
    made = urllib.request.OpenerDirector()
    made.add_handler(urllib.request.HTTPHandler())
    made.add_handler(urllib.request.HTTPSHandler())
    made.add_handler(urllib.request.HTTPErrorProcessor())
    made.add_handler(urllib.request.HTTPDefaultErrorHandler())
    return made


def _error(error: urllib.error.HTTPError, url: str, fix: str) -> RecrayError:
    to = error.headers.get("location")
    if 300 <= error.code < 400 and to:
        words = f"answered {error.code}, a redirect to {to!r}, which is not followed"
        return InputError(words, where=url, fix="if that is your server, give it as --url")
    try:
        told = json.loads(error.read())["error"]
        words, where = str(told["message"]), told.get("where") or url
    except (ValueError, LookupError, TypeError, OSError, http.client.HTTPException):
        words, where = f"answered {error.code} {error.reason}", url
    if error.code in (401, 403):
        return InputError(words, where=url, fix=fix)
    kind = InputError if error.code < 500 else RecrayError
    return kind(words, where=None if where == "body.bundle" else where)
