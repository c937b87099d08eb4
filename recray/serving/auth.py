"""Who may ask: a bearer token for users and one for the admin, compared in constant time, kept as digests."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recray.errors import InputError

TOKEN_ENV = "RECRAY_TOKEN"
ADMIN_ENV = "RECRAY_ADMIN_TOKEN"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def find_token(
    token: str | None = None, token_file: str | None = None, *, env: str = TOKEN_ENV
) -> str | None:
    """The token to ask for: as given, else from a file, else from the environment, else none.

    Raises InputError for an empty or unusable token; the message never holds the token.
    """
    where = "token"
    if token is None and token_file is not None:
        where = token_file
        try:
            token = Path(token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise InputError("the token file cannot be read", where=token_file) from None
    if token is None:
        token = os.environ.get(env)
        where = f"${env}"
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError("is not a token", where=where, fix="use printable ASCII characters without spaces")
    return token


def digest(token: str) -> str:
    """What a replica keeps instead of the token: its sha256, as hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def found_digest(given: str | None, file: str | None, *, env: str = TOKEN_ENV) -> str | None:
    """A digest as it was given, else of the token that `find_token` finds, if any. Raises InputError."""
    if given is not None:
        return given
    token = find_token(token_file=file, env=env)
    return None if token is None else digest(token)


def with_digests(args: Mapping[str, Any], token: str | None) -> dict[str, Any]:
    """The args of a graph, its tokens as digests alone: the token as given, else the args' own digest, else
    that of their file, else of the environment. Raises InputError."""
    made = dict(args)
    if token is not None:
        made["token_digest"] = digest(find_token(token) or "")
    for name, env in (("token", TOKEN_ENV), ("admin_token", ADMIN_ENV)):
        found = found_digest(made.pop(f"{name}_digest", None), made.pop(f"{name}_file", None), env=env)
        if found is not None:
            made[f"{name}_digest"] = found
    return made


def check_exposure(host: str, token_digest: str | None) -> None:
    """Refuse to listen beyond loopback without a token. Raises InputError."""
    if token_digest is None and not is_loopback(host):
        raise InputError(
            "would answer other machines without asking for a token",
            where=f"host {host}",
            fix=f"set {TOKEN_ENV}, give a token, or listen on 127.0.0.1",
        )


def allowed(authorization: str | None, token_digest: str | None) -> bool:
    """Whether an `Authorization` header opens the door. Time does not tell how much of it matched."""
    if token_digest is None:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    same = hmac.compare_digest(digest(given.strip()), token_digest)
    return same and scheme.lower() == "bearer"
