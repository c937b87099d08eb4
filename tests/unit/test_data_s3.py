"""Logs and datasets on S3, against a local server that speaks its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from recray.data.dataset import open_dataset
from recray.data.prepare import prepare
from recray.errors import InputError
from recray.storage import place


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A format string for URIs in a fresh bucket."""
    from moto.server import ThreadedMotoServer

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    made = place(f"s3://logs?{query}")
    made.fs.create_dir("logs")
    yield "s3://logs/%s?" + query.replace("%", "%%")
    server.stop()


def put(uri: str, text: str) -> None:
    at = place(uri)
    with at.fs.open_output_stream(at.path) as stream:
        stream.write(text.encode())


def test_from_s3_to_s3(bucket: str, tmp_path: Path) -> None:
    lines = [f"u{n % 7},i{n % 5},{n}" for n in range(60)]
    header = "user,item,time"
    put(bucket % "raw/a.csv", "\n".join([header, *lines[:30]]))
    put(bucket % "raw/b.csv", "\n".join([header, *lines[30:], ",missing,1"]))
    put(bucket % "items.csv", "item,title\ni0,Zero\n")
    there = prepare(bucket % "raw", items=bucket % "items.csv", out=bucket % "sets/one")
    (tmp_path / "all.csv").write_text("\n".join([header, *lines]))
    here = prepare(tmp_path / "all.csv", out=tmp_path / "o")
    opened = open_dataset(bucket % "sets/one")
    assert opened.artefact.hash == there.artefact.hash
    for split in ("train", "valid", "test"):
        for part in (None, (1, 3)):
            np.testing.assert_array_equal(
                opened.interactions(split, part).item_rows, here.interactions(split, part).item_rows
            )
    assert opened.item_features.to_pylist()[0] == {"title": "Zero"}
    assert opened.report["dropped"]["missing user"]["line"] == 32
    assert (
        prepare(bucket % "raw", items=bucket % "items.csv", out=bucket % "sets/one").artefact.hash
        == there.artefact.hash
    )
    with pytest.raises(InputError, match="is not there"):
        prepare(bucket % "nothing.csv", out=tmp_path / "x")
