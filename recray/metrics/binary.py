"""How well logits tell what was taken from what was not. n examples; both arrays of n, in the same order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

NAMES = ("auc", "logloss")


def auc(labels: ArrayLike, logits: ArrayLike) -> float:
    """The chance that a positive is above a negative, ties half (Hanley & McNeil 1982): 1 is perfect.

    labels: bool[n]. Raises ValueError where there is no positive or no negative, and for values that
    are not finite.
    """
    y, x = _checked(labels, logits)
    positives = int(y.sum())
    pairs = positives * (len(y) - positives)
    if not pairs:
        raise ValueError("an AUC needs positives and negatives")
    # a positive is above as many negatives as its rank says, less the positives below it
    _, at, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[at]  # from 1; equal values share their mean
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / pairs)


def losses(labels: ArrayLike, logits: ArrayLike) -> NDArray[np.float64]:
    """Cross-entropy of each example in nats, float64[n]: log(1 + exp(-logit)) of a positive."""
    y, x = _checked(labels, logits)
    return np.logaddexp(0.0, np.where(y, -x, x))


def logloss(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean cross-entropy in nats; 0 is perfect."""
    return float(losses(labels, logits).mean())


def _checked(labels: ArrayLike, logits: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    y, x = np.asarray(labels, dtype=bool), np.asarray(logits, dtype=np.float64)
    if y.shape != x.shape or y.ndim != 1:
        raise ValueError(f"logits of shape {x.shape} for labels of shape {y.shape}")
    if not np.isfinite(x).all():
        raise ValueError("a logit is not a finite number")
    return y, x
