"""How people of the synthetic world live: the shop's truth, what they have in mind, one step at a time.

Shapes: U users, K interests a user, N items, C categories. Items of a category are neighbours in item
order, which is also the order of its chain.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray.data import words
from recray.errors import ConfigError

START = 1_767_571_200  # Monday 2026-01-05, 00:00 UTC
DAY = 86_400
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
WEATHER = ("clear", "rain", "snow")
AGES = ("18-29", "30-44", "45-64", "65+")
EVENTS = {"view": 1.0, "cart": 3.0, "buy": 5.0}  # kind -> weight
POSITIONS = 10  # places of a slate
STEPS = (0.55, 0.25, 0.12, 0.08)  # chance that the next thing of a chain lies 1, 2, 3, 4 further
_TRIES = 8  # proposals a user looks at before giving up a step

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """How large and how hard the world is. Everything follows from these and the seed."""

    n_users: int = 5000
    n_items: int = 2000
    mean_length: float = 40.0  # interactions a user, log-normal
    min_length: int = 6
    max_length: int = 200
    interests: int = 3  # categories a user cares for at a time
    stay: float = 0.75  # chance that the next interaction is of the same interest
    follow: float = 0.6  # chance that it is the next thing of that interest's chain
    drift: float = 0.02  # chance a step that one interest gives way to a new one
    zipf: float = 0.8  # exponent of popularity within a category and of the categories
    position_bias: float = 0.5  # a place p (from 0) is examined with chance (1 + p) ** -position_bias
    context_effect: float = 0.4  # standard deviation of the log of what a context does to an interest
    cold_items: float = 0.05  # share of items that arrive in the last tenth of the time
    days: int = 120
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_users", "mean_length", "interests", "days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="it must be at least 1")
        for name in ("stay", "follow", "drift", "cold_items"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", fix="it must be inside [0, 1]")
        if not 1 <= self.min_length <= self.max_length:
            raise ConfigError("min_length and max_length do not fit", fix="1 <= min_length <= max_length")
        if self.n_items < 5 * len(words.CATEGORIES):
            fix = f"it must be at least {5 * len(words.CATEGORIES)}"
            raise ConfigError(f"n_items is {self.n_items}", fix=fix)
        if self.interests > len(words.CATEGORIES):
            raise ConfigError(f"interests is {self.interests}", fix=f"at most {len(words.CATEGORIES)}")


@dataclass(frozen=True, eq=False)
class Shop:
    """The truth about items and contexts."""

    first: Ints  # int64[C + 1], a category's items are first[c] .. first[c + 1]
    category: Ints  # int64[N]
    chance: Floats  # float64[N], popularity within the category, sums to 1 over each
    draw: Floats  # float64[N], running sum of `chance` in order of popularity, plus the category
    by_rank: Ints  # int64[N], each category's items, most popular first
    rank: Ints  # int64[N], place in that order
    arrival: Ints  # int64[N], seconds
    popular: Floats  # float64[C], sums to 1
    weather: Ints  # int64[days], code of WEATHER
    effect: Floats  # float64[2, 3, C], what (weekend, weather) multiplies an interest by
    age_taste: Floats  # float64[4, C], what an age group multiplies a category by


@dataclass(frozen=True, eq=False)
class Minds:
    """What users have in mind. Shapes [U, K] unless said otherwise."""

    interests: Ints  # category
    strength: Floats
    last: Ints  # place in the category's chain of the item taken last, -1 for none yet
    current: Ints  # int64[U], index into K; -1 before the first step
    time: Ints  # int64[U], seconds

    def copy(self) -> Minds:
        """The same, in arrays of its own."""
        return Minds(*(x.copy() for x in self.parts()))

    def take(self, at: Ints) -> Minds:
        """The minds of some users, int64[n] into U."""
        return Minds(*(x[at] for x in self.parts()))

    def put(self, at: Ints, new: Minds) -> None:
        """Overwrite the minds of some users, int64[n] into U."""
        for mine, theirs in zip(self.parts(), new.parts(), strict=True):
            mine[at] = theirs

    def parts(self) -> tuple[NDArray[Any], ...]:
        """The arrays, in the order of the fields."""
        return self.interests, self.strength, self.last, self.current, self.time


def make_shop(config: WorldConfig, rng: np.random.Generator) -> Shop:
    """Draw the truth about items, weather and tastes."""
    n, c = config.n_items, len(words.CATEGORIES)
    popular: Floats = np.float_power(np.arange(1, c + 1), -config.zipf / 2)
    popular = rng.permutation(popular) / popular.sum()
    size = np.full(c, n // c)
    size[: n % c] += 1
    first = np.concatenate([[0], np.cumsum(size)])
    category = np.repeat(np.arange(c), size)
    by_rank = np.concatenate([rng.permutation(np.arange(a, b)) for a, b in itertools.pairwise(first)])
    rank = np.empty(n, dtype=np.int64)
    rank[by_rank] = np.arange(n) - first[category]
    weight = 1.0 / (rank + 1.0) ** config.zipf
    chance = weight / np.add.reduceat(weight, first[:-1])[category]
    running: Floats = np.cumsum(chance[by_rank]) - np.arange(c)[category]  # restarts in each category
    u = rng.random(n)
    span = config.days * DAY
    late, later = u < 0.2, u < config.cold_items
    arrival = np.where(late, rng.random(n) * 0.9, 0.0)
    arrival = np.where(later, 0.9 + 0.1 * rng.random(n), arrival)
    arrival[by_rank[first[:-1]]] = 0.0  # each category has something to show from the first day
    weather = np.zeros(config.days, dtype=np.int64)
    for day in range(1, config.days):
        weather[day] = weather[day - 1] if rng.random() < 0.6 else rng.choice(3, p=[0.6, 0.3, 0.1])
    weekend = np.stack([np.zeros(c), rng.normal(size=c)])[:, None, :]
    sky = np.stack([np.zeros(c), *rng.normal(size=(2, c))])[None]
    return Shop(
        first=first,
        category=category,
        chance=chance,
        draw=np.clip(running, 0.0, 1.0) + category.astype(np.float64),
        by_rank=by_rank,
        rank=rank,
        arrival=START + (arrival * span).astype(np.int64),
        popular=popular,
        weather=weather,
        effect=np.exp(config.context_effect * (weekend + sky)),
        age_taste=np.exp(0.5 * rng.normal(size=(len(AGES), c))),
    )


@dataclass(frozen=True, eq=False)
class Block:
    """What some users did: the log's columns as codes, and their minds before their last interaction."""

    log: dict[str, NDArray[Any]]
    minds: Minds
    age: Ints


