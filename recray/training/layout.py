"""Which rank owns which row of a table: pure arithmetic, the same on every machine.

Rows are numbered by first appearance, so low rows are the popular ones and plain ranges would give
one rank most of the work. A row is therefore first moved to a position, by multiplication with a
number near N / golden ratio modulo N: a bijection that spreads any run of neighbouring rows evenly
over the positions (Fibonacci hashing; Knuth, TAOCP vol. 3, 6.4). A rank owns one range of positions,
and ranges are what checkpoints hold, so a table can be read again by any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

LARGEST = 3_037_000_499  # rows: above it row * multiplier does not fit int64


@dataclass(frozen=True)
class Layout:
    """N rows over W ranks. Raises ValueError for sizes that cannot be laid out."""

    num_rows: int
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.num_rows <= LARGEST or self.ranks < 1:
            raise ValueError(f"{self.num_rows} rows over {self.ranks} ranks")

    @property
    def share(self) -> int:
        """Positions of a rank; the last ranks may own fewer, even none."""
        return -(-self.num_rows // self.ranks)

    def bounds(self, rank: int) -> tuple[int, int]:
        """[start, stop): the positions that `rank` owns."""
        return min(rank * self.share, self.num_rows), min((rank + 1) * self.share, self.num_rows)

    def positions(self, rows: Tensor) -> Tensor:
        """int64[...] rows in [0, N) -> their positions."""
        return rows.mul(self._multiplier).remainder_(self.num_rows)

    def rows(self, positions: Tensor) -> Tensor:
        """int64[...] positions in [0, N) -> their rows."""
        return positions.mul(self._inverse).remainder_(self.num_rows)

    def owners(self, positions: Tensor) -> Tensor:
        """The rank of each position, int64[...]."""
        return positions.div(self.share, rounding_mode="floor")

    @cached_property
    def _multiplier(self) -> int:
        near = max(1, round(self.num_rows * (math.sqrt(5) - 1) / 2))
        while math.gcd(near, self.num_rows) != 1:
            near += 1  # N + 1 is coprime to N at the latest
        return near % self.num_rows or 1

    @cached_property
    def _inverse(self) -> int:
        return pow(self._multiplier, -1, self.num_rows) if self.num_rows > 1 else 1
