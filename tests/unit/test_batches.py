"""Windows and steps: every interaction trained on once an epoch, ranks in step, seeds that decide all."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data.batches import (
    Negatives,
    SequenceBatch,
    Windows,
    chances,
    owned,
    sequence_batches,
    steps,
    windows,
)
from recray.data.sequences import PAD, Histories

users = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=12)


def epoch(histories: Histories, **changes: object) -> list[SequenceBatch]:
    settings = {"max_len": 4, "batch_size": 3, "epoch": 1, "seed": 5, **changes}
    return list(sequence_batches(histories, 10, **settings))  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(rows=users, max_len=st.integers(1, 6))
def test_windows_make_every_interaction_but_the_first_a_target_once(
    rows: list[list[int]], max_len: int
) -> None:
    histories = Histories.of(rows)
    cut = windows(histories, max_len)
    starts, lengths = cut.spans(np.arange(len(cut)))
    found = Counter(int(t) for s, n in zip(starts, lengths) for t in range(s + 1, s + n))
    firsts = set(histories.offsets[:-1].tolist())
    assert found == Counter(t for t in range(len(histories.items)) if t not in firsts)
    assert all(2 <= n <= max_len + 1 for n in lengths)
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    assert all(len(set(owner[s : s + n])) == 1 for s, n in zip(starts, lengths))


@settings(max_examples=60, deadline=None)
@given(rows=users, world=st.integers(1, 4), batch_size=st.integers(1, 5))
def test_ranks_have_equally_many_batches_and_together_the_epoch(
    rows: list[list[int]], world: int, batch_size: int
) -> None:
    histories = Histories.of(rows)
    shares = [epoch(histories, rank=r, world=world, batch_size=batch_size) for r in range(world)]
    alone = epoch(histories, batch_size=batch_size)
    assert {len(share) for share in shares} == {len(alone)}
    for number, whole in enumerate(alone):
        together = np.concatenate([share[number].at[share[number].at >= 0] for share in shares])
        assert set(together) == set(whole.at[whole.at >= 0])
        if len(whole.lengths) >= world:
            assert len(together) == (whole.at >= 0).sum()
            assert sum(share[number].positions for share in shares) == pytest.approx(whole.positions)
    seen = np.concatenate([[-1], *[batch.at.ravel() for batch in alone]])
    targets = sum(max(len(row) - 1, 0) for row in rows)
    assert len(set(seen[seen >= 0])) == (seen >= 0).sum() == targets


def whole_steps(histories: Histories, world: int, **changes: object) -> list[tuple[set[int], object, float]]:
    """Of each step, over all ranks: where its targets lie, its negatives, the sum of its positions."""
    shares = [epoch(histories, rank=r, world=world, **changes) for r in range(world)]
    for batches in zip(*shares, strict=True):
        for batch in batches:
            np.testing.assert_array_equal(batch.negatives, batches[0].negatives)
            np.testing.assert_array_equal(batch.log_q, batches[0].log_q)
    return [
        (
            {int(at) for batch in batches for at in batch.at.ravel() if at >= 0},
            batches[0].negatives.tolist(),
            sum(batch.positions for batch in batches),
        )
        for batches in zip(*shares, strict=True)
    ]


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=4, max_size=12),
    world=st.integers(2, 4),
    sampling=st.sampled_from([None, "uniform", "popularity", "in-batch"]),
)
def test_a_step_is_the_same_windows_and_negatives_at_every_world_size(
    rows: list[list[int]], world: int, sampling: Any
) -> None:
    how = None if sampling is None else Negatives(5, sampling)
    settings = {"batch_size": 2 * world, "negatives": how}  # no step has fewer windows than there are ranks
    histories = Histories.of(rows)
    assert whole_steps(histories, world, **settings) == whole_steps(histories, 1, **settings)


@settings(max_examples=40)
@given(rows=users, skip=st.integers(0, 60), batch_size=st.integers(1, 3))
def test_skipping_is_dropping(rows: list[list[int]], skip: int, batch_size: int) -> None:
    how = Negatives(4, "popularity")
    made = {"max_len": 1, "negatives": how, "batch_size": batch_size, "rank": 1, "world": 2}
    histories = Histories.of(rows)
    assert same(epoch(histories, skip=skip, **made), epoch(histories, **made)[skip:])


def test_skipped_steps_cost_nothing() -> None:
    class Counted(Windows):
        def spans(self, which: Any) -> Any:
            asked.append(len(which))
            return super().spans(which)

    asked: list[int] = []
    cut = windows(Histories.of([[1, 2]] * 1000), 4)
    made = list(steps(Counted(cut.offsets, cut.first, 4), 2, epoch=0, seed=0, skip=490))
    assert [step.number for step in made] == list(range(490, 500))
    assert sum(asked) == 2 * 10


@settings(max_examples=40, deadline=None)
@given(rows=users)
def test_targets_follow_inputs(rows: list[list[int]]) -> None:
    histories = Histories.of(rows)
    for batch in epoch(histories):
        real = batch.targets >= 0
        assert (real == (batch.inputs >= 0)).all()
        assert (real.sum(1) == batch.lengths).all()
        assert (batch.targets[real] == histories.items[batch.at[real]]).all()
        assert (batch.inputs[real] == histories.items[batch.at[real] - 1]).all()
        assert batch.positions == batch.lengths.sum()
        assert batch.lengths.max() == batch.inputs.shape[1]  # padded to its own longest


def same(a: list[SequenceBatch], b: list[SequenceBatch]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a, b)
        for name in ("inputs", "targets", "negatives", "log_q", "seed")
    )


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in-batch"])
def test_the_seed_and_the_epoch_decide_a_batch(sampling: str) -> None:
    rng = np.random.default_rng(0)
    histories = Histories.of([rng.integers(0, 10, 9).tolist() for _ in range(20)])
    how = Negatives(6, sampling)  # type: ignore[arg-type]
    assert same(epoch(histories, negatives=how), epoch(histories, negatives=how))
    assert not same(epoch(histories, negatives=how), epoch(histories, negatives=how, epoch=2))
    assert not same(epoch(histories, negatives=how), epoch(histories, negatives=how, seed=6))
    left, right = (epoch(histories, negatives=how, rank=r, world=2) for r in (0, 1))
    assert [b.seed for b in left] != [b.seed for b in right]


def test_steps_are_any_windows_and_their_parts_of_near_length() -> None:
    lengths = np.random.default_rng(0).integers(2, 60, 650)
    histories = Histories.of([[0] * n for n in lengths])
    cut = windows(histories, 60)
    made = list(steps(cut, 20, epoch=0, seed=0))
    assert [step.number for step in made] == list(range(33))  # 650 / 20, rounded up
    assert min(len(step.starts) for step in made) >= 19  # the rest is spread, not a small step of its own
    assert sorted(np.concatenate([s.starts for s in made]).tolist()) == cut.offsets[:-1].tolist()
    means = np.array([step.lengths.mean() for step in made])
    assert means.std() < 1.5 * lengths.std() / 20**0.5  # as of 20 windows drawn at random
    parts = [part for batch in epoch(histories, max_len=60, batch_size=20) for part in batch.parts()]
    wasted = sum(part.inputs.size for part in parts) / (lengths - 1).sum()
    assert wasted < 1.3  # padding; of whole steps it is about 1.9


@settings(max_examples=40, deadline=None)
@given(rows=users, batch_size=st.integers(1, 12))
def test_parts_are_the_batch_in_order(rows: list[list[int]], batch_size: int) -> None:
    for batch in epoch(Histories.of(rows), max_len=11, batch_size=batch_size):
        parts = list(batch.parts())
        for name in ("inputs", "targets", "at"):
            together = [getattr(part, name)[part.targets >= 0] for part in parts]
            np.testing.assert_array_equal(np.concatenate(together), getattr(batch, name)[batch.targets >= 0])
        np.testing.assert_array_equal(np.concatenate([part.lengths for part in parts]), batch.lengths)
        for part in parts:
            assert part.lengths.max() == part.inputs.shape[1] == part.targets.shape[1] == part.at.shape[1]


@pytest.mark.parametrize(
    ("how", "want"),
    [
        (Negatives(2, "uniform"), [1 / 3, 1 / 3, 1 / 3]),
        (Negatives(2, "popularity"), [0.8, 0.2, 0.0]),
        (Negatives(2, "popularity", power=0.5), [2 / 3, 1 / 3, 0.0]),
        (Negatives(2, "popularity", uniform_share=0.3), [0.66, 0.24, 0.1]),
    ],
)
def test_negatives_follow_their_distribution_and_log_q_says_it(how: Negatives, want: list[float]) -> None:
    histories = Histories.of([[0, 0, 0, 0, 1]] * 4000)
    batches = sequence_batches(histories, 3, max_len=9, batch_size=1, epoch=0, seed=0, negatives=how)
    negatives, log_q = (np.array(x) for x in zip(*((b.negatives, b.log_q) for b in batches)))
    np.testing.assert_allclose(np.bincount(negatives.ravel(), minlength=3) / 8000, want, atol=0.02)
    np.testing.assert_allclose(np.exp(log_q) / how.count, np.asarray(want)[negatives], rtol=1e-5)


def test_in_batch_negatives_are_targets_of_the_batch() -> None:
    histories = Histories.of([[7, 1, 2], [8, 2, 3]])
    (batch,) = epoch(histories, batch_size=9, negatives=Negatives(9, "in-batch"))
    assert set(batch.negatives) <= {1, 2, 3}
    share = np.array([0, 1, 2, 1]) / 4
    np.testing.assert_allclose(batch.log_q, np.log(9 * share[batch.negatives]), rtol=1e-5)


@pytest.mark.parametrize("ordered", [True, False])
def test_log_q_of_in_batch_negatives_knows_what_is_never_a_target(ordered: bool) -> None:
    """What users begin with is drawn no more often than it is a target."""
    histories = Histories.of([[0]] * 30 + [[1, 2, 3, 2], [1, 3, 2, 4]] * 20)
    how = Negatives(4, "in-batch", uniform_share=0.3)
    seen, said, steps = np.zeros(10), np.zeros(10), 0
    for number in range(300):
        for batch in epoch(histories, epoch=number, batch_size=8, negatives=how, ordered=ordered):
            np.add.at(seen, batch.negatives, 1)
            said[batch.negatives] = np.exp(batch.log_q)
            steps += 1
    np.testing.assert_allclose(seen / steps, said, rtol=0.2)


def test_chances_are_uniform_and_belong_to_their_place() -> None:
    at = np.arange(20_000).reshape(100, 200)
    made = chances(at, 1, 2)
    np.testing.assert_array_equal(chances(at[7:9, 5:], 1, 2), made[7:9, 5:])
    share = np.histogram(made, 10, (0, 1))[0] / made.size
    np.testing.assert_allclose(share, 0.1, atol=0.01)
    assert abs(np.corrcoef(made.ravel(), chances(at, 1, 3).ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(made.ravel()[1:], made.ravel()[:-1])[0, 1]) < 0.05


@given(st.integers(0, 2**32 - 1))
def test_owned_negatives_are_found(seed: int) -> None:
    histories = Histories.of(np.random.default_rng(seed).integers(0, 10, (5, 4)).tolist())
    for batch in epoch(histories, negatives=Negatives(7), ordered=False):
        wanted = (batch.targets[:, :, None] == batch.negatives).any(axis=1)
        assert np.array_equal(owned(batch), wanted)


@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in-batch"])
def test_as_many_negatives_as_items_are_all_items_once(sampling: Any) -> None:
    for batch in epoch(Histories.of([[7, 1, 2], [8, 2, 3]]), negatives=Negatives(10, sampling)):
        assert batch.negatives.tolist() == list(range(10))
        assert not batch.log_q.any()


def test_without_an_order_half_is_read_another_half_each_epoch() -> None:
    histories = Histories.of([list(range(10))] * 400)
    read = []
    for number in range(2):
        found = np.zeros(len(histories.items), bool)
        for batch in epoch(histories, max_len=12, epoch=number, ordered=False):
            assert np.isin(batch.inputs, [PAD, *range(10)]).all()
            assert np.array_equal(np.where(batch.inputs >= 0, batch.targets, PAD), batch.inputs)
            found[batch.at[batch.inputs >= 0]] = True
        read.append(found)
        assert found.mean() == pytest.approx(0.5, abs=0.04)
    assert (read[0] == read[1]).mean() == pytest.approx(0.5, abs=0.04)


@settings(max_examples=60, deadline=None)
@given(rows=users, max_len=st.integers(2, 6))
def test_without_an_order_every_interaction_is_a_target_once(rows: list[list[int]], max_len: int) -> None:
    histories = Histories.of(rows)
    cut = windows(histories, max_len, ordered=False)
    starts, lengths = cut.spans(np.arange(len(cut)))
    covered = Counter(int(at) for s, n in zip(starts, lengths) for at in range(s, s + n))
    wanted = [at for a, b in pairwise(histories.offsets.tolist()) if b - a > 1 for at in range(a, b)]
    assert covered == Counter(wanted)
    assert not len(lengths) or lengths.max() <= max_len
    for user in np.unique(np.searchsorted(histories.offsets, starts, side="right")):
        mine = lengths[np.searchsorted(histories.offsets, starts, side="right") == user]
        assert mine.max() - mine.min() <= 1
    told: Counter[int] = Counter()
    for batch in epoch(histories, max_len=max_len, ordered=False, negatives=Negatives(5, "in-batch")):
        assert np.array_equal((batch.at >= 0).sum(1), batch.lengths)
        assert batch.positions == batch.lengths.sum()
        assert set(batch.negatives.tolist()) <= set(batch.targets.ravel().tolist())
        told.update(batch.at[batch.at >= 0].tolist())
    assert told == covered
