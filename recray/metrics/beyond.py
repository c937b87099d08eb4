"""What lists are worth beyond accuracy: how much of the catalogue they show, how rare, how varied.

Shapes: B users, k places of a list (-1 where there is no item), N items of the catalogue, D dims.
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


def diversity(rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Intra-list diversity, float64[B]: the mean over pairs of a list of 1 - cosine of their vectors.

    One minus the mean of Ziegler et al. (2005)'s intra-list similarity; inside [0, 2], or [0, 1] for
    vectors without negative parts. vectors: float32[N, D]; a zero vector is unlike everything.
    Categories are vectors too, see `one_hot`. A list of fewer than two items has diversity 0.
    """
    there = rows >= 0
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, length, out=np.zeros_like(vectors, dtype=np.float64), where=length > 0)
    x_BkD = np.where(there[..., None], unit[np.maximum(rows, 0)], 0.0)
    # sum of cos over pairs i < j = (|sum x|^2 - sum |x|^2) / 2
    both = (x_BkD.sum(axis=1) ** 2).sum(axis=1) - (x_BkD**2).sum(axis=(1, 2))
    m = there.sum(axis=1)
    pairs = m * (m - 1)
    return np.where(pairs > 0, np.clip(1 - both / np.maximum(pairs, 1), 0.0, 2.0), 0.0)


def one_hot(codes: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32[N, C] from category codes int[N]; a negative code (unknown) gives zeros.

    With these, `diversity` is the share of pairs whose categories differ.
    """
    made = np.zeros((len(codes), int(codes.max(initial=-1)) + 1), dtype=np.float32)
    known = np.flatnonzero(codes >= 0)
    made[known, codes[known]] = 1.0
    return made
