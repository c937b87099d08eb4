"""The rows of iALS improved by conjugate gradients from where they are, on one rank or several.

A row's system (ials.py) is A = X^T C X + G + p I: X the n x D matrix of what it holds, G = a V^T V the
same for all rows of its side, p its ridge. Solving it costs n D^2 + D^3; a step of conjugate gradients
only n D (Takacs, Pilaszy & Tikk 2011, "Applications of the conjugate gradient method for implicit
feedback collaborative filtering"). Few steps do if they are well preconditioned. What rows differ in is
mostly how much they hold, s = sum of c, so A is near

    M_s = s E + G + (floor + slope s) I,      E the mean of c x x^T over all pairs

where p = floor + slope s is exact for nu = 1 without weights and a line through the means otherwise.
With T that makes T^T M T = I at the mean of s and T^T (E + slope I) T = diag(e), two eigenproblems a
side invert M_s for all its rows:

    M_s^-1 = T diag(1 / (1 + (s - mean) e)) T^T

On ml-1m a step leaves a fifth to a sixth of the error, without M two thirds or more of it. Each row
takes the best step along its direction, so the objective never rises.

Shapes: B rows of this rank or of a part of it, M vectors of the other side, m of them read, D dims.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.models.ials_solve import Map
from recray.models.ranks import Ranks, total

_FLOATS = 1 << 22  # that one part of the rows reads: it shall fit the cache, and its overhead not show
_STATE = 6  # vectors that each row of a part needs beside those it holds


@dataclass(frozen=True, eq=False)
class Fixed:
    """All vectors of a side while it stands still: vectors [M, D], gram V^T V and spread E, [D, D]."""

    vectors: Tensor
    gram: Tensor
    spread: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Some neighbouring rows: `pairs` csr float32[B, m] of c, its columns the rows `reads` int32[m] of V.

    Those are copied out of V before use: what is read again and again then lies together.
    """

    rows: slice
    reads: Tensor
    pairs: Tensor


class Side:
    """This rank's rows of one side, users or items, and the vectors they have.

    `pairs`: csr float32[B, M] of c > 0; `ridge`: p of each row, float64[B]; `floor`: p of an empty one.
    """

    def __init__(
        self, pairs: Any, ridge: NDArray[np.float64], floor: float, start: Tensor, ranks: Ranks
    ) -> None:
        self.vectors = start.clone()
        self.ranks, self.floor = ranks, floor
        self.ridge = torch.from_numpy(ridge).float().unsqueeze(1)
        held = np.asarray(pairs.sum(axis=1, dtype=np.float64)).ravel()
        self.held = torch.from_numpy(held).float().unsqueeze(1)
        sums = torch.tensor([len(held), held.sum(), (ridge - floor).sum(), pairs.nnz], dtype=torch.float64)
        rows, weight, above, self.nnz = total(sums, ranks).tolist()
        self.weight = max(weight, 1e-30)
        self.mean, self.slope = self.weight / max(rows, 1), max(above, 0) / self.weight
        with warnings.catch_warnings():  # torch calls its sparse layout a beta
            warnings.simplefilter("ignore")
            self._parts = list(_parts(pairs, start.shape[1]))

    def fixed(self, each: Map = map) -> Fixed:
        """This side as the other one needs it; every rank gets the whole of it."""

        def one(part: Part) -> Tensor:
            v_BD, held_B1 = self.vectors[part.rows], self.held[part.rows]
            return torch.stack([v_BD.T @ v_BD, (v_BD * held_B1).T @ v_BD])

        dim = self.vectors.shape[1]
        grams = total(sum(each(one, self._parts), torch.zeros(2, dim, dim)), self.ranks)
        return Fixed(self.ranks.gather(self.vectors)[0], grams[0], grams[1] / self.weight)

    def descend(self, other: Fixed, unobserved: float, steps: int, each: Map = map) -> None:
        """Take `steps` of conjugate gradients in all rows, in place; `each` maps over parts of them."""
        gram_DD = unobserved * other.gram
        basis_DD, e_D = self._preconditioner(gram_DD, other.spread)

        def one(part: Part) -> None:
            rows, pairs, v_mD = part.rows, part.pairs, other.vectors.index_select(0, part.reads)
            w_BD, ridge_B1, held_B1 = self.vectors[rows], self.ridge[rows], self.held[rows]
            indptr, indices, c = pairs.crow_indices(), pairs.col_indices(), pairs.values()
            scale_BD = (1 + (held_B1 - self.mean) * e_D).clamp_(min=1e-6).reciprocal_()

            def products(p_BD: Tensor) -> tuple[Tensor, Tensor]:
                """X p, one number a pair, and (G + ridge) p, which no pair has a part in."""
                scores = torch.sparse.sampled_addmm(pairs, p_BD, v_mD.T, beta=0.0).values()
                return scores, (p_BD @ gram_DD).addcmul_(p_BD, ridge_B1)

            def near(r_BD: Tensor) -> Tensor:
                """M^-1 r"""
                return ((r_BD @ basis_DD).mul_(scale_BD)) @ basis_DD.T

            scores, rest_BD = products(w_BD)
            r_BD = _sums(indices, v_mD, indptr, (1 - scores) * c).sub_(rest_BD)
            p_BD = z_BD = near(r_BD)
            rz_B1 = _dots(r_BD, z_BD)
            for step in range(steps):
                scores, rest_BD = products(p_BD)
                weighted = scores * c
                bend_B1 = torch.segment_reduce(scores * weighted, "sum", offsets=indptr).unsqueeze(1)
                bend_B1 += _dots(p_BD, rest_BD)  # p^T A p
                size_B1 = torch.where(bend_B1 > 0, rz_B1 / bend_B1, 0)  # a row that is done stays
                w_BD.addcmul_(p_BD, size_B1)
                if step + 1 < steps:
                    ap_BD = _sums(indices, v_mD, indptr, weighted).add_(rest_BD)
                    r_BD.addcmul_(ap_BD, size_B1, value=-1)
                    z_BD = near(r_BD)
                    before_B1, rz_B1 = rz_B1, _dots(r_BD, z_BD)
                    p_BD = torch.addcmul(z_BD, p_BD, rz_B1 / before_B1.clamp_(min=1e-30))
            w_BD.masked_fill_(held_B1 == 0, 0)

        for _ in each(one, self._parts):
            pass

    def _preconditioner(self, gram_DD: Tensor, spread_DD: Tensor) -> tuple[Tensor, Tensor]:
        """T float32[D, D] and e float32[D]."""
        one_DD = torch.eye(len(gram_DD), dtype=torch.float64)
        grows_DD = spread_DD.double() + self.slope * one_DD
        middle_DD = gram_DD.double() + self.floor * one_DD + self.mean * grows_DD
        values_D, basis_DD = torch.linalg.eigh(middle_DD)
        root_DD = basis_DD * values_D.clamp(min=1e-9 * float(values_D[-1]) + 1e-30).rsqrt()
        e_D, turn_DD = torch.linalg.eigh(root_DD.T @ grows_DD @ root_DD)
        return (root_DD @ turn_DD).float(), e_D.clamp(min=0).float()


