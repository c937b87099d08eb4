"""Adversarial training of embeddings, and the attack it defends against.

With E the rows a batch reads and `size` a share of a row's length:

    step's loss = loss(E) + loss(E + delta)               delta of fgsm.py, held fixed

He, He, Du & Chua 2018 ("Adversarial personalized ranking for recommendation", arXiv 1808.03908,
equations 6-9), for any loss and any model with tables. What a model loses is measured by the same step
over the whole table at once, of what is served.

Each use of a row is moved up its own gradient: as an input, and as a candidate of a full softmax. Of
several ranks each moves what it reads up the gradient of its own share of the batch.

Shapes: U distinct rows a batch reads, N rows of a table, B users, D dims.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from recray.data.dataset import Dataset
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Model, Retriever
from recray.models.bpr import BPR
from recray.models.embeddings import DenseTable
from recray.models.fgsm import fgsm
from recray.training.sharding import ShardedTable


@contextmanager
def perturbed(tables: Iterable[ShardedTable], size: float) -> Iterator[None]:
    """Between a backward pass and a second one: what the batch reads is moved, in the block only."""
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(table.moved(lambda rows, grads: fgsm(rows, grads, size)))
        yield


def attacked(model: Model, data: Dataset, size: float, *, batch_size: int = 128) -> Model:
    """A copy that is moved against itself by FGSM: its tables, and BPR's users, too (see `AttackedBPR`).

    Gradients are those of its own loss over the train split. Raises ConfigError for a model without a
    loss or without tables.
    """
    if isinstance(model, BPR):
        return AttackedBPR(model, data, size)
    if not model.gradient or not model.tables:
        raise ConfigError(f"{model.name} has no loss over tables to attack")
    made = copy.deepcopy(model).eval()
    tables = [table for table in made.tables.values() if isinstance(table, DenseTable)]
    made.zero_grad()
    for batch in made.batches(data, batch_size=batch_size, epoch=1, seed=0, rank=0, world=1):
        made.loss(batch).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for table in tables:
            assert table.weight.grad is not None
            table.weight.copy_(fgsm(table.weight, table.weight.grad, size))
    made.zero_grad(set_to_none=True)
    return made


class AttackedBPR(Retriever):
    """BPR as it is served, under attack: its items are moved, and each user's vector when she asks.

    A user is folded in against the clean items, and her vector moved up the gradient of the loss of her own
    history. Folded in against the moved items she would follow them, which undoes most of the attack.
    """

    name = "bpr"
    gradient = False

    def __init__(self, model: BPR, data: Dataset, size: float) -> None:
        super().__init__(model.catalogue, model.config)
        self.size, self.clean, known = size, copy.deepcopy(model).eval(), data.histories("train")
        _, by_item_ND = self.clean.gradients(known, self.clean.encode(known)[:, 0])
        self.tables["item"] = DenseTable.of(fgsm(model.item_vectors().detach(), by_item_ND, size))

    def encode(self, histories: Histories) -> Tensor:
        """float32[B, 1, D + 1]"""
        users_BD = self.clean.encode(histories)[:, 0]
        by_user_BD, _ = self.clean.gradients(histories, users_BD)
        return fgsm(users_BD, by_user_BD, self.size).unsqueeze(1)
