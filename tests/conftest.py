"""Fixtures of all tests. One Ray cluster serves the whole session; unit tests never ask for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from recray.data.dataset import Dataset
from recray.data.prepare import prepare

# background jobs of a shell ignore it, and their children would
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("recray", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("recray")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that ask for it are marked `data`."""
    folder = Path(os.environ.get("RECRAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set RECRAY_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The session's one Ray cluster on this machine; yields its address."""
    from recray import connect

    with connect.session(num_cpus=4) as address:
        yield address


@pytest.fixture(scope="session")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """400 users who each walk a part of a ring of 80 items."""
    made, folder = np.random.default_rng(0), tmp_path_factory.mktemp("ring")
    rows = ["user,item,time"]
    for user in range(400):
        start, length = int(made.integers(80)), int(made.integers(5, 15))
        rows += [f"u{user},i{(start + step) % 80},{step}" for step in range(length)]
    log: Path = folder / "log.csv"
    log.write_text("\n".join(rows))
    return prepare([str(log)], out=str(folder / "dataset"))
