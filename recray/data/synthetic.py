"""A small world whose truth is known: the embedded default, for the demo, tests and what-if questions.

People have several interests at a time, which drift. Within an interest one thing leads to the next
(a chain through the category), so the order of a history carries news that counting cannot see. The
log is what a shop would have: popularity is skewed, new items arrive, weekday and weather matter a
little, and a slate shows popular items at the top, so lower ones are examined less. The chance of having
been examined is logged as `propensity`.

Shapes: U users of a block, K interests a user, N items, C categories. Items of a category are
neighbours in item order, which is also the order of its chain.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray.data import words
from recray.data.lives import (
    AGES,
    DAY,
    EVENTS,
    START,
    STEPS,
    WEATHER,
    WEEKDAYS,
    Minds,
    Shop,
    WorldConfig,
    in_chain,
    interest_chances,
    live,
    make_shop,
)

__all__ = ["World", "WorldConfig", "make", "write_world"]

BLOCK = 20_000  # users made at a time


@dataclass(frozen=True, eq=False)
class World:
    """A made log and the truth behind it.

    log: one row an interaction in order of time (user, item, time, weight, event, weekday, weather,
    position, propensity); a user has an item at most once. items: item, title, category, department,
    price, added. users: user, age. Rows of `items` and `users` are the rows of `affinity`.
    shop, minds: the truth, as of each user's last interaction.
    """

    config: WorldConfig
    log: pa.Table
    items: pa.Table
    users: pa.Table
    shop: Shop
    minds: Minds

    def affinity(self, user_rows: NDArray[Any]) -> NDArray[np.float32]:
        """The true chance of each item being what the user's *last* logged interaction is, float32[B, N].

        Free of position bias: what people want, not what they were shown. Items that had not arrived
        by then have 0. Known history is not taken out; a row sums to 1.
        """
        minds = self.minds.take(np.asarray(user_rows, dtype=np.int64))
        shop, config = self.shop, self.config
        b = len(minds.current)
        wanted_BK = interest_chances(shop, config, minds)
        follow_BK = np.where(minds.last >= 0, config.follow, 0.0)
        made = np.zeros((b, len(shop.category)))
        of_category = np.zeros((b, len(shop.popular)))
        np.add.at(of_category, (np.arange(b)[:, None], minds.interests), wanted_BK * (1 - follow_BK))
        made += of_category[:, shop.category] * shop.chance
        for step, chance in enumerate(STEPS, 1):
            item_BK = in_chain(shop, minds.interests, minds.last + step)
            np.add.at(made, (np.arange(b)[:, None], item_BK), wanted_BK * follow_BK * chance)
        made *= shop.arrival <= minds.time[:, None]
        chances: NDArray[np.float32] = (made / made.sum(axis=1, keepdims=True)).astype(np.float32)
        return chances


def make(config: WorldConfig | None = None) -> World:
    """The world of that configuration; the same configuration gives the same world."""
    config = config or WorldConfig()
    seeds = np.random.SeedSequence(config.seed).spawn(2)
    rng = np.random.default_rng(seeds[0])
    shop = make_shop(config, rng)
    names = np.array([f"i{n:0{len(str(config.n_items))}d}" for n in rng.permutation(config.n_items)])
    users = np.array([f"u{n:0{len(str(config.n_users))}d}" for n in range(config.n_users)])
    sizes = [min(BLOCK, config.n_users - at) for at in range(0, config.n_users, BLOCK)]
    blocks = [
        live(config, shop, np.random.default_rng(seed), n)
        for seed, n in zip(seeds[1].spawn(len(sizes)), sizes, strict=True)
    ]
    starts = np.cumsum([0, *sizes[:-1]])
    columns = {
        name: np.concatenate([block.log[name] for block in blocks])
        for name in blocks[0].log
        if name != "user"
    }
    columns["user"] = np.concatenate(
        [block.log["user"] + start for block, start in zip(blocks, starts, strict=True)]
    )
    minds = Minds(*(np.concatenate(x) for x in zip(*(block.minds.parts() for block in blocks), strict=True)))
    age = np.concatenate([block.age for block in blocks])
    return World(
        config,
        _log_table(columns, users, names, shop),
        _item_table(config, shop, names, rng),
        pa.table({"user": pa.array(users), "age": _words(age, AGES)}),
        shop,
        minds,
    )


def write_world(world: World, folder: str | os.PathLike[str]) -> Path:
    """Write log.parquet, items.parquet and users.parquet into the folder (made if missing)."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, table in (("log", world.log), ("items", world.items), ("users", world.users)):
        pq.write_table(table, target / f"{name}.parquet")
    return target


def _log_table(
    columns: dict[str, NDArray[Any]], users: NDArray[np.str_], names: NDArray[np.str_], shop: Shop
) -> pa.Table:
    order = np.lexsort((columns["user"], columns["time"]))
    got = {name: values[order] for name, values in columns.items()}
    day = (got["time"] - START) // DAY
    return pa.table(
        {
            "user": pa.array(users).take(pa.array(got["user"])),
            "item": pa.array(names).take(pa.array(got["item"])),
            "time": pa.array(got["time"]),
            "weight": pa.array(np.array(list(EVENTS.values()), dtype=np.float32)[got["event"]]),
            "event": _words(got["event"], tuple(EVENTS)),
            "weekday": _words(day % 7, WEEKDAYS),
            "weather": _words(shop.weather[day], WEATHER),
            "position": pa.array(got["position"].astype(np.int8)),
            "propensity": pa.array(got["propensity"].astype(np.float32)),
        }
    )


def _item_table(
    config: WorldConfig, shop: Shop, names: NDArray[np.str_], rng: np.random.Generator
) -> pa.Table:
    n = config.n_items
    kinds = list(words.CATEGORIES)
    adjective, noun = rng.integers(1 << 16, size=(2, n))
    titles = [
        words.title(i // 6, int(adjective[i]), kinds[shop.category[i]], int(noun[i])) for i in range(n)
    ]  # six neighbours of a chain are one collection
    usual = rng.lognormal(3.0, 0.6, size=len(kinds))
    return pa.table(
        {
            "item": pa.array(names),
            "title": pa.array(titles),
            "category": _words(shop.category, tuple(kinds)),
            "department": _words(shop.category, tuple(kind.split("/")[0] for kind in kinds)),
            "price": pa.array(np.round(usual[shop.category] * rng.lognormal(0, 0.4, size=n), 2)),
            "added": pa.array(shop.arrival),
        }
    )


def _words(codes: NDArray[Any], names: tuple[str, ...]) -> pa.Array:
    return pa.array(np.array(names)).take(pa.array(codes))
