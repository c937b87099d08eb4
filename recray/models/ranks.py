"""What a model that several ranks fit together needs of them, so that it need not know any network.

The wires of the training wing have this shape.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Ranks(Protocol):
    """The processes of one fit: each calls the same methods in the same order."""

    rank: int
    size: int

    def exchange(self, send: Tensor, splits: list[int], expect: list[int] | None = None) -> Any:
        """Send `splits[r]` rows of `send` [n, ...] to each rank r, in order.

        Gives (got [m, ...] sorted by sender, rows from each sender); `expect` are those counts where
        the caller knows them.
        """

    def gather(self, part: Tensor) -> tuple[Tensor, list[int]]:
        """Every rank's `part` [n, ...], one after the other: ([m, ...], rows of each)."""


class Alone:
    """One rank."""

    rank = 0
    size = 1

    def exchange(self, send: Tensor, splits: list[int], expect: list[int] | None = None) -> Any:
        """What is sent."""
        return send, splits

    def gather(self, part: Tensor) -> tuple[Tensor, list[int]]:
        """The part, which is all there is."""
        return part, [len(part)]


def total(part: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks, in their order, so that all of them get the same bits."""
    return ranks.gather(part.unsqueeze(0))[0].sum(0)
