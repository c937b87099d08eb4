"""What every model is: one of two stages, answering from raw histories, one process, no Ray.

A retriever turns histories into scores over the whole catalogue; most do it by query vectors times
item vectors, which an index can search. A ranker scores a few candidates a user more carefully.

Shapes: B users, K queries a user, D dims, N items of the catalogue, C candidates a user.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data.item_features import item_features
from recray.data.sequences import Histories

if TYPE_CHECKING:
    from recray.data.dataset import Dataset
    from recray.models.why import Reasons

Context = Mapping[str, NDArray[np.int32]]  # context column -> value rows int32[B]; 0 means unknown


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base of each model's own frozen options (`Model.Config`)."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under torch's random state of `seed`; the state outside is untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Catalogue:
    """What a model must know of a dataset before it sees a row of it."""

    n_items: int
    context: Mapping[str, int]  # context column -> number of value rows, 0 being 'unknown'
    item_values: Mapping[str, int] = field(default_factory=dict)  # category of items -> value rows, likewise
    item_numbers: int = 0  # numbers of an item

    @staticmethod
    def of(data: Dataset) -> Catalogue:
        """What a dataset says."""
        found = item_features(data)
        values = dict(zip(found.names, found.sizes, strict=True))
        return Catalogue(data.n_items, data.context_sizes, values, len(found.number_names))


class Lesson(Protocol):
    """What a teacher adds to the loss of a student; compression/distil.py has one."""

    def rows(self, at_P: NDArray[np.int64], targets_P: NDArray[np.int64]) -> NDArray[np.int64]:
        """Items int64[P, M] it wants the student's scores of, for positions whose targets lie at `at`.

        The target, then those that the teacher lists; or none.
        """

    def loss(
        self,
        summed: Tensor,
        at_P: NDArray[np.int64],
        states_PD: Tensor,
        listed_PM: Tensor,
        others_PS: Tensor | None,
    ) -> Tensor:
        """What the student's summed loss becomes; others: scores of negatives, None after a full softmax."""


class Model(nn.Module):
    """Base of all models. Everything learned is a parameter or a buffer, so `state_dict()` is it.

    A subclass sets `self.tables` (name -> Table) for what grows with the catalogue and, if it has
    a dense part worth exporting, `self.network`: a module of tensors only (no rows, no ragged
    input), fed by `inputs(...)`. `network(*inputs(...))` is then the whole computation after the
    tables' rows were read, which is what compression exports and replaces.
    """

    name: ClassVar[str]
    stage: ClassVar[Literal["retriever", "ranker"]]
    Config: ClassVar[type[ModelConfig]]
    gradient: ClassVar[bool]  # True: trained by training/loop.py on batches; False: by `fit`
    lesson: Lesson | None = None  # given before training, to a model that can be taught
    shares_fit: ClassVar[bool] = False  # whether `fit` takes `ranks`, and several can fit one model

    def __init__(self, catalogue: Catalogue, config: ModelConfig) -> None:
        super().__init__()
        self.catalogue, self.config = catalogue, config
        self.n_items = catalogue.n_items
        self.tables: nn.ModuleDict = nn.ModuleDict()
        self.network: nn.Module | None = None

    def see(self, data: Dataset) -> None:
        """Take what the model keeps of the items' features into its buffers, once, before it is trained.

        A buffer's shape is known from the catalogue alone; its content travels in the state.
        """

    def reasons(self, history: Histories, row: int) -> Reasons | None:
        """What the score of item `row` is the sum of, for one history; None of a model that is no sum.

        `why` in why.py answers for every model.
        """
        return None

    # -- models with gradient = False ------------------------------------------------------------
    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        """Learn from the train split in closed form or by sweeps; returns what it measured."""
        raise NotImplementedError(f"{self.name} is trained by gradient")

    # -- models with gradient = True -------------------------------------------------------------
    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[Any]:
        """This rank's share of one epoch; the same for the same (epoch, seed, rank, world).

        Every rank yields the same number of batches, and the first `skip` of them are left out.
        """
        raise NotImplementedError(f"{self.name} is not trained by gradient")

    def lookups(self, batch: Any) -> Mapping[str, list[Tensor]]:
        """Table -> the rows (int64, on the CPU) that `loss` will ask it for, call by call.

        A table that is named here exchanges all of them at once, while the batch before is computed;
        one that is not exchanges at each call.
        """
        return {}

    def loss(self, batch: Any) -> Tensor:
        """Loss of one batch of `batches`, a scalar: its mean over the ranks is the step's mean loss.

        All of its randomness (dropout) comes from the batch, so a step can be repeated.
        """
        raise NotImplementedError(f"{self.name} is not trained by gradient")

    @property
    def device(self) -> torch.device:
        """Where the model lies; what it returns lies there too."""
        found = _first(self)
        return torch.device("cpu") if found is None else found.device


def _first(module: nn.Module) -> Tensor | None:
    """A tensor that a module holds. Asked at every request: torch's own iterators walk all of it first."""
    for held in itertools.chain(module._parameters.values(), module._buffers.values()):
        if held is not None:
            return held
    for child in module._modules.values():
        if child is not None and (found := _first(child)) is not None:
            return found
    return None


class Retriever(Model):
    """Histories -> scores over the catalogue."""

    stage = "retriever"

    @property
    def has_vectors(self) -> bool:
        """Whether score = max over K of encode(h) @ item_vectors(), so that an index can serve it."""
        return True

    def encode(self, histories: Histories) -> Tensor:
        """Query vectors, float32[B, K, D]. Reads tables, then the network. No gradient is kept."""
        raise NotImplementedError(f"{self.name} has no query vectors")

    def item_vectors(self) -> Tensor:
        """float32[N, D]; by default the table named 'item'."""
        return self.tables["item"].dense()  # type: ignore[operator,no-any-return]

    @torch.inference_mode()
    def score(self, histories: Histories) -> Tensor:
        """Scores of all items, float32[B, N]. A model without vectors overrides this."""
        query_BKD = self.encode(histories)
        b, k, d = query_BKD.shape
        items_ND = self.item_vectors()
        return (query_BKD.reshape(b * k, d) @ items_ND.T).view(b, k, len(items_ND)).amax(dim=1)


class Ranker(Model):
    """(history, candidates, context) -> one score a candidate."""

    stage = "ranker"
    mined: NDArray[np.int32] | None = None
    """int32[n, C], given before training: what a retriever proposes before each of the n train
    interactions, best first, as item row + 1, 0 where there is none. See `models/rankers.py`."""

    @abstractmethod
    def inputs(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> tuple[Tensor, ...]:
        """What the network eats, first dimension B; candidates int64[B, C], PAD where there is none."""

    @torch.inference_mode()
    def score(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> Tensor:
        """float32[B, C]; minus infinity where the candidate is PAD."""
        assert self.network is not None
        scores_BC: Tensor = self.network(*self.inputs(histories, candidates, context))
        none_BC = candidates < 0
        if not none_BC.any():
            return scores_BC
        return scores_BC.masked_fill(torch.from_numpy(none_BC).to(scores_BC.device), -torch.inf)
