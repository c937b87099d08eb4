"""What travels between ranks: an all-to-all of rows whose counts only the sender knows.

Three ways of the same call. One rank sends nothing. Ranks of one machine hand rows over in shared
memory, which costs a copy where sockets cost four and two turns of the scheduler. All others use the
process group (gloo or NCCL).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import platform
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

_SPINS = 400  # looks at a neighbour's counter before sleeping between looks
_NAP_S = 2e-5
_LOOKS = 4096  # naps between asking whether the neighbour is alive
_LOST_S = 600.0  # as torch waits for a collective
_MOST_RANKS = 24  # on one machine; what fits a control page
_MAGIC = 0x7265637261790001


class Rows:
    """float32[n, D] that is not worked out yet: a wire has each part made when and where it is wanted."""

    dtype = torch.float32
    shape: torch.Size

    def read(self) -> Tensor:
        """All of it."""
        return self.part(0, self.shape[0])

    @abstractmethod
    def part(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop)."""

    def write(self, start: int, stop: int, into: Tensor) -> None:
        """Put rows [start, stop) into memory that is there, of any dtype."""
        into.copy_(self.part(start, stop))


class Picked(Rows):
    """Rows of a table."""

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        self.table, self.rows = table, rows
        self.shape = torch.Size((len(rows), *table.shape[1:]))

    def part(self, start: int, stop: int) -> Tensor:
        return torch.nn.functional.embedding(self.rows[start:stop], self.table).float()


