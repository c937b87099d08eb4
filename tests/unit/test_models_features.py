"""What rankers share: negatives of a position's own, propensities, item features, labels, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from recray.data.sequences import PAD, Histories
from recray.errors import ConfigError, InputError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.fields import Attention, Drop
from recray.models.rankers import before, inverse_propensities, losses_of, newest_first
from tests.models_data import SmallData, ring

torch.set_num_threads(1)

TINY: dict[str, Any] = {"dim": 8, "hidden": (16,), "max_len": 6, "dropout": 0.0, "negatives": 8}


def tiny(name: str = "dlrm", catalogue: Catalogue | None = None, **changes: Any) -> Any:
    return build_model(name, catalogue or Catalogue(23, {}), {**TINY, **changes})


def batches(model: Any, data: Any, **changes: Any) -> Iterator[Any]:
    share = {"batch_size": 8, "epoch": 1, "seed": 0, "rank": 0, "world": 1, **changes}
    yield from model.batches(data, **share)


def fit(model: Any, data: Any, epochs: int, batch_size: int = 32) -> Any:
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for epoch in range(epochs):
        for batch in batches(model, data, epoch=epoch, batch_size=batch_size):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    return model.eval()


# -- histories -------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(-1, 9), max_size=8), max_size=5), st.integers(1, 6))
def test_newest_first_is_the_history_backwards_without_the_unknown(rows: list[Any], longest: int) -> None:
    found = newest_first(Histories.of(rows), longest)
    for line, row in zip(found, rows, strict=True):
        want = [i for i in reversed(row) if i >= 0][:longest]
        assert line.tolist() == want + [PAD] * (found.shape[1] - len(want))


def test_before_stays_within_a_users_own() -> None:
    items = np.arange(10, dtype=np.int32)
    found = before(items, np.array([0, 4, 4]), np.array([2, 7, 4]), 4)
    assert found.tolist() == [[1, 0, PAD, PAD], [6, 5, 4, PAD], [PAD] * 4]


def test_training_sees_what_asking_sees() -> None:
    data = ring(30, columns=("day",))
    model = tiny("dlrm", Catalogue(23, data.context_sizes), unknown=0.0).eval()
    past, asked = data.train, 0
    for batch in batches(model, data):
        places = np.arange(len(past.items))
        for p in range(0, len(batch.own), 7):
            rows = [r for r in batch.history[p] if r >= 0][::-1]
            # somewhere in the log stands this item after these ones, on that day
            fits = (past.items == batch.own[p, 0]) & (data.context["day"] == batch.context[p, 0])
            assert any(past.items[max(0, i - len(rows)) : i].tolist() == rows for i in places[fits])
            candidates = np.concatenate([batch.own[p], batch.shared])[None]
            context = {"day": batch.context[p].astype(np.int32)}
            scores = model.score(Histories.of([rows]), candidates, context)
            positive, negatives = scores[:, 0], scores[:, 1:]
            one = losses_of("sampled", positive, negatives, torch.from_numpy(batch.log_q[p : p + 1]))
            assert torch.isfinite(one).all()
            asked += 1
    assert asked > 20


def test_the_loss_of_a_batch_is_that_of_its_examples_scores() -> None:
    data = ring(30, columns=("day",))
    model = tiny("dcn", Catalogue(23, data.context_sizes), unknown=0.0).eval()
    batch = next(batches(model, data))
    total = 0.0
    for p in range(len(batch.own)):
        rows = [r for r in batch.history[p] if r >= 0][::-1]
        candidates = np.concatenate([batch.own[p], batch.shared])[None]
        context = {"day": batch.context[p].astype(np.int32)}
        scores = model.score(Histories.of([rows]), candidates, context)[0].numpy()
        mine = scores - np.concatenate([[0.0], batch.log_q[p]])
        total += float(np.log(np.exp(mine).sum()) - scores[0])
    assert model.loss(batch).item() == pytest.approx(total / batch.positions, rel=1e-4)


# -- negatives of a position's own -----------------------------------------------------------------------


def mined(data: SmallData, width: int = 5, seed: int = 0) -> NDArray[np.int32]:
    """Random candidates for each interaction, none of its user's; some places have fewer, some none."""
    rng = np.random.default_rng(seed)
    made = np.zeros((len(data.train.items), width), np.int32)
    for u in range(len(data.train)):
        free = np.setdiff1d(np.arange(data.n_items), data.train[u])
        for at in range(data.train.offsets[u], data.train.offsets[u + 1]):
            some = rng.permutation(free)[: rng.integers(0, width + 1)]
            made[at, : len(some)] = some + 1
    return made


