"""Distillation: a student learns from what its teacher answers, position by position of the train split.

With p_k the chances that the teacher's softmax at `temperature` gives its K best items after position p,
m = sum_k p_k, s the student's scores, y what came next, Z the student's partition function over the
catalogue and h its state:

    scores    log Z - (1 - w m) s_y - w sum_k p_k s_k                 cross-entropy with soft targets
    list      (1 - w) loss + w mean_k [log(sum_{j >= k} exp s_j + R) - s_k]    the teacher's order
    states    loss + w (1 - cos(h, A h_teacher))                      representations, by a projection A

The first is Hinton et al. 2015 (arXiv 1503.02531); that no more than the best K are needed, Tang & Wang 2018
("Ranking distillation", arXiv 1809.07428). What the teacher spreads over the rest of the catalogue is left to
y: brought to a sum of 1, its K best would teach a certainty that it does not have. The second is the
likelihood of a ranked list (Xia et al. 2008, "Listwise approach to learning to rank"; its first step alone
would be ListNet). R is the mass of sampled negatives, where the student's own loss draws some (m is then the
mean over a batch); of a full softmax log Z is already in the loss, so soft targets cost only K scores more. A
is fixed: the principal axes of the teacher's items, as many as the student has dimensions.

What the teacher answers is worked out once and kept as an artefact of arrays that are mapped.

Shapes: n train interactions, P positions of a batch, K items of a list, S negatives, D student dims,
E teacher dims, N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Model
from recray.models.sequential import Sequential

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

How = Literal["scores", "list", "states"]

_BATCH = 64  # windows the teacher is asked about at a time
_SCORES = 1 << 24  # scores that are held at a time: 64 MB


@dataclass(frozen=True, eq=False)
class Taught:
    """A teacher's answers before each train interaction; where it has none, items are -1."""

    items: NDArray[np.int32]  # [n, K] best first
    scores: NDArray[np.float32]  # [n, K]
    log_z: NDArray[np.float32]  # [n] of scores / temperature, over the catalogue
    states: NDArray[np.float16]  # [n, E]
    axes: NDArray[np.float32]  # [E, E] principal axes of the teacher's items, the greatest first

    @staticmethod
    def load(folder: Path) -> Taught:
        """Map what `teach` wrote."""
        return Taught(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _FILES))


_FILES = ("items", "scores", "log_z", "states", "axes")


def check(model: Model, what: str) -> Sequential:
    """The model, where it can be the `what` ("teacher", "student"): one state a position, one table of items.

    Raises ConfigError where it cannot.
    """
    plain = isinstance(model, Sequential) and all(
        getattr(type(model), name) is getattr(Sequential, name) for name in ("vectors", "full_softmax")
    )
    if not plain:
        raise ConfigError(f"{model.name} cannot be a {what}", fix="take sasrec, gru4rec or caser")
    assert isinstance(model, Sequential)
    return model


