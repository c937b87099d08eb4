"""The demo's page and table, and how the demo judges itself; no Ray, no browser."""

from __future__ import annotations

import copy
import http.server
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from recray import demonstration, report_page
from recray.errors import InputError, RecrayError


def trial(number: int, quality: float, p99_ms: float, size: int, **more: Any) -> dict[str, Any]:
    plain = {"words": f"plan {number}", "error": None, "dominated": False, "fits": True, "chosen": False}
    made = {"number": number, "quality": quality, "p99_ms": p99_ms, "bytes": size, "reference": False}
    return {**plain, **made, **more}


@pytest.fixture
def report() -> dict[str, Any]:
    asked = {
        "requests": 600,
        "failures": 0,
        "first_failures": [],
        "p50_ms": 12.3,
        "p99_ms": 45.6,
        "clients": 2,
    }
    gain = {"mean": 0.2, "low": 0.19, "high": 0.21, "n": 400}
    made: dict[str, Any] = {
        "date": "2026-01-05 10:00 UTC",
        "command": "recray demo",
        "world": {"users": 400, "items": 150, "interactions": 9876},
        "quality": {
            "users": 400,
            "popularity": 0.01,
            "item-knn": 0.1,
            "uncompressed": 0.3012,
            "served": 0.3,
            "relative_loss": 0.004,
            "differences": {name: dict(gain) for name in ("popularity", "item-knn", "uncompressed")},
        },
        "bytes": {"before": 2_000_000, "after": 600_000, "ratio": 0.3},
        "http": {"before": dict(asked), "after": dict(asked), "same_as_in_process": True},
        "search": {
            "budget": {"p99": 0.010, "size": 1_000_000},
            "why": "int8: the best that fits",
            "trials": [
                trial(1, 0.31, 8.0, 2_000_000, reference=True, fits=False),
                trial(2, 0.30, 5.0, 600_000, chosen=True),
                trial(3, 0.25, 6.0, 700_000, dominated=True, words="<script>alert(1)</script>"),
                {"number": 4, "words": "int4", "error": "did not build", "dominated": False}
                | {"chosen": False, "reference": False},
            ],
        },
        "seconds": {"prepare": 2.0, "train": 40.0},
        "versions": {"python": "3.11"},
        "hardware": {"cpu": "a processor", "cores": 2, "memory_gib": 24.0},
    }
    made["checks"] = demonstration._checks(made)
    return made