@pytest.mark.parametrize("name", ["dlrm", "neumf"])
def test_own_negatives_are_of_the_positions_candidates_and_no_target(name: str) -> None:
    data = ring(40)
    model = tiny(name, hard=3)
    model.mined = mined(data)
    drawn = set()
    for batch in batches(model, data):
        if name == "neumf":
            batch = batch[0]
            own, at, shared = batch.hard, batch.at[batch.at >= 0], batch.negatives
        else:
            own, at, shared = batch.own[:, 1:], None, batch.shared
        logs = batch.log_q[:, len(shared) :]
        assert own.shape[1] == 3
        assert (np.isinf(logs) == (own < 0)).all()
        if at is None:
            continue
        for p, place in enumerate(at):
            there = model.mined[place][model.mined[place] > 0] - 1
            assert set(own[p]) <= (set(there) or {PAD})
            drawn |= {(int(place), int(row)) for row in own[p]}
            if len(there):
                assert logs[p] == pytest.approx(np.full(3, np.log(3 / len(there))), rel=1e-5)
            shut = np.isin(shared, there) | (shared == data.train.items[place])
            assert (np.isinf(batch.log_q[p, : len(shared)]) == shut).all()
        model.loss((batch, np.zeros((*batch.at.shape, 0), np.int64))).backward()
    assert name == "dlrm" or len(drawn) > 100


@pytest.mark.parametrize("seed", [0, 1])
def test_strata_of_own_and_shared_negatives_make_the_whole_partition_function(seed: int) -> None:
    data = ring(8, seed=seed)
    model = tiny("neumf", hard=4, negatives=16, uniform_share=0.5)
    model.mined = mined(data, 8, seed)
    scores = np.random.default_rng(seed).normal(size=data.n_items)
    estimates: dict[int, list[float]] = {}
    for epoch in range(240):
        for batch, _ in batches(model, data, epoch=epoch):
            for p, place in enumerate(batch.at[batch.at >= 0]):
                rows = np.concatenate([batch.negatives, np.maximum(batch.hard[p], 0)])
                told = np.exp(scores[rows] - batch.log_q[p]).sum()
                estimates.setdefault(int(place), []).append(told)
    for place, found in estimates.items():
        whole = np.exp(scores).sum() - np.exp(scores[data.train.items[place]])
        spread = np.std(found) / math.sqrt(len(found))
        assert abs(np.mean(found) - whole) < 6 * spread


def test_own_negatives_are_the_same_at_every_world_size() -> None:
    data = ring(40)
    model = tiny("neumf", hard=3)
    model.mined = mined(data)

    def known(world: int) -> dict[int, list[int]]:
        return {
            int(at): batch.hard[p].tolist()
            for rank in range(world)
            for batch, _ in batches(model, data, rank=rank, world=world)
            for p, at in enumerate(batch.at[batch.at >= 0])
        }

    assert known(3) == known(1)


# -- losses and weights ----------------------------------------------------------------------------------


def test_losses_are_their_formulas() -> None:
    positive, negative = torch.tensor([0.5]), torch.tensor([[1.0, -2.0, 9.0]])
    log_q = torch.tensor([[0.3, -0.1, math.inf]])
    s = np.array([1.0 - 0.3, -2.0 + 0.1])
    want = {
        "sampled": np.log(np.exp(0.5) + np.exp(s).sum()) - 0.5,
        "bce": np.log1p(np.exp(-0.5)) + (np.log1p(np.exp(1.0)) + np.log1p(np.exp(-2.0))) / 3,
        "bpr": (np.log1p(np.exp(0.5)) + np.log1p(np.exp(-2.5))) / 3,
    }
    for kind, value in want.items():
        found = losses_of(kind, positive, negative, log_q)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(value, rel=1e-5)


