"""Fixtures of all tests. One Ray cluster serves the whole session; unit tests never ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

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
