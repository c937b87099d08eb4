"""The long faults share the dataset of the cluster tests."""

from __future__ import annotations

from tests.ray.conftest import ring

__all__ = ["ring"]
