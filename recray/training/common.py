"""A table in memory that the ranks of one machine share: rows are read and changed where they lie.

Between machines a row travels to who asks for it and its gradient travels back (`sharding.py`). Where
memory is shared neither has to: a rank reads any row in place, and a row that no other rank asked for
in this step is also changed in place, by the rank that asked. Only gradients of rows that several
asked for go to the rows' owner, who adds them up. So every row is still changed by one rank a step, with
the same sum, and ranks share out the work of a step instead of adding copies to it.

    everybody's positions to everybody -> which of them are disputed      ids_wire, may run ahead
      -> rows, in place -> loss, backward
    gradients of disputed rows to their owners -> undisputed rows in place -> disputed ones by their owner
      -> all ranks are done: the next read may begin
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recray.models.embeddings import DenseTable
from recray.training.routing import Distinct, Route, distinct
from recray.training.row_update import Noise
from recray.training.sharding import ShardedTable
from recray.training.wire import Wire


class CommonTable(ShardedTable):
    """`weight` and `slots` are this rank's rows, as ever; `whole` holds those of all ranks by position.

    Each rank has a row more in `whole`, behind all others, which takes what must not be written.
    """

    def __init__(self, plain: DenseTable, name: str, wire: Wire, *args: Any, **options: Any) -> None:
        self._spare = plain.num_rows + wire.rank
        self._shape = plain.num_rows + wire.size
        self._marks = np.zeros(plain.num_rows, np.uint8)  # how many ranks ask for a row; kept at zero
        self._common: dict[str, Tensor] = {}
        super().__init__(plain, name, wire, *args, **options)
        self.wire.gather_up()  # every rank's rows are drawn

    def _memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._common[name] = self.wire.common((self._shape, *shape), dtype)
        return self._common[name][self.start : self.stop]

    def _told(self, asked: list[Tensor], found: Distinct, padded: bool, bad: int | None, wire: Wire) -> Route:
        mine = found.values[int(padded) :]
        flag = mine.new_tensor([-1 if bad is None else bad])
        told, counts = wire.gather(torch.cat([flag, mine]))
        everybody = [part.numpy() for part in self._checked(torch.split(told, counts))]
        for part in everybody:
            self._marks[part] += 1
        disputed = np.flatnonzero(self._marks[mine.numpy()] > 1)
        own = [part[slice(*np.searchsorted(part, (self.start, self.stop)))] for part in everybody]
        own = [part[self._marks[part] > 1] for part in own]
        for part in everybody:
            self._marks[part] = 0
        places = torch.from_numpy(disputed)
        local = torch.from_numpy(np.concatenate(own) - self.start)
        return Route(
            asked, found, padded, self._splits(mine[places]), local, [len(part) for part in own], places
        )

    def _fetch(self, route: Route) -> Tensor:
        positions = route.found.values[int(route.padded) :]
        rows = nn.functional.embedding(positions, self._common["weight"]).float()
        if not torch.is_grad_enabled():
            self.wire.gather_up()  # a step that comes next must not change what others still read
        return nn.functional.pad(rows, (0, 0, 1, 0)) if route.padded else rows

    def send_back(self) -> None:
        for at, route in enumerate(self._routes):
            if route.disputed is not None:  # owners need them all, where a step is not of one batch alone
                whole = super()._told(route.asked, route.found, route.padded, None, self.wire)
                whole.rows, whole.grads = route.rows, route.grads
                self._routes[at] = whole
        super().send_back()

    def step(self, lr: float, *, batches: int = 1, number: int = 0) -> None:
        sparse = self._whole is None and self._sent_whole is None
        one = len(self._routes) == 1 and not self._sent and sparse
        if one and not self.optimizer.l2:
            self._step_in_place(self._routes[0], lr, 1 / (self.wire.size * batches), number)
            self.forget()
        else:
            super().step(lr, batches=batches, number=number)
        self.wire.gather_up()

    def _step_in_place(self, route: Route, lr: float, scale: float, number: int) -> None:
        assert route.disputed is not None
        positions = route.found.values[int(route.padded) :]
        if route.grads:
            grad = route.summed().read()
        else:
            grad = torch.zeros(len(positions), self.dim)
        got, _ = self.wire.exchange(grad[route.disputed], route.splits, route.counts)
        slots = {slot: self._common[slot] for slot in self.slots}
        if route.grads and len(positions):
            assert route.rows is not None
            spots = positions.index_fill(0, route.disputed, self._spare)
            rows = route.rows[int(route.padded) :]
            self.optimizer.step(self._common["weight"], slots, spots, grad, lr, Noise(number), scale, rows)
        if len(route.local):
            among = distinct(route.local)
            self.optimizer.step(
                self.weight, self.slots, among.values, among.summed(got), lr, Noise(number, self.start), scale
            )
