"""Adversarial training of embeddings, and the attack it defends against.

With E the rows a batch reads, g = d loss / d E, and a row's perturbation as long as a share `size` of
the row itself:

    delta_r = size |E_r| g_r / |g_r|                      up the gradient: the worst step of that length
    step's loss = loss(E) + weight loss(E + delta)        delta held fixed

He, He, Du & Chua 2018 ("Adversarial personalized ranking for recommendation", arXiv 1808.03908,
equations 6-9), for any loss and any model with tables, with a length that is relative. What a model loses
is measured by the fast gradient sign method (Goodfellow, Shlens & Szegedy 2015, arXiv 1412.6572) over
the whole table at once: delta_r = size |E_r| sign(g_r) / sqrt(D), which is as long.

Each use of a row is moved up its own gradient: as an input, and as a candidate of a full softmax. Of
several ranks each moves what it reads up the gradient of its own share of the batch.

Shapes: U distinct rows a batch reads, N rows of a table, D dims.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from recray.data.dataset import Dataset
from recray.errors import ConfigError
from recray.models.base import Model
from recray.models.embeddings import DenseTable
from recray.training.sharding import ShardedTable


@contextmanager
def perturbed(tables: Iterable[ShardedTable], size: float) -> Iterator[None]:
    """Between a backward pass and a second one: what the batch reads is moved, in the block only."""
    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(table.moved(lambda rows, grads: worse(rows, grads, size)))
        yield


def worse(rows_UD: Tensor, grad_UD: Tensor, size: float) -> Tensor:
    """The rows moved by `size` of their own length up their gradient, float32[U, D]."""
    rows_UD = rows_UD.float()
    length_U1 = rows_UD.norm(dim=1, keepdim=True)
    moved: Tensor = rows_UD + size * length_U1 * nn.functional.normalize(grad_UD, dim=1, eps=1e-30)
    return moved


def attacked(model: Model, data: Dataset, size: float, *, batch_size: int = 128, seed: int = 0) -> Model:
    """A copy whose tables are moved against it (FGSM, see above), by the loss over the train split.

    Raises ConfigError for a model without a loss or without tables.
    """
    if not model.gradient or not model.tables:
        raise ConfigError(f"{model.name} has no loss over tables to attack")
    made = copy.deepcopy(model).eval()
    tables = [table for table in made.tables.values() if isinstance(table, DenseTable)]
    made.zero_grad()
    for batch in made.batches(data, batch_size=batch_size, epoch=1, seed=seed, rank=0, world=1):
        made.loss(batch).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for table in tables:
            rows, grad = table.weight, table.weight.grad
            assert grad is not None
            rows.add_(rows.norm(dim=1, keepdim=True) * grad.sign() * (size / rows.shape[1] ** 0.5))
    made.zero_grad(set_to_none=True)
    return made