def _dots(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    return (a_BD * b_BD).sum(1, keepdim=True)


def _sums(indices: Tensor, vectors: Tensor, indptr: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each row's vectors, float32[B, D]; nothing of [pairs, D] is made."""
    return nn.functional.embedding_bag(
        indices, vectors, indptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _parts(pairs: Any, dim: int) -> Iterator[Part]:
    """The csr matrix in parts, with 32 bit indices."""
    local = np.empty(pairs.shape[1], dtype=np.int32)
    held = np.zeros(pairs.shape[1], dtype=np.bool_)
    for rows in parts(pairs.indptr, dim):
        indptr = pairs.indptr[rows.start : rows.stop + 1]
        within = slice(indptr[0], indptr[-1])
        columns = pairs.indices[within]
        held[columns] = True
        reads = np.flatnonzero(held)
        held[reads] = False
        local[reads] = np.arange(len(reads))
        made = torch.sparse_csr_tensor(
            torch.from_numpy((indptr - indptr[0]).astype(np.int32)),
            torch.from_numpy(local[columns]),
            torch.from_numpy(pairs.data[within]),
            (rows.stop - rows.start, len(reads)),
            check_invariants=False,
        )
        yield Part(rows, torch.from_numpy(reads.astype(np.int32)), made)


def parts(indptr: NDArray[Any], dim: int) -> Iterator[slice]:
    """Neighbouring rows whose vectors together are few enough, at least one row each."""
    cost = indptr.astype(np.int64) + _STATE * np.arange(len(indptr))
    start, most = 0, max(1, _FLOATS // dim)
    while start < len(indptr) - 1:
        stop = max(start + 1, int(np.searchsorted(cost, cost[start] + most, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def transposed(pairs: Any, dim: int, ranks: Ranks) -> tuple[Any, int, int]:
    """Each rank's users (csr float32[B, N]) -> its items: (csr float32[b, U], first item, one past the last).

    A rank's items are a range, cut so that all have about the same work. Pairs go to their item's rank,
    nobody sees all of them.
    """
    from scipy import sparse

    users = ranks.gather(torch.tensor([pairs.shape[0]]))[0].tolist()
    columns = pairs.tocsc()
    counts = total(torch.from_numpy(np.diff(columns.indptr).astype(np.int64)), ranks).numpy()
    work = np.concatenate([[0], np.cumsum(counts + dim // 4)])
    shares = work[-1] * np.arange(1, ranks.size) / ranks.size
    bounds = [0, *np.searchsorted(work, shares).tolist(), len(counts)]
    splits = np.diff(columns.indptr[bounds]).tolist()
    entries = columns.tocoo()
    at = np.stack([entries.col, entries.row + sum(users[: ranks.rank])], axis=1).astype(np.int32)
    places, expect = ranks.exchange(torch.from_numpy(at), splits)
    weights, _ = ranks.exchange(torch.from_numpy(entries.data), splits, expect)
    first, last = bounds[ranks.rank : ranks.rank + 2]
    item, user = places.numpy().T
    made = sparse.csr_matrix((weights.numpy(), (item - first, user)), shape=(last - first, sum(users)))
    return made, first, last