def live(config: WorldConfig, shop: Shop, rng: np.random.Generator, n: int) -> Block:
    """Let n users live, all of them one step at a time."""
    spread = 0.7
    raw = rng.lognormal(np.log(config.mean_length) - spread**2 / 2, spread, size=n)
    length = np.clip(np.rint(raw), config.min_length, config.max_length).astype(np.int64)
    times = _times(config, rng, length)
    age = rng.integers(len(AGES), size=n)
    minds = _new_minds(config, shop, rng, age)
    truth = minds.copy()
    taken = np.full((n, int(length.max())), -1, dtype=np.int64)
    logged: list[dict[str, NDArray[Any]]] = []
    for step in range(taken.shape[1]):
        users = np.flatnonzero(length > step)
        minds.time[users] = times[users, step]
        _drift(config, shop, rng, minds, users)
        before = minds.take(users)
        _switch(config, shop, rng, minds, users, before)
        item, place = _choose(config, shop, rng, minds, users, taken[users, :step])
        done = item >= 0
        users, item, place = users[done], item[done], place[done]
        truth.put(users, before.take(np.flatnonzero(done)))
        current = minds.current[users]
        minds.last[users, current] = item - shop.first[minds.interests[users, current]]
        taken[users, step] = item
        logged.append(
            {
                "user": users,
                "item": item,
                "time": times[users, step],
                "event": _events(shop, rng, item),
                "position": place,
                "propensity": _examined(config, place),
            }
        )
    return Block({name: np.concatenate([x[name] for x in logged]) for name in logged[0]}, truth, age)


def _times(config: WorldConfig, rng: np.random.Generator, length: Ints) -> Ints:
    """Rising unix seconds, int64[U, L]: visits of a few minutes with days between, each user's own span."""
    n, longest = len(length), int(length.max())
    gap = rng.exponential(90.0, size=(n, longest)) + 5
    away = rng.random((n, longest)) < 0.25
    gap += away * rng.exponential(3 * DAY, size=(n, longest))
    when = np.cumsum(gap, axis=1)
    span = config.days * DAY - 1
    start = rng.random(n) * 0.6 * span
    end = when[np.arange(n), length - 1]
    squeeze = np.minimum(1.0, (span - start) / end)  # nobody acts after the last day
    return START + (start[:, None] + when * squeeze[:, None]).astype(np.int64)


def _new_minds(config: WorldConfig, shop: Shop, rng: np.random.Generator, age: Ints) -> Minds:
    n, k = len(age), config.interests
    keys = np.log(shop.popular * shop.age_taste[age]) + rng.gumbel(size=(n, len(shop.popular)))
    interests = np.argsort(-keys, axis=1)[:, :k]  # k different ones, drawn by popularity
    return Minds(
        interests=interests,
        strength=rng.gamma(2.0, size=(n, k)),
        last=np.full((n, k), -1),
        current=np.full(n, -1),
        time=np.zeros(n, dtype=np.int64),
    )


