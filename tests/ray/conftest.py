"""What the tests on a real cluster share: a small dataset in which the next item can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recray.data.dataset import Dataset
from recray.data.prepare import prepare


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
