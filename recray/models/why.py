"""Why a model gave an item its score: what each part of what it was told adds.

    score(item | history) = base + sum over reasons of weight            models that are sums
    weight(i) = score(item | history) - score(item | history without i)  all others

The second is occlusion (Zeiler & Fergus 2014, arXiv 1311.2901) of one item at a time: exact about
what it says, whatever the model; its weights need not sum to the score. A history's repeated item is one
reason.

Shapes: L reasons, B histories asked at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories

if TYPE_CHECKING:
    from recray.models.base import Ranker, Retriever

Kind = Literal[
    "history", "neighbour"
]  # an item the user took; a user of the training log who is like this one

MOST = 200  # the newest items of a history that are left out in turn
_CELLS = 1 << 24  # scores of a model without vectors that are held at a time


@dataclass(frozen=True, eq=False)
class Reasons:
    """The score of one item and what it is made of, from the strongest reason to the weakest.

    rows int64[L] (item rows, or numbers of training users, by `kind`), weights float64[L]. Where
    `additive` holds, base + sum(weights) is the score; else a weight is what the score loses without it.
    """

    score: float
    base: float
    kind: Kind
    rows: NDArray[np.int64]
    weights: NDArray[np.float64]
    additive: bool

    @staticmethod
    def of(
        score: float,
        base: float,
        rows: NDArray[Any],
        weights: NDArray[Any],
        *,
        kind: Kind = "history",
        additive: bool = True,
    ) -> Reasons:
        """Reasons in their order, the weights of equal rows added up."""
        found, at = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        summed = np.bincount(at, np.asarray(weights, np.float64), len(found)).astype(np.float64)
        order = np.lexsort((found, -summed))
        return Reasons(float(score), float(base), kind, found[order], summed[order], additive)


def why(
    model: Retriever | Ranker,
    history: Histories,
    row: int,
    context: Mapping[str, NDArray[np.int32]] | None = None,
) -> Reasons:
    """Why `model` scores item `row` as it does for one history (a batch of one).

    Of models that are no sums only the newest MOST items of the history are weighed.
    """
    history = history.known()
    own = model.reasons(history, row)
    return _occluded(model, history, row, context or {}) if own is None else own


def without_each(history: Histories, rows: NDArray[np.int64]) -> Histories:
    """len(rows) histories: the one that is given, each time without all of one item."""
    keep_LN = history.items[None, :] != rows[:, None]
    at = np.nonzero(keep_LN)[1]
    offsets = np.concatenate([[0], np.cumsum(keep_LN.sum(axis=1))]).astype(np.int64)
    return Histories(
        history.items[at],
        offsets,
        None if history.weights is None else history.weights[at],
        None if history.times is None else history.times[at],
    )


@torch.inference_mode()
def _occluded(
    model: Retriever | Ranker, history: Histories, row: int, context: Mapping[str, NDArray[np.int32]]
) -> Reasons:
    rows = np.unique(history.items[-MOST:]).astype(np.int64)
    score = _scores(model, history, row, context)[0]
    less = _scores(model, without_each(history, rows), row, context)
    return Reasons.of(score, score, rows, score - less, additive=False)


def _scores(
    model: Retriever | Ranker, histories: Histories, row: int, context: Mapping[str, NDArray[np.int32]]
) -> NDArray[np.float64]:
    """float64[B]: the item's score for each history."""
    b = len(histories)
    if model.stage == "ranker":
        asked = {name: np.repeat(value, b) for name, value in context.items()}
        return model.score(histories, np.full((b, 1), row, np.int64), asked)[:, 0].double().cpu().numpy()
    if model.has_vectors:
        return (model.encode(histories) @ _vector(model, row)).amax(dim=1).double().cpu().numpy()
    step = max(1, _CELLS // model.n_items)
    parts = [
        model.score(histories.take(slice(at, at + step)))[:, row].double().cpu().numpy()
        for at in range(0, b, step)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def _vector(model: Retriever, row: int) -> Tensor:
    """float32[D] of one item, without the whole catalogue where a table holds them."""
    from recray.models.base import Retriever

    if "item" in model.tables and type(model).item_vectors is Retriever.item_vectors:
        found: Tensor = model.tables["item"](torch.tensor([row], device=model.device))[0]
        return found
    return model.item_vectors()[row]


def spread(scores: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and deviation, as a score is scaled by them."""
    held = scores.astype(np.float64)
    return (float(held.mean()), float(held.std())) if len(held) else (0.0, 0.0)


def together(parts: Sequence[tuple[float, Reasons, float, float]]) -> Reasons:
    """Reasons of a mix: of each part its share, its reasons, and the mean and deviation it is scaled by.

    Neighbours stand for items of a history in no way: only the reasons of the first kind are kept.
    """
    score, base = 0.0, 0.0
    rows, weights = [], []
    kind = parts[0][1].kind
    for share, part, mean, spread in parts:
        scale = share / spread if spread > 1e-12 else 0.0
        score += scale * (part.score - mean)
        base += scale * (part.base - mean)
        if part.kind == kind:
            rows.append(part.rows)
            weights.append(part.weights * scale)
        else:
            base += scale * float(part.weights.sum())
    additive = all(part.additive for _, part, _, _ in parts)
    return Reasons.of(
        score, base, np.concatenate(rows), np.concatenate(weights), kind=kind, additive=additive
    )
