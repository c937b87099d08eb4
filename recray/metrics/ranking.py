"""How well a list finds the held-out items of its user.

Shapes: B users, k places of a list (best first; -1 where there is no item). T_b is the set of user b's
targets, all equally relevant; rel_bj is 1 where place j (counted from 1) holds a target. An item that
a list holds twice counts at its first place only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from recray.data.sequences import Histories

NAMES = ("ndcg", "recall", "precision", "f1", "hr", "mrr", "map")

Values = Mapping[str, NDArray[np.float64]]  # "ndcg@10" -> one value a user, float64[B]


def ranking(
    rows: NDArray[np.int64], targets: Histories, ks: Sequence[int] = (10, 20)
) -> dict[str, NDArray[np.float64]]:
    """All ranking metrics at each cut, `{"ndcg@10": float64[B], ...}`, every value inside [0, 1].

    rows: int64[B, W], the lists; a cut beyond W sees the missing places as empty.
    targets: B ragged sets of item rows, none of them empty (ValueError otherwise).

    - precision@k = hits in the first k / k, recall@k = hits / |T|, f1@k their harmonic mean
    - hr@k = 1 when there is any hit (hit rate)
    - mrr@k = 1 / place of the first hit, 0 when it lies beyond k (Voorhees 1999)
    - map@k = sum over hits of the precision at their place / min(|T|, k)
    - ndcg@k = DCG / the DCG of an ideal list, DCG = sum of rel_j / log2(1 + j)
      (Järvelin & Kekäläinen 2002 with binary relevance)
    """
    hit_BW, sizes_B = hits(rows, targets)
    found: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        if k < 1:
            raise ValueError(f"a cut of {k} places")
        found.update({f"{name}@{k}": values for name, values in _at(hit_BW, sizes_B, k).items()})
    return found


def hits(rows: NDArray[np.int64], targets: Histories) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(bool[B, W] whether a place holds a target not seen above it, int64[B] number of targets)."""
    b, width = rows.shape
    if len(targets) != b:
        raise ValueError(f"{b} lists for {len(targets)} users")
    span = max(int(rows.max(initial=0)), int(targets.items.max(initial=0))) + 1
    owner = np.repeat(np.arange(b, dtype=np.int64), targets.lengths)
    wanted = np.unique(owner * span + targets.items)
    sizes = np.bincount(wanted // span, minlength=b).astype(np.int64)
    if b and sizes.min() == 0:
        raise ValueError(f"user {int(sizes.argmin())} of the batch has no target")
    keys = np.arange(b, dtype=np.int64)[:, None] * span + rows
    hit = (rows >= 0) & np.isin(keys, wanted, assume_unique=False)
    order = np.argsort(rows, axis=1, kind="stable")  # equal items become neighbours, first place first
    ordered = np.take_along_axis(rows, order, axis=1)
    again = np.zeros((b, width), dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return hit & ~again, sizes


def _at(hit_BW: NDArray[np.bool_], sizes_B: NDArray[np.int64], k: int) -> Values:
    rel_BJ = hit_BW[:, :k].astype(np.float64)
    place_J = np.arange(1, rel_BJ.shape[1] + 1)
    count_B = rel_BJ.sum(axis=1)
    best_B = np.minimum(sizes_B, k)  # hits an ideal list has
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, k + 2)))])
    any_B = count_B > 0
    first_B = np.where(any_B, rel_BJ.argmax(axis=1) + 1, 1) if rel_BJ.shape[1] else np.ones(len(count_B))
    precision, recall = count_B / k, count_B / sizes_B
    return {
        "ndcg": (rel_BJ / np.log2(place_J + 1)).sum(axis=1) / ideal[best_B],
        "recall": recall,
        "precision": precision,
        "f1": 2 * precision * recall / np.where(any_B, precision + recall, 1),
        "hr": any_B.astype(np.float64),
        "mrr": any_B / first_B,
        "map": (rel_BJ * rel_BJ.cumsum(axis=1) / place_J).sum(axis=1) / best_B,
    }