def _drift(config: WorldConfig, shop: Shop, rng: np.random.Generator, minds: Minds, users: Ints) -> None:
    """Some users give up one interest for another, most often of the same department."""
    users = users[rng.random(len(users)) < config.drift]
    slot = rng.integers(config.interests, size=len(users))
    old = minds.interests[users, slot]
    near = old // 4 * 4 + rng.integers(4, size=len(users))
    far = rng.choice(len(shop.popular), size=len(users), p=shop.popular)
    new = np.where(rng.random(len(users)) < 0.6, near, far)
    fresh = ~(minds.interests[users] == new[:, None]).any(axis=1)
    users, slot, new = users[fresh], slot[fresh], new[fresh]
    minds.interests[users, slot] = new
    minds.strength[users, slot] = rng.gamma(2.0, size=len(users))
    minds.last[users, slot] = -1


def _switch(
    config: WorldConfig, shop: Shop, rng: np.random.Generator, minds: Minds, users: Ints, before: Minds
) -> None:
    chances = interest_chances(shop, config, before)
    u = rng.random((len(users), 1)) * chances.sum(axis=1, keepdims=True)
    minds.current[users] = np.minimum((chances.cumsum(axis=1) < u).sum(axis=1), config.interests - 1)


def interest_chances(shop: Shop, config: WorldConfig, minds: Minds) -> Floats:
    """Chance of each interest to be acted on next, float64[U, K]: stay, or follow strength and context."""
    day = (minds.time - START) // DAY
    boost_UC = shop.effect[(day % 7 >= 5).astype(np.int64), shop.weather[day]]
    want = minds.strength * np.take_along_axis(boost_UC, minds.interests, axis=1)
    want /= want.sum(axis=1, keepdims=True)
    started = minds.current >= 0
    stay = np.zeros_like(want)
    stay[np.flatnonzero(started), minds.current[started]] = 1.0
    share = np.where(started, config.stay, 0.0)[:, None]
    made: Floats = share * stay + (1 - share) * want
    return made


def _choose(
    config: WorldConfig, shop: Shop, rng: np.random.Generator, minds: Minds, users: Ints, taken: Ints
) -> tuple[Ints, Ints]:
    """(item int64[U] or -1 for nothing, place on the slate int64[U]): proposals until one is taken.

    A proposal comes from the chain or from popularity; it must have arrived, be new to the user and be
    examined, which happens less often at lower places. So the log sees less of what is shown low.
    """
    item, place = np.full(len(users), -1), np.zeros(len(users), dtype=np.int64)
    left = np.arange(len(users))
    for _ in range(_TRIES):
        who, m = users[left], len(left)
        category = minds.interests[who, minds.current[who]]
        last = minds.last[who, minds.current[who]]
        onward = (last >= 0) & (rng.random(m) < config.follow)
        step = 1 + rng.choice(len(STEPS), size=m, p=STEPS)
        popular = np.searchsorted(shop.draw, category + rng.random(m) * (1 - 1e-9))
        popular = shop.by_rank[np.minimum(popular, shop.first[category + 1] - 1)]
        proposed = np.where(onward, in_chain(shop, category, last + step), popular)
        shown = _place(shop, rng, proposed)
        taken_before = (taken[left] == proposed[:, None]).any(axis=1)
        good = (shop.arrival[proposed] <= minds.time[who]) & ~taken_before
        good &= rng.random(m) < _examined(config, shown)
        item[left[good]], place[left[good]] = proposed[good], shown[good]
        left = left[~good]
    return item, place


def in_chain(shop: Shop, category: Ints, at: Ints) -> Ints:
    """The item at a place of a category's chain, which is a ring."""
    size = shop.first[category + 1] - shop.first[category]
    made: Ints = shop.first[category] + at % size
    return made


def _place(shop: Shop, rng: np.random.Generator, item: Ints) -> Ints:
    """Where the shop shows an item: popular ones mostly at the top."""
    c = shop.category[item]
    share = shop.rank[item] / (shop.first[c + 1] - shop.first[c])
    noisy = np.rint(share * (POSITIONS - 1) + rng.normal(scale=2.0, size=len(item)))
    return np.clip(noisy, 0, POSITIONS - 1).astype(np.int64)


def _examined(config: WorldConfig, place: Ints) -> Floats:
    made: Floats = np.float_power(1 + place, -config.position_bias)
    return made


def _events(shop: Shop, rng: np.random.Generator, item: Ints) -> Ints:
    """Most look; popular things are bought more often."""
    eager = 0.6 + 0.8 * np.exp(-shop.rank[item] / 10)
    u = rng.random(len(item))
    return np.where(u < 0.12 * eager, 2, np.where(u < 0.30 * eager, 1, 0))
