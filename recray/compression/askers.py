"""Codes chosen for those who ask: what a rounded row does to the scores of users, not to its own floats.

Of a row h and its decoded form h + e, with S the users who took the item or would be shown it (`of`), U all
users, q_u their vectors:

    wrong(e) = sum_{u in S} (q_u . e)^2 + every * sum_{u in U} (q_u . e)^2 = e^T A e
    A        = sum_{u in S} q_u q_u^T + every * Q^T Q + least * I

With those who took it alone it is the part of implicit ALS's loss (Hu, Koren & Volinsky 2008) that one item's
row decides, around its own optimum, with `every` for the weight of what is not observed; of any other model
it says which errors users see. Codes are then chosen in turns, each the best with all others as they are
(coordinate descent, as Babenko & Lempitsky 2014 encode and GPTQ, Frantar et al. 2023, rounds): `wrong` never
grows, and what one part of a row got wrong the next ones make up for.

Shapes: U users, N items of D floats, B rows at a time, M parts of W floats, K codes a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EVERY = 0.005  # what a user outside S counts, of one in it
SHOWN = 50  # items of a user's list
LEAST = 1e-4  # of A's mean diagonal over all users, so that it has no direction without a weight
TOOK = 4096  # users of an item that are asked, drawn from all of S; they count for all
CELLS = 1 << 24  # floats of A that are held at a time: 64 MiB


@dataclass(frozen=True, eq=False)
class Askers:
    """Vectors float32[U, D], and S of each of N items: users[ends[i] : ends[i + 1]]."""

    vectors: Tensor
    ends: NDArray[np.int64]
    users: NDArray[np.int64]

    @staticmethod
    def of(
        vectors_UD: Tensor,
        offsets: NDArray[np.int64],
        items: NDArray[Any],
        count: int,
        table_ND: Tensor | None = None,
    ) -> Askers:
        """From histories by user: user u took items[offsets[u] : offsets[u + 1]], rows below `count`.

        With the items' vectors also the SHOWN best of the others for each user: lists are made of them, and
        what is taken is left out of lists.
        """
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        if table_ND is not None:
            viewer, listed = _shown(vectors_UD.float(), offsets, items, table_ND.float())
            owner, items = np.concatenate([owner, viewer]), np.concatenate([items, listed])
        order = np.argsort(items, kind="stable")
        ends = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=count))])
        return Askers(vectors_UD.float(), ends, owner[order])

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def block(self) -> int:
        """Rows whose A are held at a time."""
        return max(1, CELLS // max(self.dim, 1) ** 2)

    def take(self, rows: Tensor) -> Askers:
        """Of some items only, in that order; the users stay."""
        at = rows.numpy()
        parts = [self.users[self.ends[i] : self.ends[i + 1]] for i in at]
        ends = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        made = Askers(self.vectors, ends, np.concatenate(parts) if parts else self.users[:0])
        made.__dict__["_shared"] = self._shared
        return made

    def along(self, axes_Dr: Tensor) -> Askers:
        """For rows that are told by their r numbers along these axes."""
        return Askers(self.vectors @ axes_Dr, self.ends, self.users)

    def metric(self, start: int, stop: int) -> Tensor:
        """A of the items from `start` to `stop`, float32[B, D, D]."""
        made_BDD = self._shared.expand(stop - start, -1, -1).clone()
        for b, i in enumerate(range(start, stop)):
            took = self.users[self.ends[i] : self.ends[i + 1]]
            if not len(took):
                continue
            some = took if len(took) <= TOOK else took[np.linspace(0, len(took) - 1, TOOK).astype(np.int64)]
            vectors_SD = self.vectors[torch.from_numpy(some)]
            made_BDD[b].addmm_(vectors_SD.T, vectors_SD, alpha=len(took) / len(some))
        return made_BDD

    @cached_property
    def _shared(self) -> Tensor:
        """What all items' A have in common."""
        gram_DD = EVERY * (self.vectors.T @ self.vectors)
        mean = gram_DD.diagonal().mean().clamp(min=1e-30) if self.dim else torch.ones(())
        return gram_DD + LEAST * mean * torch.eye(self.dim)


