"""Implicit alternating least squares with frequency-scaled regularization (iALS).

Hu, Koren & Volinsky 2008; this objective is of Rendle, Krichene, Zhang & Koren 2022 ("Revisiting the
performance of iALS on item recommendation benchmarks", arXiv 2110.14037, equations 2-6). With S the
*set* of observed pairs, w_u a user's and h_i an item's vector, a = `unobserved`, r = `reg`, v = `nu`:

    L = sum_{(u,i) in S} c_ui (<w_u, h_i> - 1)^2  +  a sum_u sum_i <w_u, h_i>^2
        + r sum_u (|S_u| + a N)^v ||w_u||^2  +  r sum_i (|S_i| + a U)^v ||h_i||^2

    (sum_{i in S_u} c_ui h_i h_i^T + a H^T H + r (|S_u| + a N)^v I) w_u = sum_{i in S_u} c_ui h_i

So an observed pair counts with c_ui as a positive and also with a inside the sum over all pairs. An
item that a history repeats is one pair: c_ui = 1 however often it occurs, and |S_u| counts distinct
items. With `weighted`, c_ui is the sum of its (positive) weights instead, 1 each where there are none.

Solved exactly, rows grouped by length. Rotated into the eigenvectors of H^T H the part that does not
depend on S_u is a diagonal d_u, so a row with n < D items needs only an n x n system (push-through
identity, X the n x D matrix of its items, C = diag(c)):

    w_u = d_u^-1 X^T (C^-1 + X d_u^-1 X^T)^-1 1

Shapes: U users, N items, D dims, B rows solved together, n items of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.embeddings import DenseTable

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

Group = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]

_FLOATS = 1 << 22  # of the gathered rows, or of the systems, of one group


class IALS(Retriever):
    """Matrix factorization whose user vectors are solved from raw histories."""

    name = "ials"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 64
        sweeps: int = 12
        reg: float = 0.007
        unobserved: float = 0.3
        nu: float = 1.0
        std: float = 0.1  # of the items' first vectors, divided by sqrt(dim)
        weighted: bool = False

    config: IALS.Config

    def __init__(self, catalogue: Catalogue, config: IALS.Config) -> None:
        super().__init__(catalogue, config)
        if config.dim < 1 or config.sweeps < 1:
            raise ConfigError("dim and sweeps must be at least 1", where="options")
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim, std=config.std * config.dim**-0.5)
        self.gram: Tensor  # a H^T H of the trained items, float32[D, D]
        self.register_buffer("gram", torch.zeros(config.dim, config.dim))

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        c = self.config
        by_user = self._pairs(data.histories("train"))
        by_item = by_user.T.tocsr()
        noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((self.n_items, c.dim)))
        items_ND = noise.float() * (c.std * c.dim**-0.5)
        users_UD = torch.zeros(by_user.shape[0], c.dim)
        for _ in range(c.sweeps):
            users_UD = self._solve(by_user, c.unobserved * items_ND.T @ items_ND, self.n_items, items_ND)
            items_ND = self._solve(by_item, c.unobserved * users_UD.T @ users_UD, len(users_UD), users_UD)
        self.tables["item"].weight.data.copy_(items_ND)  # type: ignore[operator]
        self.gram.copy_(c.unobserved * items_ND.T @ items_ND)
        return {"pairs": float(by_user.nnz)}

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        """Fold raw histories in: the exact minimizer for each, given the items. float32[B, 1, D]."""
        pairs = self._pairs(histories.known())
        used, pairs.indices = np.unique(pairs.indices, return_inverse=True)
        rows_nD = self.tables["item"](torch.from_numpy(used.astype(np.int64)).to(self.device))
        return self._solve(pairs, self.gram, self.n_items, rows_nD.cpu()).unsqueeze(1).to(self.device)

    def _pairs(self, histories: Histories) -> Any:
        """csr float32[B, N] of c_ui: distinct pairs."""
        pairs = histories.to_csr(self.n_items, weighted=self.config.weighted)
        if not self.config.weighted:
            pairs.data[:] = 1
            return pairs
        pairs.data = np.maximum(pairs.data, 0)
        pairs.eliminate_zeros()
        return pairs

    def _solve(self, pairs: Any, gram_DD: Tensor, others: int, vectors: Tensor) -> Tensor:
        c = self.config
        counts = np.diff(pairs.indptr).astype(np.float64)
        ridge = torch.from_numpy(c.reg * (counts + c.unobserved * others) ** c.nu).float()
        return solve(pairs.indptr, pairs.indices, pairs.data, gram_DD.cpu(), ridge, vectors)


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
        diagonal_BD = values_D + ridge_U[rows].unsqueeze(1)
        solver: Callable[[Tensor, Tensor, Tensor], Tensor] = _dual if at.shape[1] < dim else _primal
        return solver(x_BnD, s_Bn, diagonal_BD)

    parts = list(groups(indptr, dim))
    for (rows, _, _), w_BD in zip(parts, _each(one, parts)):
        solved[rows] = w_BD
    return torch.mm(solved, basis_DD.T)


def _each(work: Callable[[Group], Tensor], parts: list[Group]) -> Iterator[Tensor]:
    """Do all parts, a thread each: threads inside an operation wait for one another too often."""
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) < 2 * threads:
        yield from map(work, parts)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, parts)
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
