"""Layout and routing: every row has one place, the shares are even, and a sum is of the right rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recray.training.layout import LARGEST, Layout
from recray.training.routing import distinct


@given(st.integers(1, 3000), st.integers(1, 9))
def test_rows_and_positions_are_one_to_one_and_every_position_has_one_owner(rows: int, ranks: int) -> None:
    layout = Layout(rows, ranks)
    everything = torch.arange(rows)
    positions = layout.positions(everything)
    assert torch.equal(positions.sort().values, everything)
    assert torch.equal(layout.rows(positions), everything)
    bounds = [layout.bounds(rank) for rank in range(ranks)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    owners = layout.owners(everything)
    assert all((owners[a:b] == rank).all() for rank, (a, b) in enumerate(bounds))


@given(st.sampled_from([1000, 65_536, 1_000_000, 50_000_000, LARGEST]), st.integers(2, 64))
def test_the_popular_first_rows_are_shared_evenly(rows: int, ranks: int) -> None:
    layout = Layout(rows, ranks)
    first = torch.arange(min(rows, 50 * ranks))
    held = torch.bincount(layout.owners(layout.positions(first)), minlength=ranks)
    mean = len(first) / ranks
    assert held.max() <= 1.25 * mean + 3, held.tolist()


def test_sizes_that_cannot_be_laid_out() -> None:
    for rows, ranks in ((0, 1), (LARGEST + 1, 1), (5, 0)):
        with pytest.raises(ValueError, match="over"):
            Layout(rows, ranks)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_distinct(positions: list[int]) -> None:
    asked = torch.tensor(positions, dtype=torch.int64)
    found = distinct(asked)
    assert found.values.tolist() == sorted(set(positions))
    assert torch.equal(found.values[found.inverse], asked)
    grads = torch.arange(2.0 * len(positions)).view(-1, 2)
    want = torch.zeros(len(found.values), 2).index_add_(0, found.inverse, grads)
    assert torch.equal(found.summed(grads), want)
