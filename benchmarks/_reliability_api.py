"""Schemathesis over the OpenAPI document: every operation, with what it allows and what it forbids."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings

from recray.bundles.bundle import Bundle
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.settings import Batch
from recray.serving.state import open_state

DOCUMENT = "/openapi.json"


@dataclass
class Told:
    """How many requests were made of which paths, how many were told to come again (503 with Retry-After,
    for a deadline that cannot be kept), and those that were answered with 500 and above."""

    requests: int = 0
    shed: int = 0
    paths: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)


def asked_of(served: str | Bundle, examples: int, headers: Mapping[str, str] | None = None) -> Told:
    """Ask the server at a URL, or the door of a bundle in this process, `examples` times an operation and
    mode. Raises ModuleNotFoundError without schemathesis."""
    import schemathesis.openapi

    if isinstance(served, str):
        return _asked(schemathesis.openapi.from_url(served + DOCUMENT), examples, headers, served)
    with tempfile.TemporaryDirectory(prefix="recray-api-") as folder:
        users = open_state(folder)
        assert users is not None
        app = build_asgi(Ingress(served, Fused(served, Batch())), users=users)
        try:
            return _asked(schemathesis.openapi.from_asgi(DOCUMENT, app), examples, headers, None)
        finally:
            users.close()


def _asked(document: Any, examples: int, headers: Mapping[str, str] | None, url: str | None) -> Told:
    from schemathesis import GenerationMode

    told = Told()
    for found in document.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:

            def ask(case: Any) -> None:
                base = {} if url is None else {"base_url": url}
                answer = case.call(headers=dict(headers or {}), **base)
                told.requests += 1
                told.paths.add(case.path)
                if answer.status_code == 503 and "retry-after" in answer.headers:
                    told.shed += 1
                elif answer.status_code >= 500:
                    sent = f"{case.method} {case.path} {dict(case.headers or {})} {case.body!r:.900}"
                    told.faults.append(f"{sent}: {answer.status_code} {answer.text:.200}")

            strategy = operation.as_strategy(generation_mode=mode)
            patient = settings(
                max_examples=examples, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    patient(given(case=strategy)(ask))()
                except Exception as error:
                    if type(error).__name__ not in ("Unsatisfiable", "SkipTest", "Skipped"):
                        raise  # else nothing that the document forbids can be sent there
    return told