class Wire:
    """All ranks must make the same calls in the same order. Shapes: n rows sent, m rows got."""

    rank = 0
    size = 1
    shares_memory = False  # whether `common` gives any

    @abstractmethod
    def exchange(
        self,
        send: Tensor | Rows,
        splits: list[int],
        expect: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[int]]:
        """Send `splits[r]` rows of `send` [n, ...] to each rank r, in order.

        Gives (got [m, ...] sorted by sender, rows from each sender). `expect` are those counts where
        the caller knows them, which saves a message. `dtype` is what rows travel in to other ranks.
        """

    def gather(self, part: Tensor) -> tuple[Tensor, list[int]]:
        """Every rank's `part` [n, ...], one after the other: ([m, ...], rows of each)."""
        n = len(part)
        everywhere = part.unsqueeze(0).expand(self.size, *part.shape).reshape(self.size * n, *part.shape[1:])
        found, counts = self.exchange(everywhere, [n] * self.size)
        return found, counts

    def common(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros that all ranks read and write. It goes when no rank holds the tensor."""
        raise NotImplementedError(f"the ranks of {type(self).__name__} share no memory")

    def gather_up(self) -> None:
        """Go on when every rank is here: what others wrote into common memory before can be read then."""
        self.exchange(torch.empty(0), [0] * self.size)


class AloneWire(Wire):
    """One rank."""

    def exchange(
        self,
        send: Tensor | Rows,
        splits: list[int],
        expect: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[int]]:
        return send.read() if isinstance(send, Rows) else send, splits


class GroupWire(Wire):
    """Over a torch process group; `device` is where its messages must lie (cuda for NCCL)."""

    def __init__(self, device: torch.device, group: Any = None) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device, self.group = device, group

    def exchange(
        self,
        send: Tensor | Rows,
        splits: list[int],
        expect: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[int]]:
        send = send.read() if isinstance(send, Rows) else send
        if expect is None:
            counts = torch.tensor(splits, dtype=torch.int64, device=self.device)
            theirs = torch.empty_like(counts)
            dist.all_to_all_single(theirs, counts, group=self.group)
            expect = theirs.tolist()
        on_wire = send.to(self.device, dtype or send.dtype).contiguous()
        got = torch.empty((sum(expect), *send.shape[1:]), dtype=on_wire.dtype, device=self.device)
        dist.all_to_all_single(got, on_wire, expect, splits, group=self.group)
        return got.to(send.device, send.dtype), expect


class _Page:
    """Shared memory without a name: it goes when the last process that knows it does, however it ends."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("recray")
        os.ftruncate(self.fd, size)
        self.memory = mmap.mmap(self.fd, size)

    @staticmethod
    def of(pid: int, fd: int) -> mmap.mmap:
        """Another process's page."""
        mine = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        try:
            return mmap.mmap(mine, os.fstat(mine).st_size)
        finally:
            os.close(mine)


class _Outbox:
    """What one rank has to say: a control page, and two data pages that are used in turn.

    Control, int64: 0 turn · 1 magic · 2, 3 file descriptors of the data pages · 4, 5 how often each
    was replaced · from 8, for each page, (first byte, rows) a receiver. A page may be written again
    once everybody has published the turn after it, since a rank publishes a turn only when it has
    read all of the one before.
    """

    def __init__(self, control: mmap.mmap) -> None:
        self.control: NDArray[np.int64] = np.frombuffer(control, np.int64)
        self.known: dict[int, tuple[int, mmap.mmap]] = {}  # 0 or 1 -> (times replaced, memory)

    def table(self, turn: int, size: int) -> NDArray[np.int64]:
        """int64[size, 2] of this turn."""
        start = 8 + (turn & 1) * 2 * size
        return self.control[start : start + 2 * size].reshape(size, 2)

    def heard(self, turn: int, pid: int) -> mmap.mmap:
        """The data page of this turn, of a neighbour."""
        which = turn & 1
        times = int(self.control[4 + which])
        if self.known.get(which, (0,))[0] != times:
            self.known[which] = (times, _Page.of(pid, int(self.control[2 + which])))
        return self.known[which][1]


class SharedWire(Wire):
    """Between processes of one machine. Raises OSError where their memory cannot be shared."""

    shares_memory = True

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > _MOST_RANKS or platform.machine() != "x86_64":
            raise OSError("counters in shared memory need a machine that keeps the order of writes")
        self._mine = _Page(4096)
        self._box = _Outbox(self._mine.memory)
        self._box.control[1] = _MAGIC
        self._data: dict[int, _Page] = {}
        self._turn = 0
        self._pids: list[int] = []
        self._boxes: list[_Outbox] = []

    def meet(self, addresses: list[tuple[int, int]]) -> None:
        """Open the control pages of all ranks, given (pid, fd) of each. Raises OSError."""
        self._pids = [pid for pid, _ in addresses]
        self._boxes = [_Outbox(_Page.of(*address)) for address in addresses]
        if any(box.control[1] != _MAGIC for box in self._boxes):
            raise OSError("a neighbour's page is not ours to read")

    @property
    def address(self) -> tuple[int, int]:
        """(pid, fd) of this rank's control page."""
        return os.getpid(), self._mine.fd

    def exchange(
        self,
        send: Tensor | Rows,
        splits: list[int],
        expect: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, list[int]]:
        turn = self._turn = self._turn + 1
        kind, shape = send.dtype, send.shape[1:]
        on_wire = dtype or kind  # rows are converted while they are copied, which costs nothing
        ends = np.cumsum([0, *splits])
        self._say(turn, send, on_wire, ends, shape)
        counts = expect or [splits[r] if r == self.rank else self._told(r, turn)[1] for r in range(self.size)]
        got = torch.empty((sum(counts), *shape), dtype=kind)
        parts = torch.split(got, counts)
        # what stays here comes first: meanwhile the neighbours get ready
        _put(send, int(ends[self.rank]), int(ends[self.rank + 1]), parts[self.rank])
        for rank, part in enumerate(parts):
            if rank != self.rank:
                first, _ = self._told(rank, turn)
                if counts[rank]:
                    try:
                        memory = self._boxes[rank].heard(turn, self._pids[rank])
                    except OSError:  # it spoke, and its memory went with it before this rank looked
                        raise RuntimeError(f"rank {rank} is gone") from None
                    part.copy_(_tensor(memory, part.shape, on_wire, first))
        return got, counts

    def common(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        page = _Page(math.prod(shape) * dtype.itemsize) if self.rank == 0 else None
        told, _ = self.gather(torch.tensor([page.fd if page else -1]))
        memory = page.memory if page else _Page.of(self._pids[0], int(told[0]))
        self.gather_up()  # all have opened it
        if page:
            os.close(page.fd)
        return _tensor(memory, shape, dtype, 0)

    def _say(
        self,
        turn: int,
        send: Tensor | Rows,
        on_wire: torch.dtype,
        ends: NDArray[np.int64],
        shape: torch.Size,
    ) -> None:
        """Put all but this rank's own rows into this turn's page, then publish the turn."""
        width = on_wire.itemsize * shape.numel()
        memory = self._room(turn & 1, int(ends[-1]) * width)
        table = self._box.table(turn, self.size)
        table[:, 0] = ends[:-1] * width
        table[:, 1] = np.diff(ends)
        for start, stop in ((0, int(ends[self.rank])), (int(ends[self.rank + 1]), int(ends[-1]))):
            if stop > start and width:
                into = _tensor(memory, (stop - start, *shape), on_wire, start * width)
                _put(send, start, stop, into)
        self._box.control[0] = turn

    def _room(self, which: int, size: int) -> mmap.mmap:
        """The page of this turn, replaced by a larger one if `size` bytes do not fit."""
        page = self._data.get(which)
        if page is None or len(page.memory) < size:
            if page is not None:
                os.close(page.fd)  # its memory goes when the neighbours have opened the next
            page = self._data[which] = _Page(max(1 << 16, 1 << max(size - 1, 0).bit_length()))
            self._box.control[2 + which] = page.fd
            self._box.control[4 + which] += 1
        return page.memory

    def _told(self, rank: int, turn: int) -> tuple[int, int]:
        """(first byte, rows) of what a neighbour has for this rank, once it says so."""
        self._await(rank, turn)
        first, rows = self._boxes[rank].table(turn, self.size)[self.rank].tolist()
        return first, rows

    def _await(self, rank: int, turn: int) -> None:
        control, looks, started = self._boxes[rank].control, 0, 0.0
        while control[0] < turn:
            looks += 1
            if looks < _SPINS:
                time.sleep(0)
                continue
            time.sleep(_NAP_S)
            if looks % _LOOKS == 0:
                started = started or time.monotonic()
                gone = not _alive(self._pids[rank]) or time.monotonic() - started > _LOST_S
                if gone and control[0] < turn:  # it may have spoken and then gone, since the last look
                    raise RuntimeError(f"rank {rank} is gone")


def _tensor(memory: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    """A view into shared memory."""
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _put(send: Tensor | Rows, start: int, stop: int, into: Tensor) -> None:
    if isinstance(send, Rows):
        send.write(start, stop, into)
    else:
        into.copy_(send[start:stop])


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def make_wire(device: torch.device) -> Wire:
    """The best wire between the ranks of the default process group. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return AloneWire()
    shared: SharedWire | None = None
    if device.type == "cpu" and hasattr(os, "memfd_create"):
        try:
            shared = SharedWire()
        except OSError:
            shared = None
    about = torch.tensor(
        [_machine(), *(shared.address if shared else (0, 0))], dtype=torch.int64, device=device
    )
    every = [torch.empty_like(about) for _ in range(dist.get_world_size())]
    dist.all_gather(every, about)
    told = torch.stack(every).tolist()
    same = all(entry[0] == told[0][0] and entry[2] for entry in told)
    met = False
    if shared and same:
        try:
            shared.meet([(pid, fd) for _, pid, fd in told])
            met = True
        except OSError:
            met = False
    agreed = torch.tensor([int(met)], device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    if shared and agreed.item():
        return shared
    # a group of its own: two wires may be used from two threads, each in its own order
    return GroupWire(device, dist.new_group(backend=dist.get_backend()))


def _machine() -> int:
    """The same number for all processes of one running machine and process namespace, 63 bits."""
    try:
        words = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1
