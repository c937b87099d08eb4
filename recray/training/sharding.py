"""Embedding tables whose rows are spread over the ranks: `shard(model, ...)` and nothing else changes.

A step of a table, the same code for one rank and many:

    rows asked for -> positions, each once, sorted by owner        routing.py
      -> ids to their owners -> rows back                          wire.py
      -> loss, backward: the gradients of a row added up
      -> gradients to the owners, added up over ranks -> the optimizer's step on those rows only

No rank ever holds a gradient of the whole table, and a row that many ask for crosses the wire once a
rank. Compare TorchRec (Ivchenko et al. 2022, "TorchRec: a PyTorch domain library for recommendation
systems"), which fuses the optimizer into the backward pass in the same way.

Shapes: n looked-up rows, U distinct ones, m rows this rank was asked for, N rows of D in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recray.errors import InputError
from recray.models.embeddings import DenseTable, Table
from recray.models.losses import softmax_slopes
from recray.training.layout import Layout
from recray.training.routing import Distinct, Route, distinct
from recray.training.row_update import Noise, RowOptimizer
from recray.training.wire import Picked, Rows, Wire

_INIT_ROWS = 1 << 14  # rows that one seed draws: a rank draws only the blocks it owns rows of


class ShardedTable(Table):
    """This rank's rows of a table, in order of position, with their optimizer.

    `weight` [n, D] (float32 or bfloat16) and `slots` are plain tensors: they are no parameters of the
    model, since nobody but `step` may change them.
    """

    def __init__(
        self,
        plain: DenseTable,
        name: str,
        wire: Wire,
        optimizer: RowOptimizer,
        *,
        ids_wire: Wire | None = None,
        dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.optimizer, self.wire_dtype = name, optimizer, wire_dtype
        self.wire, self.ids_wire = wire, ids_wire or wire
        self.num_rows, self.dim = plain.num_rows, plain.dim
        self.layout = Layout(plain.num_rows, wire.size)
        self.start, self.stop = self.layout.bounds(wire.rank)
        self.device = device or torch.device("cpu")
        self.weight = self._memory("weight", (self.dim,), dtype)
        if plain.weight.is_meta:
            self._draw(plain.std, seed)
        else:
            with torch.no_grad():
                own = self.layout.rows(torch.arange(self.start, self.stop, device=plain.weight.device))
                self.weight.copy_(plain.weight[own])
        shapes = optimizer.slots(self.dim)
        self.slots = {slot: self._memory(slot, shape, torch.float32) for slot, shape in shapes.items()}
        self._anchor = torch.zeros((), requires_grad=True, device=self.device)  # makes autograd call back
        self._routes: list[Route] = []
        # own rows, their gradients and, of one rank, what they hold: of the batches since the last step
        self._sent: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._whole: Tensor | None = None  # float32[n, D], from losses that read every row
        self._sent_whole: Tensor | None = None  # the same of batches that are done

    # -- forward -----------------------------------------------------------------------------------
    def forward(self, rows: Tensor) -> Tensor:
        """int64[...] rows -> float32[..., D], negative rows give zeros. Every rank must call it alike.

        Raises InputError, on every rank, when one of them asks for a row that is not there.
        """
        for route in self._routes:
            number = route.number_of(rows)
            if number is not None:
                break
        else:
            route, number = self.route([rows], self.wire), 0  # the wire for ids may be another thread's now
            if torch.is_grad_enabled():
                self._routes.append(route)
        if route.rows is None:
            route.rows = self._fetch(route)
        read: Tensor = _Read.apply(self._anchor, self, route, number)  # type: ignore[no-untyped-call]
        return read

    def take(self, route: Route) -> None:
        """What the coming batch looks up was told already."""
        self._routes.append(route)

    def route(self, asked: Sequence[Tensor], wire: Wire | None = None) -> Route:
        """Deduplicate the rows over all of `asked` and tell their owners, by default by the wire for ids.

        Depends on no row's value, so another thread may do it while a batch before is computed.
        """
        flat = _cat([a.reshape(-1) for a in asked])
        low, high = torch.aminmax(flat) if len(flat) else (flat.new_tensor(0), flat.new_tensor(0))
        bad = int(high) if int(high) >= self.num_rows else None
        padded = int(low) < 0
        inside = flat.clamp(0, self.num_rows - 1) if padded or bad is not None else flat
        positions = self.layout.positions(inside)
        if padded:  # one more 'position' in front of all others
            positions = torch.where(flat < 0, 0, positions + 1)
        found = distinct(positions)
        if padded:
            found.values.sub_(1)
        return self._told(list(asked), found, padded, bad, wire or self.ids_wire)

    def _told(self, asked: list[Tensor], found: Distinct, padded: bool, bad: int | None, wire: Wire) -> Route:
        """Send positions to their owners; a rank that cannot go on says so to all."""
        mine = found.values[int(padded) :]
        splits = self._splits(mine)
        if wire.size == 1:
            if bad is not None:
                raise self._no_row(bad, 0)
            return Route(asked, found, padded, splits, mine, splits)
        flagged = [n + 1 for n in splits]  # one number before the positions of each owner: the bad row, or -1
        flag = torch.tensor([-1 if bad is None else bad], dtype=mine.dtype, device=mine.device)
        send = torch.cat([x for part in torch.split(mine, splits) for x in (flag, part)])
        got, counts = wire.exchange(send, flagged)
        parts = self._checked(torch.split(got, counts))
        local = torch.cat(parts) - self.start
        return Route(asked, found, padded, splits, local, [len(part) for part in parts])

    def _splits(self, positions: Tensor) -> list[int]:
        """How many of these ascending positions each rank owns."""
        bounds = torch.arange(1, self.wire.size, device=positions.device) * self.layout.share
        ends = torch.searchsorted(positions, bounds).tolist()
        return [b - a for a, b in zip([0, *ends], [*ends, len(positions)])]

    def _checked(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """What each rank said, without the number in front."""
        for rank, part in enumerate(parts):
            if int(part[0]) >= 0:
                raise self._no_row(int(part[0]), rank)
        return [part[1:] for part in parts]

    def _no_row(self, row: int, rank: int) -> InputError:
        return InputError(
            f"rank {rank} asks for row {row:,} of {self.num_rows:,}",
            where=f"table {self.name!r}",
            fix="prepare the data again: its rows and the model's catalogue disagree",
        )

    def _fetch(self, route: Route) -> Tensor:
        """float32[U, D]: the distinct rows, from wherever they are; zeros for padding."""
        picked = Picked(self.weight, route.local)
        rows, _ = self.wire.exchange(picked, route.counts, route.splits, self.wire_dtype)
        return nn.functional.pad(rows, (0, 0, 1, 0)) if route.padded else rows

    # -- losses over all rows ----------------------------------------------------------------------
    def dense(self) -> Tensor:
        """All rows in order of row, float32[N, D], on every rank: for tables that fit one."""
        whole: Tensor = _Whole.apply(self._anchor, self)  # type: ignore[no-untyped-call]
        return whole

    def full_softmax(self, states_PD: Tensor, targets_P: Tensor) -> Tensor:
        """Summed cross-entropy of this rank's positions against all rows of all ranks.

        Each rank scores every rank's states against its own rows only; log-sum-exps are what is
        exchanged, so the logits never exist as a whole. The factor that the sum is multiplied with
        afterwards must be the same on every rank.
        """
        kind = states_PD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        summed: Tensor = _ShardedSoftmax.apply(states_PD.float(), self._anchor, targets_P, self, dtype)  # type: ignore[no-untyped-call]
        return summed

    def add_whole(self, grad_nD: Tensor) -> None:
        """Take a gradient of all of this rank's rows."""
        self._whole = grad_nD if self._whole is None else self._whole.add_(grad_nD)

    @contextmanager
    def moved(self, move: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Inside the block what was read since the last step is `move(rows [U, D], gradients [U, D])`.

        Gradients add up as ever; the rows are what they were after it.
        """
        routes = [route for route in self._routes if route.grads and route.rows is not None]
        kept, whole = [route.rows for route in routes], None
        for route in routes:
            assert route.rows is not None
            padding = int(route.padded)
            moved = move(route.rows[padding:], route.summed().read())
            route.rows = torch.cat([route.rows[:padding], moved])
        if self._whole is not None:
            whole = self.weight.clone()
            self.weight.copy_(move(self.weight, self._whole))
        try:
            yield
        finally:
            for route, rows in zip(routes, kept):
                route.rows = rows
            if whole is not None:
                self.weight.copy_(whole)

    # -- the optimizer -----------------------------------------------------------------------------
    def send_back(self) -> None:
        """After a backward pass: give the gradients to the owners of their rows."""
        alone = self.wire.size == 1
        for route in self._routes:
            if not route.grads and alone:
                continue
            grads: Tensor | Rows
            if route.grads:
                grads = route.summed()
            else:  # the others wait for this rank's, though it used nothing of what it read
                grads = torch.zeros(sum(route.splits), self.dim, device=self.device)
            got, _ = self.wire.exchange(grads, route.splits, route.counts, self.wire_dtype)
            rows = route.rows[int(route.padded) :] if alone and route.rows is not None else None
            self._sent.append((route.local, got, rows))
        self._routes.clear()
        if self._whole is not None:
            self._sent_whole = self._whole if self._sent_whole is None else self._sent_whole.add_(self._whole)
            self._whole = None

    def forget(self) -> None:
        """Drop what was read and not stepped on."""
        self._routes.clear()
        self._sent.clear()
        self._whole = self._sent_whole = None

    def step(self, lr: float, *, batches: int = 1, number: int = 0) -> None:
        """One step of the optimizer on the mean gradient over the ranks and `batches`.

        `number` is the step's of the run: the rounding of a bfloat16 table depends on it.
        """
        self.send_back()
        scale, noise = 1 / (self.wire.size * batches), Noise(number, self.start)
        whole = self._sent_whole
        if whole is None and self.optimizer.l2:
            whole = torch.zeros(*self.weight.shape, device=self.device)
        if whole is not None:
            for local, grad, _ in self._sent:
                whole.index_add_(0, local, grad)
            self.optimizer.step_all(self.weight, self.slots, whole, lr, noise, scale)
        elif self._sent:
            touched, grad, rows = self._sent[0]
            if len(self._sent) > 1 or self.wire.size > 1:
                among = distinct(_cat([sent[0] for sent in self._sent]))
                touched, grad, rows = among.values, among.summed(_cat([s[1] for s in self._sent])), None
            if len(touched):
                self.optimizer.step(self.weight, self.slots, touched, grad, lr, noise, scale, rows)
        self.forget()

    def is_finite(self) -> bool:
        """Whether all of this rank's rows are numbers."""
        return all(bool(part.isfinite().all()) for part in torch.split(self.weight, _INIT_ROWS))

    # -- the whole table ---------------------------------------------------------------------------
    def _memory(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros for this rank's rows."""
        return torch.zeros(self.stop - self.start, *shape, dtype=dtype, device=self.device)

    def _draw(self, std: float, seed: int) -> None:
        """The first values, the same for every number of ranks."""
        generator = torch.Generator()
        first = self.start // _INIT_ROWS
        for block in range(first, -(-self.stop // _INIT_ROWS)):
            begin = block * _INIT_ROWS
            generator.manual_seed(int(np.random.SeedSequence([seed, block]).generate_state(1)[0]))
            drawn = torch.empty(min(_INIT_ROWS, self.num_rows - begin), self.dim).normal_(
                std=std, generator=generator
            )
            low, high = max(begin, self.start), min(begin + len(drawn), self.stop)
            self.weight[low - self.start : high - self.start] = drawn[low - begin : high - begin].to(
                self.device
            )


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))  # of one, cat would make a copy


class _Read(torch.autograd.Function):
    """Looked-up rows out of the distinct ones that were fetched; backward keeps their gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ShardedTable, route: Route, number: int) -> Tensor:
        ctx.route, ctx.number = route, number
        assert route.rows is not None
        inverse = route.found.inverse[route.places(number)]
        return nn.functional.embedding(inverse, route.rows).view(*route.asked[number].shape, table.dim)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        flat = grads[0].reshape(-1, grads[0].shape[-1]).float()
        before = ctx.route.grads.get(ctx.number)
        ctx.route.grads[ctx.number] = flat if before is None else before + flat
        return None, None, None, None


class _Whole(torch.autograd.Function):
    """All rows of all ranks in order of row."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ShardedTable) -> Tensor:
        ctx.table = table
        every, _ = table.wire.gather(table.weight)
        positions = table.layout.positions(torch.arange(table.num_rows, device=every.device))
        return every[positions].float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        table = ctx.table
        order = table.layout.rows(torch.arange(table.num_rows, device=grads[0].device))
        bounds = [table.layout.bounds(rank) for rank in range(table.wire.size)]
        splits, mine = [b - a for a, b in bounds], table.stop - table.start
        got, _ = table.wire.exchange(grads[0][order], splits, [mine] * table.wire.size)
        table.add_whole(got.view(table.wire.size, mine, table.dim).sum(0))
        return None, None


class _ShardedSoftmax(torch.autograd.Function):
    """Cross-entropy over rows of all ranks; the gradients are made in the forward pass, as in losses.py."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PD: Tensor,
        anchor: Tensor,
        targets_P: Tensor,
        table: ShardedTable,
        dtype: torch.dtype,
    ) -> Tensor:
        wire, rank = table.wire, table.wire.rank
        states, counts = wire.gather(states_PD)
        targets, _ = wire.gather(table.layout.positions(targets_P))
        local = targets - table.start
        local = local.masked_fill((local < 0) | (local >= len(table.weight)), -1)

        def over_ranks(log_z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            parts = wire.gather(torch.stack([log_z, target]).unsqueeze(0))[0]
            return parts[:, 0].logsumexp(0), parts[:, 1].sum(0)

        combine = None if wire.size == 1 else over_ranks
        losses, grad_states, ctx.grad_rows = softmax_slopes(
            states, table.weight, local, dtype, combine, table.layout.share
        )
        if wire.size > 1:
            back, _ = wire.exchange(grad_states, counts, [counts[rank]] * wire.size)
            grad_states = back.view(wire.size, counts[rank], -1).sum(0)
        ctx.grad_states, ctx.table = grad_states, table
        own: Tensor = torch.split(losses, counts)[rank]
        return own.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.table.add_whole(ctx.grad_rows.mul_(grads[0]))
        return ctx.grad_states * grads[0], None, None, None, None
