"""Product quantization: planted codes come back, decoded rows score right, wanted rows are nearer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recray.compression.codec import CodedTable, encode_table
from recray.compression.pq import RANGE, _longer


def planted(n: int = 900, parts: int = 6, wide: int = 4, kinds: int = 8) -> Tensor:
    """Rows of several lengths, put together of a few well separated directions a part."""
    draw = torch.Generator().manual_seed(5)
    book = nn.functional.normalize(torch.randn(parts, kinds, wide, generator=draw), dim=2)
    code = torch.randint(0, kinds, (n, parts), generator=draw)
    rows = torch.cat([book[m, code[:, m]] for m in range(parts)], dim=1)
    return rows * (0.5 + 3 * torch.rand(n, 1, generator=draw))


def lost(made: CodedTable, table: Tensor, rows: Tensor | slice = slice(None)) -> float:
    """Squared error as a share of the squares."""
    return float(((made.dense() - table)[rows] ** 2).sum() / (table[rows] ** 2).sum())


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_made_of_few_parts_come_back(bits: int) -> None:
    table = planted()
    made = encode_table(f"pq:width=4,bits={bits}", table)
    assert lost(made, table) < 2e-4
    assert made.nbytes == 900 * (6 * bits // 8 + 1) + 6 * 2**bits * 4 + 24 + 8


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
    plain = own / _longer(made.arrays["stretch"], made.arrays["ends"]) * table.norm(dim=1)
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


def test_short_rows_are_coded_as_well_as_long_ones() -> None:
    table = torch.randn(2000, 16, generator=torch.Generator().manual_seed(7))
    table[::2] *= 30
    made = encode_table("pq:width=4", table)
    off = [lost(made, table, slice(start, None, 2)) for start in (0, 1)]
    assert off[1] < 4 * off[0] < 0.3


def test_rows_far_shorter_than_all_others_become_zero() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(8))
    table[3], table[4] = table[3] / (100 * RANGE), 0.0
    found = encode_table("pq:width=4", table).dense()
    assert not found[[3, 4]].any()
    assert bool(found[[2, 5]].any(dim=1).all())
