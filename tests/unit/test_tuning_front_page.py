"""The front for people: a table, a picture that stands alone, and a page that a real browser opens."""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from recray.tuning.front_page import limits, page, picture, table

MARK = "{http://www.w3.org/2000/svg}circle"


def row(number: int, quality: float, p99: float, size: float, **more: Any) -> dict[str, Any]:
    over = {name: 0.5 for name, is_over in (("p99", p99 > 0.01), ("size", size > 3e6)) if is_over}
    made = {
        "trial": f"{number:064d}", "number": number, "words": f"retriever_codec=c{number}", "error": None,
        "metrics": {"ndcg@10": quality, "p50": p99 / 2, "p99": p99, "bytes": size}, "dominated": False,
        "fits": not over, "over": over, "relative_loss": 0.01, "seconds": 1.0,
        "latency": {"low": p99 * 0.9, "high": p99 * 1.1, "stages": {"encode": {"p50": 1e-3, "p99": 2e-3}}},
        "cost": {
            "compute": 1e-4, "storage": 1e-5, "total": 1.1e-4,
            "delta": {"compute": -2e-5, "storage": -1e-5, "total": -3e-5},
        },
    }  # fmt: skip
    return {**made, **more}


@pytest.fixture
def front() -> dict[str, Any]:
    rows = [
        row(1, 0.31, 0.018, 8e6, words="as trained"),
        row(2, 0.30, 0.006, 2e6),
        row(3, 0.25, 0.007, 2.5e6, dominated=True),
        {
            **dict.fromkeys(row(4, 0, 1, 1)),
            **{"trial": "f" * 64, "number": 4, "words": "graph=<script>alert(1)</script>", "seconds": 0.1},
            "error": "no operator </script><b>",
        },
    ]
    return {
        "search": "compress", "metric": "ndcg@10", "chosen": rows[1]["trial"], "reference": rows[0]["trial"],
        "budget": {"p99": 0.01, "size": 3e6, "cost": 0.001, "rps": 50, "http": 0.0},
        "why": "c2: the best that fits", "bounded_by": ["size"], "trials": rows,
        "predictor": {"words": "p50 within 6%, p99 within 11%"}, "rejected_unmeasured": 0,
    }  # fmt: skip


def test_the_table_begins_with_what_was_chosen(front: dict[str, Any]) -> None:
    told = [re.split(r"\s{2,}", line) for line in table(front).splitlines()]
    assert told[0][:4] == ["trial", "plan", "ndcg@10", "p50"]
    assert [line[0] for line in told[1:]] == ["2", "1", "3", "4"] or [line[0] for line in told[1:]] == [
        "2", "3", "1", "4",
    ]  # fmt: skip
    assert told[1] == [
        "2",
        "retriever_codec=c2",
        "0.3000",
        "3 ms",
        "6 ms",
        "2 MB",
        "0.00011",
        "-3e-05",
        "chosen",
    ]
    assert told[-1][-1] == "failed"
    assert "over p99 and size" in table(front)


def test_the_picture_stands_alone_and_shows_budget_and_trials(front: dict[str, Any]) -> None:
    drawn = ElementTree.fromstring(picture(front))
    marks = list(drawn.iter(MARK))
    assert len(marks) == 6, "three trials in two panels; the failed one has no mark"
    kinds = {one.attrib["data-trial"]: one.attrib["class"] for one in marks}
    assert kinds[f"{1:064d}"] == "mark front over"
    assert kinds[f"{2:064d}"] == "mark chosen"
    assert kinds[f"{3:064d}"] == "mark dull"
    lines = [one for one in drawn.iter("{http://www.w3.org/2000/svg}line") if one.get("class") == "budget"]
    assert len(lines) == 2
    words = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"budget 10 ms", "budget 3 MB", "chosen", "uncompressed"} <= set(words)
    edge = float(lines[0].attrib["x1"])
    first = next(one for one in marks if one.attrib["data-trial"] == f"{2:064d}")
    slow = next(one for one in marks if one.attrib["data-trial"] == f"{1:064d}")
    assert float(first.attrib["cx"]) < edge < float(slow.attrib["cx"])
    assert float(first.attrib["cy"]) > float(slow.attrib["cy"]), "better is higher"