def test_inverse_propensities_have_a_mean_of_one_and_a_least() -> None:
    counts = np.array([2, 4, 1, 3, 5])
    found = inverse_propensities(["", "0.5", "1", "0.001", "far"], counts)
    mean = (4 / 0.5 + 1 / 1 + 3 / 0.2) / 8
    np.testing.assert_allclose(found, [1, 2 / mean, 1 / mean, 5 / mean, 1], rtol=1e-6)
    with pytest.raises(InputError, match="number"):
        inverse_propensities(["", "top", "7"], np.array([0, 3, 1]))


@dataclass(frozen=True, eq=False)
class Biased(SmallData):
    context_values: Any = None


def test_propensity_weighs_and_is_no_input() -> None:
    data = ring(30, columns=("day", "seen"))
    values = {"seen": ["", "1", ".5", ".25", ".2"]}
    data = Biased(23, data.train, data.context_sizes, data.context, context_values=values)
    catalogue = Catalogue(23, data.context_sizes)
    model = tiny("dlrm", catalogue, propensity="seen")
    assert model.columns == ["day"]
    weights = np.concatenate([b.weights for b in batches(model, data)])
    assert len(np.unique(weights)) == 5
    assert weights.mean() == pytest.approx(1, abs=0.1)
    with pytest.raises(ConfigError, match="propensity"):
        tiny("dlrm", catalogue, propensity="seem")


# -- item features ---------------------------------------------------------------------------------------


