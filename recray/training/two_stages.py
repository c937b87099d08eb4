"""Two stages together: a ranker learns on what its retriever proposes, and how far to trust each is measured.

Before every interaction of the train split the retriever is asked, as it is when it serves, for its
candidates to the history up to there; what the user took at any time is left out. The ranker tells the
interaction apart from these (`models/rankers.py`). The retriever's score is not among the ranker's
inputs: it has seen the very interactions that the ranker learns from, so it looks better there than it
is, and a ranker would learn to repeat it. What it is worth is measured on the validation split, which
neither has learned from: `Recommender.rank` adds the two scores, and of some shares the best is kept.
A share of 1 is the retriever alone, so together they are no worse there than it is.

Shapes: n train interactions, C candidates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recray import progress
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.evaluation import evaluate, recommender_top_k
from recray.manifest import Artefact
from recray.models import model_class
from recray.models.base import Ranker, Retriever
from recray.models.saved import load_model
from recray.recipes import Recipe, Train
from recray.recommender import Recommender

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

NEWEST = 64  # of a user's interactions the newest so many have candidates
SHARES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the retriever, that are tried
_ITEMS = 1 << 18  # of histories that are asked about at a time
_MINED = "mined.npy"


def first_stage(checkpoint: Artefact, dataset: Dataset, recipe: Recipe, *, alone: bool) -> Retriever:
    """The retriever of a checkpoint, that a recipe's ranker can be trained behind on this dataset.

    Raises ConfigError where one is not what it should be, where the retriever knows another dataset, where
    the ranker learns from labels and so from no candidates, and where it is not trained in one process
    alone: what is mined lies on this machine.
    """
    kind = model_class(recipe.model)
    if not alone:
        raise ConfigError("a retriever is given, and workers", fix="train the ranker with workers=0")
    if not issubclass(kind, Ranker):
        raise ConfigError(f"{kind.name} is not a ranker", fix="train it without --retriever")
    if recipe.options.get("loss") == "labels":
        raise ConfigError(
            "a retriever is given, and options.loss=labels learns from no candidates",
            fix="train without --retriever, or choose another loss",
        )
    parent = checkpoint.manifest.parents.get("dataset", {})
    if parent.get("hash") != dataset.artefact.hash:
        raise ConfigError(
            "was trained on another dataset", where=checkpoint.place, fix="train both on the same"
        )
    model = load_model(checkpoint)
    if not isinstance(model, Retriever):
        raise ConfigError(f"{model.name} is not a retriever", where=checkpoint.place)
    return model


def mine(retriever: Retriever, dataset: Dataset, count: int, folder: Path) -> NDArray[np.int32]:
    """int32[n, C] for `Ranker.mined`, mapped from a file in `folder`; worked out where it is not there.

    The newest `NEWEST` of each user's interactions but the first have candidates, the others 0s, which
    a file system need not store.
    """
    done = folder / _MINED
    if not done.exists():
        log = dataset.histories("train")
        aside = folder / f".{_MINED}"
        made = np.lib.format.open_memmap(
            aside, mode="w+", dtype=np.int32, shape=(len(log.items), min(count, retriever.n_items))
        )
        asked = _asked(log)
        lengths = log.lengths[_owners(log, asked)]
        asked = asked[np.argsort(lengths, kind="stable")]  # padding is to the longest that are asked at once
        ends = np.flatnonzero(np.diff(np.cumsum(np.sort(lengths)) // _ITEMS, append=-1)) + 1
        recommender = Recommender(retriever)
        with progress.bar("candidates", len(asked), "example") as bar:
            for at in np.split(asked, ends[:-1]):
                made[at] = _candidates(recommender, log, at, made.shape[1])
                bar.update(len(at))
        made.flush()
        aside.rename(done)
    mapped: NDArray[np.int32] = np.load(done, mmap_mode="r")
    return mapped


def choose_share(
    retriever: Retriever, ranker: Ranker, dataset: Dataset, count: int, train: Train
) -> dict[str, Any]:
    """How both do together on the validation split, for a report: candidates, the best blend, the values.

    Without a validation split only `candidates`.
    """
    report: dict[str, Any] = {"candidates": count}
    if not dataset.has_split("valid"):
        return report
    cases = dataset.cases("valid", train.valid_users or None, train.seed)
    values = {}
    for share in SHARES:
        both = Recommender(retriever, ranker=ranker, candidates=count, blend=share)
        values[share] = evaluate(recommender_top_k(both), cases, ks=(10,)).means["ndcg@10"]
    best = max(values, key=lambda share: (values[share], share))
    progress.say(
        f"together with the retriever: ndcg@10 {values[best]:.4f} on validation, where it has {best:.0%} of "
        f"the score; alone {values[1.0]:.4f}"
    )
    tried = {f"{share:g}": round(value, 6) for share, value in values.items()}
    return {**report, "blend": best, "metric": "ndcg@10", "valid": tried}


def _asked(log: Histories) -> NDArray[np.int64]:
    """Places int64[m] of the interactions that have candidates, ascending."""
    at = np.arange(len(log.items))
    owner = _owners(log, at)
    return at[(at > log.offsets[owner]) & (at >= log.offsets[owner + 1] - NEWEST)]


def _owners(log: Histories, at: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(log.offsets, at, side="right") - 1


def _candidates(
    recommender: Recommender, log: Histories, at: NDArray[np.int64], count: int
) -> NDArray[np.int32]:
    """Item rows + 1, int32[len(at), C], 0 where there are fewer; best first."""
    owner = _owners(log, at)
    lengths = at - log.offsets[owner]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    places = np.arange(offsets[-1]) + np.repeat(log.offsets[owner] - offsets[:-1], lengths)
    weights = None if log.weights is None else log.weights[places]
    times = None if log.times is None else log.times[places]
    past = Histories(log.items[places], offsets, weights, times)
    found = recommender.retrieve(past, count, exclude=log.take(owner))
    return (found.rows + 1).astype(np.int32)
