"""A pointer and generations in memory: what the steps of a ship are tried on without Ray or a bundle."""

from __future__ import annotations

from recray.serving.generations import Generation
from recray.serving.http import Reply
from recray.serving.schema import RecommendRequest

A, B, C = (Generation(name, f"/bundles/{name}") for name in "abc")


class Sometimes:
    """A generation that fails, is away, or answers."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error

    async def recommend(self, ask: RecommendRequest) -> Reply:
        if self.error is not None:
            raise self.error
        return Reply([{"item": self.name}], self.name)

    def at_hand(self, ask: RecommendRequest) -> Reply:
        return Reply([], self.name, ["popular: unavailable"])

    async def similar(self, item: str, k: int) -> Reply:
        return await self.recommend(RecommendRequest())

    async def ready(self) -> str:
        return self.name