def described(n: int = 24) -> SmallData:
    """The next item is any of the next kind: only the kind can be learned of items never seen."""
    rng = np.random.default_rng(0)
    rows = [[int(k % 4 + 4 * rng.integers(0, n // 8)) for k in range(s, s + 8)] for s in range(300)]
    table = pa.table(
        {
            "kind": pa.array(["abcd"[i % 4] for i in range(n)]),
            "tags": pa.array([["x", "y"][: 1 + i % 2] if i % 5 else None for i in range(n)]),
            "price": pa.array(np.linspace(1, 2, n)),
        }
    )
    return SmallData(n, Histories.of(rows), item_features=table)


@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_what_an_item_is_helps_where_nobody_has_had_it(name: str) -> None:
    data: Any = described()
    catalogue = Catalogue.of(data)
    assert (dict(catalogue.item_values), catalogue.item_numbers) == ({"kind": 5, "tags": 3, "tags#2": 3}, 1)
    model = tiny(name, catalogue)
    model.see(data)
    fit(model, data, 5)
    new = np.arange(12, 24)[None]  # never in a history
    for kind in range(4):
        scores_4 = model.score(Histories.of([[kind, kind + 4]]), new)[0].reshape(3, 4).mean(0)
        assert scores_4.argmax().item() == (kind + 1) % 4
    other = tiny(name, catalogue)
    other.load_state_dict(model.state_dict())  # what it saw travels
    torch.testing.assert_close(
        other.eval().score(Histories.of([[1]]), new), model.score(Histories.of([[1]]), new)
    )


def test_rows_of_values_are_those_of_the_features() -> None:
    data: Any = described()
    model = tiny("dlrm", Catalogue.of(data))
    model.see(data)
    rows = model.item_rows  # kind: rows 0..4, tags: 5..7 with 5 for unknown
    assert rows[:4, 0].tolist() == [1, 2, 3, 4]
    assert rows[0].tolist() == [1, 5, PAD]  # no tags: unknown, and no second
    assert rows[1].tolist() == [2, 6, 7]
    assert rows[2].tolist() == [3, 6, PAD]
    vectors, numbers = model._items(torch.tensor([1, PAD]))
    table = model.tables["value"].weight
    torch.testing.assert_close(vectors[0, 2], (table[6] + table[7]) / 2)
    assert not vectors[1].any()
    assert not numbers[1].any()


# -- labels ----------------------------------------------------------------------------------------------


class Place:
    place = "small"


@dataclass(frozen=True, eq=False)
class Labelled(SmallData):
    """Users shown any items; those of their own parity, and of the day's half, are taken."""

    artefact = Place

    @property
    def report(self) -> Any:
        return {"interactions": {"train": len(self.train.items)}}


def labelled(n: int = 400, length: int = 20) -> Labelled:
    rng = np.random.default_rng(0)
    items, day = (rng.integers(low, high, n * length).astype(np.int32) for low, high in ((0, 23), (1, 3)))
    parity = np.repeat(np.arange(n) % 2, length)
    taken = (items % 2 == parity) & ((items < 12) == (day == 1))
    offsets = np.arange(0, n * length + 1, length, dtype=np.int64)
    histories = Histories(items, offsets, taken.astype(np.float32))
    return Labelled(23, histories, {"day": 3}, {"day": day})


def test_labels_are_learned_from_contexts_and_what_was_taken_before() -> None:
    data: Any = labelled()
    model = tiny("dlrm", Catalogue(23, {"day": 3}), loss="labels", unknown=0.05)
    fit(model, data, 3, batch_size=128)
    everything = np.arange(23)[None]
    found = model.score(Histories.of([[1, 3, 5, 7]]), everything, {"day": np.int32([2])})[0]
    good = [i for i in range(23) if i % 2 and i >= 12]
    assert found[good].min() > np.delete(found.numpy(), good).max()


def test_a_labelled_epoch_has_every_row_once_and_only_what_was_taken_before_as_history() -> None:
    data: Any = labelled(30)
    model = tiny("dlrm", Catalogue(23, {"day": 3}), loss="labels", unknown=0.0)
    log = data.train
    seen = []
    for rank in range(2):
        for batch in batches(model, data, rank=rank, world=2, batch_size=50):
            assert batch.labels is not None
            for p in range(len(batch.own)):
                seen.append((batch.own[p, 0], batch.context[p, 0], batch.labels[p]))
                fits = np.flatnonzero(
                    (log.items == batch.own[p, 0])
                    & (data.context["day"] == batch.context[p, 0])
                    & (log.weights == batch.labels[p])
                )
                mine = [r for r in batch.history[p] if r >= 0]
                starts = log.offsets[np.searchsorted(log.offsets, fits, side="right") - 1]
                pasts = [
                    log.items[s:e][log.weights[s:e] > 0][::-1][: len(batch.history[p])].tolist()
                    for s, e in zip(starts, fits)
                ]
                assert mine in pasts
    want = sorted(zip(log.items, data.context["day"], log.weights))
    assert sorted((int(a), int(b), float(c)) for a, b, c in seen) == [
        (int(a), int(b), float(c)) for a, b, c in want
    ]


def test_a_log_without_negatives_is_told() -> None:
    data = labelled(5)
    model = tiny("dlrm", Catalogue(23, {"day": 3}), loss="labels", label_above=-1.0)
    with pytest.raises(InputError, match="min-weight"):
        next(batches(model, data))


# -- attention -------------------------------------------------------------------------------------------


def test_attention_is_its_formula() -> None:
    torch.manual_seed(0)
    made = Attention(8, 2, 5)
    with torch.no_grad():
        made.ages.normal_()
    q, x = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 0]])
    found = made(q, x, mask)
    assert not found[1].any()
    for c in range(3):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            logits = (made.key(x[0])[:, part] @ made.query(q[0, c])[part]) / 2 + made.ages[:4, head]
            weights = logits[:3].exp() / (1 + logits[:3].exp().sum())
            torch.testing.assert_close(found[0, c, part], (weights.unsqueeze(1) * x[0, :3, part]).sum(0))


def test_dropout_is_one_for_all_candidates_of_a_user() -> None:
    made = Drop(0.5)
    x = torch.ones(4, 6, 32)
    torch.manual_seed(0)
    found = made(x)
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(found[0], found[1])
    assert torch.equal(made.eval()(x), x)
