"""What models that predict ratings share: a history as ratings, and the baseline they are measured from.

    b_uj = mean + b_u + b_j          (Koren 2010, "Factor in the neighbors", equation 1)

The biases minimize the squared error of b_uj over the training ratings, plus reg_user and reg_item times
their squares; in turns each is an average that is shrunk towards zero. A rating is an interaction's weight.

Shapes: B users, N items, n ratings.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories
from recray.errors import InputError

REG_USER, REG_ITEM, SWEEPS = 15.0, 10.0, 10


@runtime_checkable
class PredictsRatings(Protocol):
    """A model that can say how a user would rate an item."""

    @property
    def predicts(self) -> bool:
        """Whether its options make it one that does."""

    def predict(self, histories: Histories, items: Histories) -> NDArray[np.float64]:
        """A rating for each of `items` (B ragged lists of rows), float64[n], in their order."""


def ratings_of(histories: Histories, n_items: int) -> Any:
    """csr float32[B, N] of a history's ratings, the mean of those it repeats; unknown items left out.

    A rating of 0 stays in it. A history without weights has no ratings.
    """
    known = histories.known()
    if known.weights is None:
        known = Histories(known.items[:0], np.zeros_like(known.offsets), known.items[:0].astype(np.float32))
    made, counts = known.to_csr(n_items, weighted=True), known.to_csr(n_items)
    made.data /= counts.data  # the same pattern: both sum what is repeated
    return made


def check_differ(ratings: Any) -> None:
    """Raise InputError where a csr of ratings says nothing: there is none, or all are equal."""
    if not len(ratings.data) or (ratings.data == ratings.data[0]).all():
        raise InputError(
            "all ratings are equal, or there are none: nothing tells what is liked",
            where="the train split",
            fix="prepare the log with --columns weight=NAME, or train item-knn or user-knn",
        )


def item_biases(ratings: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(mean, lowest and highest rating float32[3], b_j float32[N]) of a csr float32[U, N]."""
    users = np.repeat(np.arange(ratings.shape[0]), np.diff(ratings.indptr))
    n_items = ratings.shape[1]
    if not len(ratings.data):
        return np.zeros(3, np.float32), np.zeros(n_items, np.float32)
    mean = float(ratings.data.mean())
    counts = np.bincount(ratings.indices, minlength=n_items)
    b_N = np.zeros(n_items)
    for _ in range(SWEEPS):
        b_U = user_biases(ratings, mean, b_N)
        left = ratings.data - mean - b_U[users]
        b_N = np.bincount(ratings.indices, left, minlength=n_items) / (REG_ITEM + counts)
    scale = np.array([mean, ratings.data.min(), ratings.data.max()], np.float32)
    return scale, b_N.astype(np.float32)


def user_biases(ratings: Any, mean: float, b_N: NDArray[Any]) -> NDArray[np.float64]:
    """b_u of each row of a csr float32[B, N], float64[B]; 0 for a row without ratings."""
    users = np.repeat(np.arange(ratings.shape[0]), np.diff(ratings.indptr))
    left = ratings.data - mean - b_N[ratings.indices]
    made = np.bincount(users, left, minlength=ratings.shape[0]) / (REG_USER + np.diff(ratings.indptr))
    return np.asarray(made, np.float64)


def deviations(ratings: Any, scale: Tensor, b_N: Tensor) -> tuple[Any, NDArray[np.float64]]:
    """(csr float32[B, N] of r_uj - b_uj at the given ratings, b_u float64[B])."""
    mean, biases = float(scale[0]), b_N.cpu().numpy()
    b_B = user_biases(ratings, mean, biases)
    made = ratings.copy()
    users = np.repeat(np.arange(ratings.shape[0]), np.diff(ratings.indptr))
    made.data = (ratings.data - mean - biases[ratings.indices] - b_B[users]).astype(np.float32)
    return made, b_B
