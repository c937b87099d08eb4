"""Product quantization: planted codes come back, decoded rows score right, wanted rows are nearer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recray.compression.codec import CodedTable, encode_table
from recray.compression.pq import LEAST, MOST, STEPS


def planted(n: int = 900, parts: int = 6, wide: int = 4, kinds: int = 8) -> Tensor:
    """Rows put together of a few well separated vectors a part."""
    draw = torch.Generator().manual_seed(5)
    book = torch.randn(parts, kinds, wide, generator=draw)
    code = torch.randint(0, kinds, (n, parts), generator=draw)
    return torch.cat([book[m, code[:, m]] for m in range(parts)], dim=1)


def lost(made: CodedTable, table: Tensor, rows: Tensor | slice = slice(None)) -> float:
    """Squared error as a share of the squares."""
    return float(((made.dense() - table)[rows] ** 2).sum() / (table[rows] ** 2).sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_made_of_few_parts_come_back(bits: int) -> None:
    table = planted()
    made = encode_table(f"pq:width=4,bits={bits}", table)
    assert lost(made, table) < 2e-4
    assert made.nbytes == 900 * (6 * bits // 8 + 1) + 6 * 2**bits * 4 + 24


def test_narrower_parts_are_nearer_and_wider_ones_smaller() -> None:
    table = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    made = [encode_table(f"pq:width={width}", table) for width in (2, 4, 8)]
    errors, sizes = [lost(m, table) for m in made], [m.nbytes for m in made]
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0] < 0.02


def test_a_row_scores_itself_as_before() -> None:
    table = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
    made = encode_table("pq:width=4", table)
    own, before = (made.dense() * table).sum(dim=1), (table * table).sum(dim=1)
    plain = own / (LEAST + made.arrays["stretch"].float() * ((MOST - LEAST) / STEPS))
    assert float((plain / before).mean()) < 0.95, "means are too short"
    assert float((own / before - 1).abs().max()) < 5e-3


def test_rows_that_are_wanted_more_are_coded_better() -> None:
    table = torch.randn(3000, 16, generator=torch.Generator().manual_seed(2))
    wanted = torch.zeros(3000)
    wanted[:150] = 400.0
    plain, weighted = (encode_table("pq", table, w) for w in (None, wanted))
    assert lost(weighted, table, slice(150)) < 0.9 * lost(plain, table, slice(150))


def test_magnitude_does_not_matter() -> None:
    table = torch.randn(500, 12, generator=torch.Generator().manual_seed(3))
    usual = lost(encode_table("pq:width=3", table), table)
    for scale in (1e-20, 1e15):
        assert lost(encode_table("pq:width=3", (table * scale)).double(), table.double() * scale) == (
            pytest.approx(usual, rel=0.05)
        )
