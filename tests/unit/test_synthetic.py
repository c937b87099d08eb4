"""The synthetic world: the same by seed, as large as asked, and true to what it says of itself."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray import config
from recray.data import lives, words
from recray.data.synthetic import World, WorldConfig, make, write_world
from recray.errors import ConfigError


@pytest.fixture(scope="module")
def world() -> World:
    return make(WorldConfig(n_users=1500, n_items=600, mean_length=30, seed=3))


def codes(column: pa.ChunkedArray, names: pa.ChunkedArray) -> np.ndarray:
    return pc.index_in(column, names).to_numpy()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(120, 200), st.integers(1, 5))
def test_the_seed_decides_everything(seed: int, n_users: int, n_items: int, interests: int) -> None:
    settings_ = WorldConfig(n_users=n_users, n_items=n_items, interests=interests, mean_length=8, seed=seed)
    one, other = make(settings_), make(settings_)
    assert one.log.equals(other.log)
    assert one.items.equals(other.items)
    assert one.users.equals(other.users)
    rows = np.arange(n_users)
    truth = one.affinity(rows)
    assert (truth == other.affinity(rows)).all()
    assert np.allclose(truth.sum(axis=1), 1, atol=1e-4)
    assert one.users.num_rows == n_users
    assert one.items.num_rows == n_items


def test_another_seed_is_another_world(world: World) -> None:
    other = make(WorldConfig(n_users=1500, n_items=600, mean_length=30, seed=4))
    assert not other.log.equals(world.log)


def test_many_users_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from recray.data import synthetic

    monkeypatch.setattr(synthetic, "BLOCK", 7)
    made = make(WorldConfig(n_users=20, n_items=120, mean_length=8))
    assert made.log["user"].unique().sort().to_pylist() == made.users["user"].to_pylist()
    assert made.affinity(np.arange(20)).shape == (20, 120)


def test_the_log_is_clean(world: World) -> None:
    log = world.log
    assert log.column_names == [
        "user", "item", "time", "weight", "event", "weekday", "weather", "position", "propensity",
    ]  # fmt: skip
    assert all(column.null_count == 0 for column in log.columns)
    assert 22 * 1500 < log.num_rows < 30 * 1500
    assert log.group_by(["user", "item"]).aggregate([]).num_rows == log.num_rows
    times = log["time"].to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times[0] >= lives.START
    assert times[-1] < lives.START + world.config.days * lives.DAY
    per_user = log.group_by("user").aggregate([("item", "count")])["item_count"].to_numpy()
    assert per_user.max() <= world.config.max_length
    for second, weekday in zip(times[::997].tolist(), log["weekday"].to_pylist()[::997], strict=True):
        assert dt.datetime.fromtimestamp(second, dt.timezone.utc).strftime("%a").lower() == weekday
    weights = dict(zip(log["event"].to_pylist(), log["weight"].to_pylist(), strict=True))
    assert weights == lives.EVENTS


def test_items_come_after_they_arrive_and_some_stay_cold(world: World) -> None:
    item = codes(world.log["item"], world.items["item"])
    added = world.items["added"].to_numpy()
    assert (world.log["time"].to_numpy() >= added[item]).all()
    late = added > lives.START + 0.9 * world.config.days * lives.DAY
    seen = np.bincount(item, minlength=600)
    assert 0.02 < late.mean() < 0.1
    assert seen[late].mean() < 0.3 * seen[~late].mean()


def test_popularity_is_skewed(world: World) -> None:
    seen = np.sort(np.bincount(codes(world.log["item"], world.items["item"]), minlength=600))[::-1]
    assert seen[:60].sum() > 0.2 * seen.sum()
    flat = make(WorldConfig(n_users=1500, n_items=600, mean_length=30, seed=3, zipf=0.0))
    even = np.sort(np.bincount(codes(flat.log["item"], flat.items["item"]), minlength=600))[::-1]
    assert even[:60].sum() < seen[:60].sum()


def test_titles_tell_the_category(world: World) -> None:
    for title, category in zip(
        world.items["title"].to_pylist(), world.items["category"].to_pylist(), strict=True
    ):
        assert any(title.endswith(noun) for noun in words.CATEGORIES[category])


def test_propensities_are_those_of_the_places(world: World) -> None:
    place = world.log["position"].to_numpy().astype(np.float64)
    assert np.allclose(world.log["propensity"].to_numpy(), (1 + place) ** -0.5)


def test_position_bias_shifts_the_log_to_the_top_and_propensities_undo_it() -> None:
    shape = {"n_users": 3000, "n_items": 600, "mean_length": 20, "follow": 0.0}
    fair, unfair = (make(WorldConfig(**shape, position_bias=b)) for b in (0.0, 1.0))  # type: ignore[arg-type]
    top = [float((w.log["position"].to_numpy() == 0).mean()) for w in (fair, unfair)]
    assert top[1] > top[0] + 0.1
    weight = 1 / unfair.log["propensity"].to_numpy()
    undone = weight[unfair.log["position"].to_numpy() == 0].sum() / weight.sum()
    assert abs(undone - top[0]) < 0.5 * (top[1] - top[0])


def test_affinity_is_the_truth_behind_the_last_interaction() -> None:
    world = make(WorldConfig(n_users=4000, n_items=2400, mean_length=12, seed=1, position_bias=0.0))
    user, item = codes(world.log["user"], world.users["user"]), codes(world.log["item"], world.items["item"])
    last = np.full(4000, -1)
    last[user] = item  # the log is in order of time: the last write stays
    truth = world.affinity(np.arange(4000))
    truth[user, item] = np.where(item == last[user], truth[user, item], 0)  # nobody takes a thing twice
    truth /= truth.sum(axis=1, keepdims=True)
    given_ = truth[np.arange(4000), last]
    assert given_.min() > 0
    # calibrated: where the truth says p, it happens a share p of the time
    top = truth.argmax(axis=1)
    said, came = truth.max(axis=1).mean(), (top == last).mean()
    assert abs(said - came) < 0.03
    assert said > 0.15  # against 1 / 2400 by chance


def test_order_matters_only_as_much_as_asked(world: World) -> None:
    def next_in_chain(made: World) -> float:
        user = codes(made.log["user"], made.users["user"])
        item = codes(made.log["item"], made.items["item"])
        order = np.lexsort((np.arange(len(user)), user))
        step = np.diff(item[order])
        return float(((step > 0) & (step <= 4))[np.diff(user[order]) == 0].mean())

    shuffled = make(WorldConfig(n_users=1500, n_items=600, mean_length=30, seed=3, follow=0.0))
    assert next_in_chain(world) > 3 * next_in_chain(shuffled)


def test_context_moves_interests() -> None:
    shape = {"n_users": 3000, "n_items": 240, "mean_length": 15, "stay": 0.0, "drift": 0.0}

    def spread(effect: float) -> float:
        made = make(WorldConfig(**shape, context_effect=effect))  # type: ignore[arg-type]
        kind = made.items["category"].to_numpy()[codes(made.log["item"], made.items["item"])]
        weekend = np.isin(made.log["weekday"].to_numpy(), ["sat", "sun"])
        names, code = np.unique(kind, return_inverse=True)
        shares = [np.bincount(code[m], minlength=len(names)) / m.sum() for m in (weekend, ~weekend)]
        return float(np.abs(shares[0] - shares[1]).sum())

    assert spread(1.0) > 3 * spread(0.0)


def test_written_and_read_back(world: World, tmp_path: Path) -> None:
    folder = write_world(world, tmp_path / "new" / "world")
    assert sorted(p.name for p in folder.iterdir()) == ["items.parquet", "log.parquet", "users.parquet"]
    assert pq.read_table(folder / "log.parquet").equals(world.log)


@pytest.mark.parametrize(
    "values",
    [{"n_items": 10}, {"stay": 1.5}, {"min_length": 9, "max_length": 3}, {"n_users": 0}, {"interests": 99}],
)
def test_impossible_worlds_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        config.build(WorldConfig, values)