@torch.inference_mode()
def teach(teacher: Model, data: Dataset, folder: Path, *, top: int, temperature: float = 1.0) -> None:
    """Write the answers of a trained teacher about the train split into `folder`, mapped by `Taught.load`.

    `top` is K, `temperature` the one that log_z is for. Raises ConfigError for a model that cannot teach.
    """
    model = check(teacher, "teacher").eval()
    vectors_NE = model.item_vectors().float()
    n, e = len(data.histories("train").items), vectors_NE.shape[1]
    count = min(top, len(vectors_NE))
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "items": ((n, count), np.int32), "scores": ((n, count), np.float32),
        "log_z": ((n,), np.float32), "states": ((n, e), np.float16),
    }  # fmt: skip
    made = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    made["items"][:] = -1
    chunk = max(1, _SCORES // len(vectors_NE))
    for batch in model.batches(data, batch_size=_BATCH, epoch=1, seed=0, rank=0, world=1):
        real = batch.at >= 0
        at_P, states_PE = batch.at[real], model.states(batch).float()
        for start in range(0, len(at_P), chunk):
            some = slice(start, start + chunk)
            scores_PN = states_PE[some] @ vectors_NE.T
            best = scores_PN.topk(count, dim=1)
            made["log_z"][at_P[some]] = (scores_PN / temperature).logsumexp(1).numpy()
            made["items"][at_P[some]] = best.indices.numpy()
            made["scores"][at_P[some]] = best.values.numpy()
        made["states"][at_P] = states_PE.numpy()
    for array in made.values():
        array.flush()
    axes = torch.linalg.eigh(vectors_NE.T @ vectors_NE).eigenvectors.flip(1)
    np.save(folder / "axes.npy", axes.contiguous().numpy(), allow_pickle=False)


class Lesson:
    """What a student's loss becomes under a teacher; see the formulas above. `Sequential.loss` asks it."""

    def __init__(self, taught: Taught, how: How, *, weight: float, temperature: float = 1.0) -> None:
        self.taught, self.how, self.weight, self.temperature = taught, how, weight, temperature

    def rows(self, at_P: NDArray[np.int64], targets_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """The items whose scores `loss` wants, int64[P, 1 + K]: the target, then the teacher's; or [P, 0]."""
        if self.how == "states":
            return np.empty((len(at_P), 0), np.int64)
        return np.concatenate([targets_P[:, None], self.taught.items[at_P]], axis=1).astype(np.int64)

    def loss(
        self,
        summed: Tensor,
        at_P: NDArray[np.int64],
        states_PD: Tensor,
        listed_PM: Tensor,
        others_PS: Tensor | None,
    ) -> Tensor:
        """The student's summed loss with the teacher's share.

        listed_PM: its scores of `rows`. others_PS: those of the sampled negatives less log_q, minus infinity
        where one is not to count; None where its loss is a softmax over the catalogue.
        """
        if self.how == "states":
            return summed + self.weight * self._away(at_P, states_PD).sum()
        there_PK = torch.from_numpy(self.taught.items[at_P] >= 0).to(listed_PM.device)
        target_P, best_PK = listed_PM[:, 0].float(), listed_PM[:, 1:].float()
        if self.how == "list":
            ordered_P = _likelihood(best_PK, there_PK, others_PS)
            return (1 - self.weight) * summed + self.weight * ordered_P.sum()
        chances_PK = self.taught.scores[at_P] / self.temperature - self.taught.log_z[at_P][:, None]
        wanted_PK = torch.from_numpy(np.exp(chances_PK)).to(best_PK.device) * there_PK
        soft_P, mass_P = (wanted_PK * best_PK).sum(1), wanted_PK.sum(1)
        if others_PS is None:  # all of it has the same log Z
            return summed + self.weight * (mass_P * target_P - soft_P).sum()
        z_P = torch.cat([best_PK.masked_fill(~there_PK, -torch.inf), others_PS.float()], 1).logsumexp(1)
        return (1 - self.weight * mass_P.mean()) * summed + self.weight * (mass_P * z_P - soft_P).sum()

    def _away(self, at_P: NDArray[np.int64], states_PD: Tensor) -> Tensor:
        """1 - cosine of each state and the teacher's, float32[P]."""
        dim = states_PD.shape[1]
        axes_ED = np.ascontiguousarray(self.taught.axes[:, :dim])
        theirs = torch.from_numpy(self.taught.states[at_P].astype(np.float32) @ axes_ED)
        theirs = nn.functional.pad(theirs, (0, dim - theirs.shape[1])).to(states_PD.device)
        return 1 - nn.functional.cosine_similarity(states_PD.float(), theirs, dim=1)


def _likelihood(best_PK: Tensor, there_PK: Tensor, others_PS: Tensor | None) -> Tensor:
    """Mean over a list's places of -log(its item is drawn before those after it, and the rest), [P]."""
    held_PK = best_PK.masked_fill(~there_PK, -torch.inf)
    if others_PS is not None:  # one more place behind the last
        rest_P1 = others_PS.float().logsumexp(1, keepdim=True)
        held_PK = torch.cat([held_PK, rest_P1], dim=1)
    after_PK = held_PK.flip(1).logcumsumexp(1).flip(1)[:, : best_PK.shape[1]]
    missed_PK = torch.where(there_PK, after_PK - best_PK, 0.0)
    return missed_PK.sum(1) / there_PK.sum(1).clamp(min=1)
