"""Traces of single requests: whose they are, what they hold, that they name nobody, and nothing when off."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.bundles.bundle import Bundle
from recray.config import build
from recray.errors import ConfigError
from recray.feedback.log import read
from recray.serving.http import Reply, build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.seen import Seen
from recray.serving.settings import Batch, GraphArgs
from recray.serving.tracing import Parent, Tracer, Tracing, open_tracer, parent_of
from tests.serving_bundles import small_bundle

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("tracing"))


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (f"00-{TRACE}-{SPAN}-01", Parent(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-00", Parent(TRACE, SPAN, False)),
        (f"00-{TRACE}-{SPAN}-03", Parent(TRACE, SPAN, True)),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", Parent(TRACE, SPAN, True)),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE[1:]}-{SPAN}-01", None),
        ("", None),
    ],
)
def test_whose_trace_it_is(header: str, wanted: Parent | None) -> None:
    assert parent_of([(b"accept", b"*/*"), (b"traceparent", header.encode())]) == wanted


@given(st.binary(max_size=80))
def test_any_header_is_a_parent_or_none(header: bytes) -> None:
    found = parent_of([(b"traceparent", header)])
    assert found is None or len(found.trace) == 32


def asked(bundle: Bundle, tracer: Tracer | None, *headers: dict[str, str]) -> list[httpx.Response]:
    """One request a set of headers; the log is closed at the end."""

    async def scene() -> list[httpx.Response]:
        app = build_asgi(Ingress(bundle, Fused(bundle, Batch())), seen=Seen(tracer=tracer))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            found = []
            for head in headers:
                body = {"user": "u1", "history": ["i1", "i2"], "k": 3}
                found.append(await client.post("/v1/recommend", json=body, headers=head))
            if tracer is not None:
                tracer.close()
            return found

    return asyncio.run(scene())


def spans_of(folder: Path) -> list[list[dict[str, Any]]]:
    lines = [line["resourceSpans"] for line in read(folder, "spans")]
    assert all(len(line) == 1 and len(line[0]["scopeSpans"]) == 1 for line in lines)
    return [line[0]["scopeSpans"][0]["spans"] for line in lines]


def test_the_spans_of_a_request(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-request-id": "mine"}
    with caplog.at_level(logging.INFO, logger="recray.access"):
        (answer,) = asked(bundle, Tracer(tmp_path, Tracing(share=1e-9)), head)
    (spans,) = spans_of(tmp_path)
    root, wait, retrieve, rank = spans
    assert [span["name"] for span in spans] == ["recommend", "wait", "retrieve", "rank"]
    assert {span["traceId"] for span in spans} == {TRACE}
    assert root["parentSpanId"] == SPAN
    assert {span["parentSpanId"] for span in spans[1:]} == {root["spanId"]}
    assert len({span["spanId"] for span in spans}) == 4
    timing = answer.json()["timing_ms"]
    for span in spans:
        took = (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e6
        assert took == pytest.approx(timing["total" if span is root else span["name"]], abs=1e-3)
        assert int(span["startTimeUnixNano"]) >= int(root["startTimeUnixNano"])
        assert int(span["endTimeUnixNano"]) <= int(root["endTimeUnixNano"])
    assert wait["endTimeUnixNano"] == retrieve["startTimeUnixNano"]
    assert retrieve["endTimeUnixNano"] == rank["startTimeUnixNano"]
    told = {one["key"]: one["value"] for one in root["attributes"]}
    assert told["recray.generation"] == {"stringValue": bundle.generation}
    assert told["recray.items"] == {"intValue": "3"}
    text = json.dumps(spans)
    assert not any(f'"{name}"' in text for name in ("u1", "i1", "i2")), "nobody is named"
    assert json.loads(caplog.records[-1].getMessage())["trace_id"] == TRACE


def test_a_share_is_drawn_and_a_parent_decides(bundle: Bundle, tmp_path: Path) -> None:
    sampled, not_sampled = (f"00-{TRACE}-{SPAN}-0{flag}" for flag in (1, 0))
    heads = [{"traceparent": sampled}] * 2 + [{"traceparent": not_sampled}] * 5 + [{}] * 40
    asked(bundle, Tracer(tmp_path, Tracing(share=0.5), seed=1), *heads)
    spans = spans_of(tmp_path)
    theirs = [one for one in spans if one[0]["traceId"] == TRACE]
    assert len(theirs) == 2
    assert 8 < len(spans) - 2 < 32
    own = [one[0] for one in spans if one[0]["traceId"] != TRACE]
    assert all("parentSpanId" not in root and len(root["traceId"]) == 32 for root in own)
    assert len({root["traceId"] for root in own}) == len(own)


def test_nothing_is_traced_unless_it_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    assert open_tracer(tmp_path, Tracing()) is None
    assert open_tracer(None, Tracing()) is None
    with pytest.raises(ConfigError, match="--feedback"):
        open_tracer(None, Tracing(share=0.1))
    (answer,) = asked(bundle, None, {"traceparent": f"00-{TRACE}-{SPAN}-01"})
    assert answer.status_code == 200
    assert not list(tmp_path.iterdir())


def test_an_answer_without_stages_is_one_span(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, Tracing(share=1.0), clock=lambda: 5_000_000_000)

    async def scene() -> None:
        tracer.note([], Reply([], "g", ["popular: overload"], {"total": 2.0}))
        tracer.close()

    asyncio.run(scene())
    ((root,),) = spans_of(tmp_path)
    assert (root["startTimeUnixNano"], root["endTimeUnixNano"]) == ("4998000000", "5000000000")
    assert root["attributes"][-1] == {"key": "recray.degraded", "value": {"stringValue": "popular: overload"}}


@pytest.mark.parametrize("bad", [{"share": -0.1}, {"share": 2.0}, {"hours": 0.0}, {"bytes": 5}])
def test_a_bad_setting_is_refused_in_a_line(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as error:
        build(GraphArgs, {"bundle": "b", "trace": bad})
    assert "\n" not in str(error.value)
