"""Schemathesis over the OpenAPI document: every operation, with what it allows and what it forbids."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings

from benchmarks._reliability_door import door
from recray.bundles.bundle import Bundle

DOCUMENT = "/openapi.json"
ADMIN = "the token of a server in this process"


@dataclass
class Told:
    """How many requests were made of which paths, how many were told to come again (503 with Retry-After,
    for a deadline that cannot be kept), and those that were answered with 500 and above."""

    requests: int = 0
    shed: int = 0
    paths: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)  # ids of requests that were answered
    items: list[str] = field(default_factory=list)  # that were in those answers


def asked_of(served: str | Bundle, examples: int, headers: Mapping[str, str] | None = None) -> Told:
    """Ask the server at a URL, or the door of a bundle in this process, `examples` times an operation and
    mode. Raises ModuleNotFoundError without schemathesis."""
    import schemathesis.openapi

    if isinstance(served, str):
        return _asked(schemathesis.openapi.from_url(served + DOCUMENT), examples, headers, served)
    with (
        tempfile.TemporaryDirectory(prefix="recray-api-") as folder,
        door(served, Path(folder), ADMIN) as app,
    ):
        headers = {"authorization": f"Bearer {ADMIN}"}
        return _asked(schemathesis.openapi.from_asgi(DOCUMENT, app), examples, headers, None)


def _asked(document: Any, examples: int, headers: Mapping[str, str] | None, url: str | None) -> Told:
    from schemathesis import GenerationMode

    told = Told()
    found = [one.ok() for one in document.get_all_operations()]
    for operation in sorted(found, key=lambda one: one.path.startswith("/admin/")):  # they change who answers
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:

            def ask(case: Any) -> None:
                base = {} if url is None else {"base_url": url}
                if told.requests % 2:
                    _name_known(case, told)
                answer = case.call(headers=dict(headers or {}), **base)
                told.requests += 1
                told.paths.add(case.path)
                if case.path == "/v1/recommend" and answer.status_code == 200:
                    told.answers.append(answer.json()["request_id"])
                    told.items += [one["item"] for one in answer.json()["items"][:3]]
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


def _name_known(case: Any, told: Told) -> None:
    """Put ids that are there where a document can only say what ids look like."""
    places = case.path_parameters or {}
    for name, known in (("request_id", told.answers), ("id", told.items)):
        if name in places and known:
            places[name] = known[told.requests % len(known)]
    if case.path == "/admin/items" and isinstance(case.body, dict) and told.items:
        some = told.items[told.requests % len(told.items) :][:2]
        new = [{"item": f"new{told.requests}", "like": some}]
        case.body.update(zip(("withdraw", "restore", "add"), (some, some[:1], new)))
