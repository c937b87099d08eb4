"""HTTP's share of a budget: measured once by asking the same users with and without it, then kept."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import recray
from recray.errors import RecrayError
from recray.tuning import compress
from tests.serving_bundles import checkpoint, small_dataset

DELAY = 0.03


@contextmanager
def slow(bundle: str, *, status: int = 200, **given: Any) -> Iterator[str]:
    """Stands in for Ray Serve: answers anything after DELAY."""

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(DELAY)
            body = json.dumps({"items": [{"item": "i1"}] * 10}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_share_is_measured_once_and_counted_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_dataset(tmp_path)
    model = checkpoint(tmp_path / "model", data, "sasrec", dim=8, blocks=1, max_len=10)
    served: list[str] = []
    shares: list[float] = []

    @contextmanager
    def serving(bundle: str, **given: Any) -> Iterator[str]:
        served.append(given["profile"])
        with slow(bundle, **given) as url:
            yield url

    monkeypatch.setattr("recray.serving.on_ray.serving", serving)
    monkeypatch.setattr("recray.composing.HTTP_USERS", 12)
    monkeypatch.setattr(
        compress, "search_compress", lambda *_, **named: shares.append(named["http_overhead_s"])
    )
    given = {"data": data, "p99": "1s", "size": "1MB", "out": tmp_path / "search"}
    for http_ in ("fast", "fast", "5ms", None):
        recray.compress(model, http=http_, **given)  # type: ignore[arg-type]
    assert served == ["fast"], "a search that goes on measures nothing again"
    assert shares[0] == shares[1]
    assert shares[0] > 0.7 * DELAY
    assert shares[2:] == [0.005, 0.0]
    monkeypatch.setattr("recray.serving.on_ray.serving", lambda *_, **named: slow("", status=503))
    with pytest.raises(RecrayError, match=r"HTTP.s share cannot be measured .*503"):
        recray.compress(model, http="lite", **given)  # type: ignore[arg-type]
