"""The exact index picks what sorting everything would, on the quick way and off it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from recray.compression.codec import encode_table
from recray.data.sequences import Histories
from recray.retrieval import exact
from recray.retrieval.exact import MOST_LANES
from recray.retrieval.index import build_index, ordered


def reached(scores: Tensor, want: int) -> None:
    """Of each line the chosen rows hold the `want` greatest scores, none twice and none that is barred."""
    found = exact._best(scores, want)
    for line, rows in zip(scores, found):
        kept = rows[rows >= 0]
        assert len(set(kept.tolist())) == len(kept)
        best = line.topk(min(want, int((line > -torch.inf).sum()))).values
        assert torch.equal(line[kept].topk(len(best)).values, best)
        assert not torch.isneginf(line[kept]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0])
@pytest.mark.parametrize(("n", "want"), [(128, 3), (6400, 20), (20480, 26), (20480, 600)])
def test_the_greatest_are_chosen(dtype: torch.dtype, offset: float, n: int, want: int) -> None:
    draw = torch.Generator().manual_seed(n + want)
    scores = torch.randn(4, n, generator=draw) + offset
    reached(scores.to(dtype), want)
    scores[torch.rand(4, n, generator=draw) < 0.95] = -torch.inf
    reached(scores.to(dtype), want)
    reached(scores.round().to(dtype), want)


def test_equal_scores_and_nothing_to_choose_from() -> None:
    scores = torch.ones(2, 64 * MOST_LANES)
    reached(scores, 10)
    assert exact._best(scores, 10).shape == (2, 10)
    barred = torch.full((2, 64 * MOST_LANES), -torch.inf)
    assert (exact._best(barred, 10) == -1).all()


def test_hardly_more_than_wanted_is_chosen() -> None:
    scores = torch.randn(8, 400 * MOST_LANES, generator=torch.Generator().manual_seed(0))
    count = (exact._best(scores, 116) >= 0).sum(dim=1)
    assert int(count.min()) >= 116
    assert int(count.max()) < 150


def test_recall_at_a_hundred_survives_the_rounding() -> None:
    draw = torch.Generator().manual_seed(1)
    vectors, queries = torch.randn(30_000, 64, generator=draw), torch.randn(40, 64, generator=draw)
    found = build_index("exact", vectors, {"precision": "bf16"}).search(queries, 100)[1]
    wanted = (queries.double() @ vectors.double().T).topk(100).indices.numpy()
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist())]
    assert np.mean(hits) >= 99.9


def test_threads_of_a_search_and_searches_in_threads_agree() -> None:
    draw = torch.Generator().manual_seed(2)
    vectors, queries = torch.randn(30_000, 16, generator=draw), torch.randn(600, 16, generator=draw)
    threads = torch.get_num_threads()
    one = build_index("exact", vectors).search(queries, 20)
    index = build_index("exact", vectors, {"threads": 3})
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: index.search(queries, 20), range(6)):
            assert np.array_equal(found[1], one[1])
            assert np.array_equal(found[0], one[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_batch_is_searched_in_parts_and_each_part_has_its_own_barred_rows(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(4)
    vectors, queries = torch.randn(900, 16, generator=draw), torch.randn(11, 16, generator=draw)
    barred = Histories.of([list(range(b, 900, 11)) for b in range(11)])
    index = build_index("exact", vectors, {"threads": threads})
    whole = index.search_without(queries, 20, barred)
    monkeypatch.setattr(exact, "CELLS_F32", 3 * 900)
    scores, rows = index.search_without(queries, 20, barred)
    assert np.array_equal(rows, whole[1])
    assert np.array_equal(scores, whole[0])
    assert not any(set(rows[b].tolist()) & set(barred[b].tolist()) for b in range(11))


def test_the_table_is_not_held_twice_where_it_is_plain() -> None:
    vectors = torch.randn(25_000, 8)
    table = encode_table("f32", vectors)
    index = build_index("exact", table, {"precision": "bf16"})
    assert isinstance(index, exact.Exact)
    assert index.full_ND is not None
    assert index.full_ND.data_ptr() == table.arrays["values"].data_ptr()
    coded = build_index("exact", encode_table("int8", vectors), {"precision": "bf16"})
    assert isinstance(coded, exact.Exact)
    assert coded.full_ND is None


def test_order_of_signed_zeros_infinities_and_equals() -> None:
    scores = np.array([[0.0, -0.0, -np.inf, np.inf, -1e-40, 1e-40, -3.0, 0.0]], np.float32)
    rows = np.array([[7, 2, 9, 4, 5, 6, 1, 2_000_000_000]])
    best, order = ordered(scores, rows, 9)
    assert order.tolist() == [[4, 6, 2, 7, 2_000_000_000, 5, 1, -1, -1]]
    assert best[0, 0] == np.inf
    assert np.isneginf(best[0, 7:]).all()


@pytest.mark.parametrize("n", [100, 1000, 30_000])
def test_of_equal_scores_the_lower_rows_are_found(n: int) -> None:
    index = build_index("exact", torch.zeros(n, 8), {"precision": "f32"})
    allowed = np.arange(n) % 2 == 1
    allowed[n // 10 :] = False
    assert index.search(torch.ones(1, 8), 4)[1].tolist() == [[0, 1, 2, 3]]
    assert index.search(torch.ones(1, 8), 4, allowed)[1].tolist() == [[1, 3, 5, 7]]


def test_ties_of_one_user_do_not_change_the_list_of_another() -> None:
    draw = torch.Generator().manual_seed(3)
    vectors = torch.randint(0, 2, (20_000, 4), generator=draw).float()
    index = build_index("exact", vectors, {"precision": "f32"})
    one, other = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    alone = index.search(one, 20)[1]
    assert index.search(torch.cat([one, other]), 20)[1][:1].tolist() == alone.tolist()
    wanted = torch.sort(vectors @ one[0], descending=True, stable=True).indices[:20]
    assert alone[0].tolist() == wanted.tolist()
