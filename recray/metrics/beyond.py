"""What lists are worth beyond accuracy: how much of the catalogue they show, how rare, how varied.

Shapes: B users, k places of a list (-1 where there is no item), N items of the catalogue, P places with
a known category, G groups of them that are alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def coverage(rows: NDArray[np.int64], n_items: int) -> float:
    """Catalogue coverage: the share of the N items that at least one list holds (Ge et al. 2010)."""
    return len(np.unique(rows[rows >= 0])) / n_items


def self_information(users_per_item: NDArray[np.int64], n_users: int) -> NDArray[np.float64]:
    """Bits of surprise an item carries, log2(n_users / its users), float64[N] (Zhou et al. 2010, eq. 5).

    users_per_item: int[N], how many of the n_users have each item, each user counted once. An item that
    nobody has counts as if one user had it, so the value stays finite.
    """
    if users_per_item.max(initial=0) > n_users:
        raise ValueError("an item has more users than there are")
    made: NDArray[np.float64] = np.log2(n_users / np.maximum(users_per_item, 1))
    return made


def novelty(rows: NDArray[np.int64], information: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean self-information of each list, in bits, float64[B]; 0 for an empty list (Zhou et al. 2010).

    information: float64[N] from `self_information`.
    """
    there = rows >= 0
    bits = np.where(there, information[np.maximum(rows, 0)], 0.0)
    made: NDArray[np.float64] = bits.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return made


def diversity(rows: NDArray[np.int64], categories: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intra-list diversity, float64[B]: the share of a list's pairs of items that differ in category.

    One minus the mean of Ziegler et al. (2005)'s intra-list similarity, of items that are alike or not;
    inside [0, 1]. categories: int64[N]; a negative one is unknown, and unlike everything. A list of fewer
    than two items has diversity 0.
    """
    there = rows >= 0
    found = np.where(there, categories[np.maximum(rows, 0)], -1)
    line_P, place_P = np.nonzero(found >= 0)
    together = np.unique(np.stack([line_P, found[line_P, place_P]]), axis=1, return_counts=True)
    (line_G, _), count_G = together
    alike = np.bincount(line_G, weights=count_G * (count_G - 1), minlength=len(rows))
    m = there.sum(axis=1)
    pairs = m * (m - 1)
    return np.where(pairs > 0, 1 - alike / np.maximum(pairs, 1), 0.0)
