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

Training improves all users, then all items, by a few steps of conjugate gradients each (ials_descent.py),
on one rank or on several that share the rows. A user who asks is solved exactly (ials_solve.py).

Shapes: U users, N items, D dims, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.embeddings import DenseTable
from recray.models.ials_descent import Side, transposed
from recray.models.ials_solve import pool, solve
from recray.models.ranks import Alone, Ranks
from recray.models.why import Reasons

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class IALS(Retriever):
    """Matrix factorization whose user vectors are solved from raw histories."""

    name = "ials"
    gradient = False
    shares_fit = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 64
        sweeps: int = 12
        steps: int = 2  # of conjugate gradients, of users and of items a sweep
        reg: float = 0.007
        unobserved: float = 0.3
        nu: float = 1.0
        std: float = 0.1  # of the items' first vectors, divided by sqrt(dim)
        weighted: bool = False

    config: IALS.Config

    def __init__(self, catalogue: Catalogue, config: IALS.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.dim, config.sweeps, config.steps) < 1:
            raise ConfigError("dim, sweeps and steps must be at least 1", where="options")
        if min(config.reg, config.unobserved, config.std) < 0:
            raise ConfigError("reg, unobserved and std must be at least 0", where="options")
        if not 0 <= config.nu <= 10:  # it is an exponent of counts: far out it overflows
            raise ConfigError(f"options.nu is {config.nu}", fix="it must be within 0 and 10")
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim, std=config.std * config.dim**-0.5)
        self.gram: Tensor  # a H^T H of the trained items, float32[D, D]
        self.register_buffer("gram", torch.zeros(config.dim, config.dim))

    def fit(self, data: Dataset, *, seed: int = 0, ranks: Ranks | None = None) -> Mapping[str, float]:
        """Learn the items. Of several `ranks` each reads its part of the users, all get the same model."""
        c, ranks = self.config, ranks or Alone()
        users, items = self._sides(data, seed, ranks)
        with pool() as each:
            for _ in range(c.sweeps):
                users.descend(items.fixed(each), c.unobserved, c.steps, each)
                items.descend(users.fixed(each), c.unobserved, c.steps, each)
            learned = items.fixed(each)
        self.tables["item"].weight.data.copy_(learned.vectors)  # type: ignore[operator]
        self.gram.copy_(c.unobserved * learned.gram)
        return {"pairs": items.nnz}

    def _sides(self, data: Dataset, seed: int, ranks: Ranks) -> tuple[Side, Side]:
        """This rank's users, at zero, and its items, at noise."""
        c = self.config
        part = None if ranks.size == 1 else (ranks.rank, ranks.size)
        by_user = self._pairs(data.histories("train", part))
        by_item, first, last = transposed(by_user, c.dim, ranks)
        noise = np.random.default_rng(seed).standard_normal((self.n_items, c.dim), dtype=np.float32)
        starts = (
            torch.zeros(by_user.shape[0], c.dim),
            torch.from_numpy(noise[first:last] * (c.std * c.dim**-0.5)),
        )
        users, items = (
            Side(pairs, *self._ridge(pairs), start, ranks) for pairs, start in zip((by_user, by_item), starts)
        )
        return users, items

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        """Fold raw histories in: the exact minimizer for each, given the items. float32[B, 1, D]."""
        pairs = self._pairs(histories.known())
        ridge, _ = self._ridge(pairs)
        used, at = np.unique(pairs.indices, return_inverse=True)
        rows_nD = self.tables["item"](torch.from_numpy(used.astype(np.int64)).to(self.device))
        gram, ridge_B = self.gram.cpu(), torch.from_numpy(ridge).float()
        solved = solve(pairs.indptr, at, pairs.data, gram, ridge_B, rows_nD.cpu())
        return solved.unsqueeze(1).to(self.device)

    @torch.inference_mode()
    def reasons(self, history: Histories, row: int) -> Reasons:
        """Each item of the history adds c_i <A^-1 h_row, h_i>, A the matrix that w_u is solved with
        (Hu et al. 2008, section 5)."""
        pairs = self._pairs(history.known())
        ridge, _ = self._ridge(pairs)
        rows = torch.from_numpy(np.append(pairs.indices, row).astype(np.int64)).to(self.device)
        vectors_LD = self.tables["item"](rows).double().cpu()
        x_LD, h_D, c_L = vectors_LD[:-1], vectors_LD[-1], torch.from_numpy(pairs.data).double()
        system_DD = (x_LD * c_L.unsqueeze(1)).T @ x_LD + self.gram.double().cpu()
        system_DD.diagonal().add_(float(ridge[0]))
        weights = (c_L * (x_LD @ torch.linalg.solve(system_DD, h_D))).numpy()
        return Reasons.of(weights.sum(), 0.0, pairs.indices, weights)

    def _pairs(self, histories: Histories) -> Any:
        """csr float32[B, N] of c_ui: distinct pairs."""
        pairs = histories.to_csr(self.n_items, weighted=self.config.weighted)
        if not self.config.weighted:
            pairs.data[:] = 1
            return pairs
        pairs.data = np.maximum(pairs.data, 0)
        pairs.eliminate_zeros()
        return pairs

    def _ridge(self, pairs: Any) -> tuple[NDArray[np.float64], float]:
        """What each row of a csr matrix adds to its diagonal, float64[B], and what an empty row adds."""
        c = self.config
        unseen = c.unobserved * pairs.shape[1]
        return c.reg * (np.diff(pairs.indptr) + unseen) ** c.nu, c.reg * unseen**c.nu
