"""The rows of iALS solved exactly, those of near length together (the systems: see ials.py).

Rotated into the eigenvectors of H^T H the part that does not depend on S_u is a diagonal d_u, so a row
with n < D items needs only an n x n system (push-through identity, X the n x D matrix of its items,
C = diag(c)):

    w_u = d_u^-1 X^T (C^-1 + X d_u^-1 X^T)^-1 1

Shapes: U rows, D dims, B rows solved together, n items of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Group = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]
Map = Callable[..., Iterator[Any]]  # as the builtin

_LEAST = 1e-5  # of the longest row's square: less on the diagonal is none, and float32 has no solution
_FLOATS = 1 << 22  # of the gathered rows, or of the systems, of one group


def solve(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    gram_DD: Tensor,
    ridge_U: Tensor,
    vectors: Tensor,
) -> Tensor:
    """Each row's w in (sum_i c_i x_i x_i^T + gram + ridge I) w = sum_i c_i x_i, float32[U, D].

    Row u has the vectors `indices[indptr[u]:indptr[u + 1]]` with positive weights c; a row without
    any gets zeros.
    """
    dim = vectors.shape[1]
    values_D, basis_DD = torch.linalg.eigh(gram_DD.double())
    values_D, basis_DD = values_D.clamp(min=0).float(), basis_DD.float()
    least = _LEAST * float(vectors.square().sum(1).max()) if len(vectors) else 0.0
    # padding points at a row of zeros behind the others; unit weights then need no product
    rotated = nn.functional.pad(vectors @ basis_DD, (0, 0, 0, 1))
    unit = bool((weights == 1).all())
    solved: Tensor = torch.zeros(len(indptr) - 1, dim)

    def one(group: Group) -> Tensor:
        rows, at, mask = group
        x_BnD = rotated[torch.from_numpy(np.where(mask, indices[at], len(vectors)))]
        s_Bn = torch.from_numpy(np.where(mask, weights[at] ** 0.5, 0).astype(np.float32))
        if not unit:
            x_BnD *= s_Bn.unsqueeze(2)
        diagonal_BD = (values_D + ridge_U[rows].unsqueeze(1)).clamp(min=least)
        solver: Callable[[Tensor, Tensor, Tensor], Tensor] = _dual if at.shape[1] < dim else _primal
        return solver(x_BnD, s_Bn, diagonal_BD)

    parts = list(groups(indptr, dim))
    with pool() if len(parts) >= 2 * torch.get_num_threads() else nullcontext(map) as each:
        for (rows, _, _), w_BD in zip(parts, each(one, parts)):
            solved[rows] = w_BD
    return torch.mm(solved, basis_DD.T)


@contextmanager
def pool() -> Iterator[Map]:
    """A `map` over as many threads as torch has, while torch itself uses one in each.

    Threads inside an operation wait for one another too often, and burn the time when cores are shared.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield map
        return
    try:
        torch.set_num_threads(1)
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as made:
            yield made.map
    finally:
        torch.set_num_threads(threads)


def _primal(x_BnD: Tensor, s_Bn: Tensor, diagonal_BD: Tensor) -> Tensor:
    """(X^T C X + d)^-1 X^T c, where x = S X has the rows times s = sqrt(c)."""
    system = x_BnD.transpose(1, 2) @ x_BnD
    system.diagonal(dim1=1, dim2=2).add_(diagonal_BD)
    return _cholesky_solve(system, (x_BnD.transpose(1, 2) @ s_Bn.unsqueeze(2)).squeeze(2))


def _dual(x_BnD: Tensor, s_Bn: Tensor, diagonal_BD: Tensor) -> Tensor:
    """The same by d^-1 X^T S (I + S X d^-1 X^T S)^-1 s; padding (s = 0) falls out."""
    scaled = x_BnD / diagonal_BD.unsqueeze(1)
    system = scaled @ x_BnD.transpose(1, 2)
    system.diagonal(dim1=1, dim2=2).add_(1)
    return (scaled.transpose(1, 2) @ _cholesky_solve(system, s_Bn).unsqueeze(2)).squeeze(2)


def _cholesky_solve(system_Bnn: Tensor, right_Bn: Tensor) -> Tensor:
    factor = torch.linalg.cholesky_ex(system_Bnn).L
    solved: Tensor = torch.cholesky_solve(right_Bn.unsqueeze(2), factor)
    return solved.squeeze(2)


def groups(indptr: NDArray[Any], dim: int) -> Iterator[Group]:
    """Rows of near length together: (rows int64[B], positions int64[B, n], which are real bool[B, n])."""
    starts, counts = indptr[:-1].astype(np.int64), np.diff(indptr).astype(np.int64)
    order = np.argsort(counts, kind="stable")
    order = order[counts[order] > 0]
    # ends of groups: a row joins while it is at most an eighth longer than its group's first
    begin = 0
    while begin < len(order):
        shortest = counts[order[begin]]
        within = np.searchsorted(counts[order], shortest + shortest // 8, side="right")
        if shortest < dim <= counts[order[within - 1]]:
            within = np.searchsorted(counts[order], dim)  # never mix the two kinds of systems
        width = int(counts[order[within - 1]])
        size = max(1, _FLOATS // (max(width, min(width, dim)) * dim))
        for start in range(begin, within, size):
            rows = order[start : min(start + size, within)]
            n = int(counts[rows[-1]])
            mask = np.arange(n) < counts[rows, None]
            yield rows, np.where(mask, starts[rows, None] + np.arange(n), 0), mask
        begin = int(within)