def test_the_page_asks_no_host_and_holds_words_as_text(front: dict[str, Any]) -> None:
    made = page(front)
    assert not re.search(r"""src=|href=|url\(|@import|fetch\(|https?:(?!//www\.w3\.org)""", made)
    assert "<script>alert" not in made
    assert "</script><b>" not in made
    data = re.search(r'<script type="application/json" id="trials">(.*?)</script>', made, re.DOTALL)
    assert data is not None
    told = json.loads(data[1])
    assert ["failed", "no operator </script><b>"] in told["f" * 64]
    assert ["1,000 cost", "0.00011 (0.0001 + 1e-05) = requests x compute + storage"] in told[f"{2:064d}"]
    assert ["change of it", "-3e-05 (-2e-05 + -1e-05)"] in told[f"{2:064d}"]
    assert limits(front) == "p99 10 ms and size 3 MB and cost 0.001 per 1,000 at 50 requests/s"


def test_nothing_chosen_and_nothing_that_ran_make_a_page_too(front: dict[str, Any]) -> None:
    none = {**copy.deepcopy(front), "chosen": None}
    none["budget"] = {"p99": 0.001, "size": 1e5, "cost": None, "rps": 0, "http": 0}
    for trials in (front["trials"], front["trials"][-1:]):
        made = page({**none, "trials": trials})
        assert "NaN" not in made
        assert "p99 1 ms and size 100 kB" in made
        ElementTree.fromstring(picture({**none, "trials": trials}))


class Browser:
    """A headless Chromium by the W3C WebDriver protocol, over nothing but urllib."""

    def __init__(self, port: int, binary: str, profile: Path) -> None:
        self.at = f"http://127.0.0.1:{port}"
        switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"binary": binary, "args": [*switches, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        at = f"{self.at}/session" + (f"/{self.session}" if hasattr(self, "session") else "") + path
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(at, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=200) as answer:
            return json.loads(answer.read())["value"]

    def run(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, css: str) -> None:
        """By an event, not by the pointer: that waits for frames, which a busy machine draws seldom."""
        self.run(
            f"document.querySelector({json.dumps(css)})"
            ".dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}))"
        )


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium and chromedriver on this machine")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as ran:
        try:
            _wait(port)
            opened = Browser(port, binary, tmp_path / "profile")
            yield opened
            opened.ask("DELETE", "")
        finally:
            ran.terminate()


def _wait(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5) as answer:
                if json.loads(answer.read())["value"]["ready"]:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError("chromedriver did not answer")


def test_a_real_browser_opens_the_page_and_explores_it(
    front: dict[str, Any], tmp_path: Path, browser: Browser
) -> None:
    (tmp_path / "front.html").write_text(page(front), encoding="utf-8")
    browser.ask("POST", "/url", {"url": (tmp_path / "front.html").as_uri()})
    assert browser.run("return document.title") == "recray compress"
    told = "return document.getElementById('told').textContent"
    assert "retriever_codec=c2" in browser.run(told), "the chosen trial is told of at first"
    browser.click(f'svg circle[data-trial="{3:064d}"]')
    assert "retriever_codec=c3" in browser.run(told)
    assert browser.run("return document.querySelectorAll('.picked').length") == 3, "two marks and a line"
    browser.click('tr[data-trial="' + "f" * 64 + '"]')
    assert "no operator </script><b>" in browser.run(told)
    marks = "[...document.querySelectorAll('circle.mark')]"
    seen = f"return {marks}.filter(one => one.getClientRects().length).length"
    assert browser.run(seen) == 6
    browser.click("#dull")
    assert browser.run(seen) == 4
    browser.click("#over")
    assert browser.run(seen) == 2
    wide = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.run(wide), "nothing runs out of the window"
    assert browser.run("return performance.getEntriesByType('resource').length") == 0, "no host is asked"
    errors = [
        entry for entry in browser.ask("POST", "/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"
    ]
    assert errors == []
