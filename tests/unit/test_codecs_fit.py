"""Codes chosen for those who ask: scores of users come nearer, bytes and files stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from recray.compression import askers as askers_module
from recray.compression.askers import TOOK, Askers, best_length, wrong
from recray.compression.codec import codec_named, encode_table
from recray.compression.pq import STEPS
from recray.errors import ConfigError

FITTED = [
    "pq:width=4,bits=4,fit=2",
    "pq:width=5,fit=1",
    "int4:fit=1",
    "low-rank:share=1,values=int4:fit=1",
    "tiers:head=int4:fit=1,head_share=0.2,middle=pq:width=4+bits=4+fit=1,middle_share=0.8",
]
fitted = pytest.mark.parametrize("name", FITTED)


def world(n: int = 300, dim: int = 24, users: int = 200) -> tuple[Tensor, Askers]:
    """Items, and users who lie in a few directions and took the items that they score best."""
    draw = torch.Generator().manual_seed(3)
    items_ND = torch.randn(n, dim, generator=draw)
    users_UD = torch.randn(users, 6, generator=draw) @ torch.randn(6, dim, generator=draw)
    took = (users_UD @ items_ND.T).topk(8, dim=1).indices
    return items_ND, Askers.of(users_UD, np.arange(users + 1) * 8, took.reshape(-1).numpy(), n)


def plain(name: str) -> str:
    return name.replace("fit=2", "fit=0").replace("fit=1", "fit=0")


@fitted
def test_scores_of_those_who_ask_come_nearer_at_the_same_bytes(name: str) -> None:
    table, askers = world()
    first, second = (encode_table(text, table, None, askers) for text in (plain(name), name))
    exact = askers.vectors @ table.T
    off = [float((askers.vectors @ made.dense().T - exact).square().mean()) for made in (first, second)]
    assert off[1] < 0.95 * off[0]
    assert second.nbytes == first.nbytes == codec_named(name).bytes_of(*table.shape)


@fitted
def test_no_row_is_worse_for_those_who_ask(name: str) -> None:
    table, askers = world()
    metric = askers.metric(0, len(table))
    off = [
        wrong(encode_table(text, table, None, askers).dense() - table, metric) for text in (plain(name), name)
    ]
    assert bool((off[1] <= off[0] * (1 + 1e-4) + 1e-6).all())


@fitted
def test_nobody_who_asks_changes_nothing(name: str) -> None:
    table, _ = world()
    one, two = encode_table(name, table), encode_table(plain(name), table)
    assert torch.equal(one.dense(), two.dense())


def test_int4_values_go_no_farther_than_the_next_level() -> None:
    table, askers = world()
    error = (encode_table("int4:fit=2", table, None, askers).dense() - table).abs()
    assert bool((error <= codec_named("int4:fit=2").error_bound(table)).all())


def test_the_metric_is_the_squared_difference_of_scores() -> None:
    _, askers = world(n=20)
    error = torch.randn(20, 24, generator=torch.Generator().manual_seed(1))
    found = wrong(error, askers.metric(0, 20))
    for item in range(20):
        took = askers.users[askers.ends[item] : askers.ends[item + 1]]
        off = (askers.vectors @ error[item]).square()
        wanted = off[torch.from_numpy(took)].sum() + 0.005 * off.sum()
        assert float(found[item]) == pytest.approx(float(wanted), rel=1e-3)


def test_many_who_took_an_item_are_sampled_and_count_for_all() -> None:
    users = torch.randn(3 * TOOK, 4, generator=torch.Generator().manual_seed(2))
    askers = Askers.of(users, np.arange(len(users) + 1), np.zeros(len(users), np.int64), 2)
    metric = askers.metric(0, 2)
    torch.testing.assert_close(metric[0] - metric[1], users.T @ users, rtol=0.1, atol=0.05 * len(users))


def test_a_part_of_the_items_has_the_same_metric() -> None:
    _, askers = world(n=30)
    rows = torch.tensor([3, 7, 29])
    torch.testing.assert_close(askers.take(rows).metric(0, 3), askers.metric(0, 30)[rows])


def test_what_a_user_would_be_shown_counts_like_what_she_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(askers_module, "SHOWN", 2)
    monkeypatch.setattr(askers_module, "CELLS", 10)  # two users at a time
    items_ND = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
    users_UD = torch.tensor([[1.0], [-1.0], [1.0]])
    ends, took = np.array([0, 1, 1, 5]), np.array([1, 0, 1, 2, 3])
    found = Askers.of(users_UD, ends, took, 5, items_ND)
    by_item = [sorted(found.users[found.ends[i] : found.ends[i + 1]].tolist()) for i in range(5)]
    assert by_item == [[0, 2], [0, 2], [0, 2], [1, 2], [1, 2]]
    assert len(Askers.of(users_UD[:0], ends[:1], took[:0], 5, items_ND).users) == 0


def test_fitted_rows_are_as_long_along_themselves_as_before() -> None:
    table, askers = world()
    made = encode_table("pq:width=4,fit=2", table, None, askers)
    free = made.arrays["stretch"] < STEPS + 1  # no longer than any before
    along = (made.dense() * table).sum(1) / table.square().sum(1)
    assert int(free.sum()) > 280
    torch.testing.assert_close(along[free], torch.ones(int(free.sum())), rtol=0.02, atol=0.0)


def test_the_best_length_is_least_wrong() -> None:
    table, askers = world(n=10)
    metric, held = askers.metric(0, 10), table + 0.3 * torch.randn(table.shape)
    best = best_length(table, metric, held)
    off = [wrong(held * (best * s).unsqueeze(1) - table, metric) for s in (1.0, 0.98, 1.02)]
    assert bool((off[0] <= off[1]).all())
    assert bool((off[0] <= off[2]).all())


def test_askers_of_another_table_are_refused() -> None:
    table, askers = world()
    with pytest.raises(ValueError, match="are asked for"):
        encode_table("pq:fit=1", table[:7], None, askers)
    with pytest.raises(ConfigError, match="0 or more"):
        codec_named("int4:fit=-1")