class Links(HTMLParser):
    """What a page would fetch, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_stands_alone_and_tells_every_number(report: dict[str, Any]) -> None:
    page = report_page.page(report)
    seen = Links()
    seen.feed(page)
    assert seen.fetched == []
    assert "url(" not in page
    assert "script" not in seen.tags  # a plan's words are text, whatever they hold
    assert "&lt;script&gt;" in page
    for told in (
        "0.3000",
        "0.3012",
        "0.0100",
        "+0.2000 [+0.1900, +0.2100]",
        "2 MB",
        "600 kB",
        "45.6 ms",
        "9,876",
    ):
        assert told in page
    assert page.count('<li class="yes">') == len(report["checks"])
    assert "did not build" in page


def test_the_picture_is_xml_and_shows_each_trial_its_way(report: dict[str, Any]) -> None:
    drawn = ElementTree.fromstring(report_page.picture(report["search"]))
    bubbles = {
        b.find("title").text.split(":")[0]: b for b in drawn.iter("circle") if b.find("title") is not None
    }  # type: ignore[union-attr]
    assert set(bubbles) == {"plan 1", "plan 2", "<script>alert(1)</script>"}  # a failed trial has no place
    assert [name for name, b in bubbles.items() if b.get("fill") == "var(--best)"] == ["plan 2"]
    assert bubbles["<script>alert(1)</script>"].get("fill") == "var(--dull)"
    assert [name for name, b in bubbles.items() if b.get("stroke-dasharray")] == ["plan 1"]
    one, two = bubbles["plan 1"], bubbles["plan 2"]
    assert float(one.get("cx", 0)) > float(two.get("cx", 0))  # slower lies further right
    assert float(one.get("cy", 0)) < float(two.get("cy", 0))  # better lies higher
    area = (float(one.get("r", 0)) / float(two.get("r", 1))) ** 2
    assert area == pytest.approx(2_000_000 / 600_000, rel=0.05)
    words = [text.text for text in drawn.iter("text")]
    assert "p99 budget 10 ms" in words
    assert {"chosen", "uncompressed"} <= set(words)


def test_a_budget_far_away_is_told_instead_of_drawn(report: dict[str, Any]) -> None:
    report["search"]["budget"]["p99"] = 0.5
    assert "p99 budget 500 ms lies further right" in report_page.picture(report["search"])


def test_one_trial_or_equal_trials_make_a_picture_too(report: dict[str, Any]) -> None:
    for trials in ([trial(1, 0.3, 5.0, 10)], [trial(1, 0.3, 5.0, 10), trial(2, 0.3, 5.0, 10)], []):
        drawn = report_page.picture({**report["search"], "trials": trials})
        assert len(list(ElementTree.fromstring(drawn).iter("title"))) == len(trials)
        assert "nan" not in drawn


def test_the_table_has_a_line_for_each(report: dict[str, Any]) -> None:
    lines = [line for line in demonstration.table(report).splitlines() if line]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[1:5]] == [
        "popularity", "item neighbours", "uncompressed", "compressed, as served",
    ]  # fmt: skip
    assert "1,200 requests over HTTP, 0 failed" in lines[-1]


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("quality", "differences", "item-knn", "low"), -0.001, "beats item-knn"),
        (("bytes", "ratio"), 0.51, "at most half"),
        (("quality", "relative_loss"), 0.021, "costs at most"),
        (("http", "after", "failures"), 1, "1 failed"),
        (("http", "before", "requests"), 499, "at least 500"),
        (("http", "same_as_in_process"), False, "equals the one in process"),
    ],
)
def test_each_claim_can_fail(report: dict[str, Any], where: tuple[str, ...], value: Any, words: str) -> None:
    assert all(check["holds"] for check in demonstration._checks(report))
    broken = copy.deepcopy(report)
    part = broken
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    failed = [check["what"] for check in demonstration._checks(broken) if not check["holds"]]
    assert len(failed) == 1
    assert words in failed[0]


def test_a_broken_claim_is_an_error_after_the_report_was_written(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report["checks"][0]["holds"] = False
    monkeypatch.setattr(demonstration._Path, "walk", lambda self: report)
    with pytest.raises(RecrayError, match="does not hold what it claims: not so: the served model beats pop"):
        demonstration.run(None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["world"]["users"] == 400
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for out in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(InputError, match="choose another --out"):
            demonstration.run(None, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt"]


@pytest.fixture
def server() -> Iterator[str]:
    """Answers ten items; fails for user 'bad', hangs up on 'gone', and is short for 'short'."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            user = json.loads(self.rfile.read(int(self.headers["content-length"])))["user"]
            if user == "gone":
                self.close_connection = True
                return
            count = 3 if user == "short" else 10
            body = json.dumps({"items": [{"item": str(i)} for i in range(count)]}).encode()
            self.send_response(500 if user == "bad" else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()
    thread.join()


def test_every_request_is_timed_or_told(server: str) -> None:
    users = ["u1", "bad", "u2", "gone", "u3", "short"] * 3
    seconds, errors = demonstration.ask(server, users, clients=2, least=10)
    assert len(seconds) == 12  # u1 u2 u3 short
    assert len(errors) == 9
    assert {error.split(":")[0] for error in errors} == {"bad", "gone", "short"}
    told = demonstration._told(seconds, errors)
    assert (told["requests"], told["failures"]) == (12, 9)
    assert 0 < told["p50_ms"] <= told["p99_ms"]
    assert demonstration._told([], errors)["p99_ms"] is None