def _shown(
    vectors_UD: Tensor, offsets: NDArray[np.int64], items: NDArray[Any], table_ND: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(user, item) of the SHOWN best of each user by inner product, without those that she took."""
    viewers, listed = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    step = max(1, CELLS // max(len(table_ND), 1))
    for start in range(0, len(vectors_UD), step):
        scores_BN = vectors_UD[start : start + step] @ table_ND.T
        ends = offsets[start : start + step + 1]
        taker, taken = np.repeat(np.arange(len(scores_BN)), np.diff(ends)), items[ends[0] : ends[-1]]
        scores_BN[torch.from_numpy(taker), torch.from_numpy(taken.astype(np.int64))] = -torch.inf
        best = scores_BN.topk(min(SHOWN, len(table_ND)), dim=1)
        at, place = (best.values > -torch.inf).nonzero(as_tuple=True)
        viewers.append(at.numpy() + start)
        listed.append(best.indices[at, place].numpy())
    return np.concatenate(viewers), np.concatenate(listed)


def wrong(error_BD: Tensor, metric_BDD: Tensor) -> Tensor:
    """e^T A e of each row, float32[B]."""
    return (torch.bmm(metric_BDD, error_BD.unsqueeze(2)).squeeze(2) * error_BD).sum(dim=1)


def best_parts(
    x_BD: Tensor, metric_BDD: Tensor, book_MKW: Tensor, code_BM: Tensor, longer_B: Tensor
) -> Tensor:
    """Codes int64[B, M] of rows that are decoded as longer[b] * book[m, code]; x has M * W floats.

    Each part in turn takes the code with which `wrong` is least.
    """
    parts, codes, wide = book_MKW.shape
    code_BM = code_BM.clone()
    square_MKW = (book_MKW.unsqueeze(3) * book_MKW.unsqueeze(2)).view(parts, codes, wide * wide)
    held_BMW = torch.stack([book_MKW[m][code_BM[:, m]] for m in range(parts)], dim=1)
    held_BD = held_BMW.reshape(len(x_BD), parts * wide) * longer_B.unsqueeze(1)
    slope_BD = torch.bmm(metric_BDD, (held_BD - x_BD).unsqueeze(2)).squeeze(2)
    for m in range(parts):
        at = slice(m * wide, (m + 1) * wide)
        own_BWW = metric_BDD[:, at, at]
        now_BW = held_BD[:, at]
        line_BW = slope_BD[:, at] - torch.bmm(own_BWW, now_BW.unsqueeze(2)).squeeze(2)
        square_BX = own_BWW.reshape(len(x_BD), -1) * longer_B.square().unsqueeze(1)
        cost_BK = square_BX @ square_MKW[m].T
        cost_BK.addmm_(line_BW * longer_B.unsqueeze(1), book_MKW[m].T, alpha=2.0)
        code_BM[:, m] = cost_BK.argmin(dim=1)
        step_BW = book_MKW[m][code_BM[:, m]] * longer_B.unsqueeze(1) - now_BW
        slope_BD += torch.bmm(metric_BDD[:, :, at], step_BW.unsqueeze(2)).squeeze(2)
        held_BD[:, at] += step_BW
    return code_BM


def best_length(x_BD: Tensor, metric_BDD: Tensor, plain_BD: Tensor) -> Tensor:
    """What each decoded row is to be multiplied by, float32[B]: 1 where it is zero."""
    turned_BD = torch.bmm(metric_BDD, plain_BD.unsqueeze(2)).squeeze(2)
    square_B = (turned_BD * plain_BD).sum(dim=1)
    return torch.where(square_B > 0, (turned_BD * x_BD).sum(dim=1) / square_B.clamp(min=1e-30), 1.0)


def best_levels(
    x_BD: Tensor, metric_BDD: Tensor, level_BD: Tensor, step_BD: Tensor, most: int, sweeps: int
) -> Tensor:
    """Whole levels float32[B, D] of rows decoded as level * step: the one below or the one above x / step."""
    low_BD = (x_BD / step_BD).floor().clamp(-most, most)
    high_BD = (x_BD / step_BD).ceil().clamp(-most, most)
    level_BD = level_BD.clone()
    slope_BD = torch.bmm(metric_BDD, (level_BD * step_BD - x_BD).unsqueeze(2)).squeeze(2)
    weight_BD = metric_BDD.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        for d in range(x_BD.shape[1]):
            step_B, now_B = step_BD[:, d], level_BD[:, d]
            wanted_B = now_B - slope_BD[:, d] / (weight_BD[:, d] * step_B)
            middle_B = (low_BD[:, d] + high_BD[:, d]) / 2
            new_B = torch.where(wanted_B > middle_B, high_BD[:, d], low_BD[:, d])
            slope_BD += metric_BDD[:, d] * ((new_B - now_B) * step_B).unsqueeze(1)
            level_BD[:, d] = new_B
    return level_BD
