"""Bits by use, and fewer dimensions."""

from __future__ import annotations

import pytest
import torch

from recray.compression.codec import encode_table
from recray.errors import InputError

SPLIT = "tiers:head=f32,head_share=0.1,middle=int8,middle_share=0.25,tail=int4"


def test_each_tier_is_as_its_codec_stores_it() -> None:
    draw = torch.Generator().manual_seed(0)
    table, wanted = torch.randn(200, 40, generator=draw), torch.rand(200, generator=draw)
    found = encode_table(SPLIT, table, wanted).dense()
    order = wanted.argsort(descending=True)
    assert torch.equal(found[order[:20]], table[order[:20]])
    for codec, rows in (("int8", order[20:70]), ("int4", order[70:])):
        rows = rows.sort().values
        assert torch.equal(found[rows], encode_table(codec, table[rows]).dense())


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.0), (0.01, 0.01)])
def test_empty_tiers_are_no_trouble(shares: tuple[float, float]) -> None:
    text = f"tiers:head=f32,head_share={shares[0]},middle=f32,middle_share={shares[1]},tail=f32"
    table = torch.randn(30, 5)
    made = encode_table(text, table)
    assert torch.equal(made.dense(), table)
    rows = torch.tensor([[29, 0], [-1, 7]])
    assert torch.equal(made(rows)[0], table[rows[0]])
    assert torch.equal(made(torch.tensor([4])), table[[4]])


def test_where_nobody_knows_what_is_wanted_the_longest_rows_come_first() -> None:
    table = torch.randn(100, 8)
    table[::10] *= 10
    found = encode_table(SPLIT, table).dense()
    assert torch.equal(found[::10], table[::10])


def test_a_table_of_low_rank_comes_back() -> None:
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(300, 6, generator=draw) @ torch.randn(6, 30, generator=draw)
    made = encode_table("low-rank:share=0.2,values=f32", table)
    assert made.nbytes == 300 * 6 * 4 + 2 * 30 * 6
    assert float((made.dense() - table).abs().max()) < 2e-2
    assert float((encode_table("low-rank:share=0.1", table).dense() - table).abs().max()) > 0.5


def test_the_axes_follow_what_is_wanted() -> None:
    table = torch.zeros(100, 4)
    table[:50, 0], table[50:, 1] = 1.0, 2.0
    wanted = torch.zeros(100)
    wanted[:50] = 100.0
    found = encode_table("low-rank:share=0.25,values=f32", table, wanted).dense()
    torch.testing.assert_close(found[:50], table[:50])
    assert not found[50:].any()


def test_rows_too_long_for_half_precision_along_an_axis_are_refused() -> None:
    table = torch.full((3, 64), 2e4)  # each number is in reach of f16, the length of a row is not
    assert encode_table("f16", table).dense().isfinite().all()
    with pytest.raises(InputError, match="along the axes is too large for f16"):
        encode_table("low-rank:values=f16", table)
