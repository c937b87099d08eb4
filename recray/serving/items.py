"""New and withdrawn items of a running application: a generation of the same bundle with other changes.

What changed (`bundles.changes`) is kept once, under the generation's name, where the pointer is; the pointer
names the generation like any other, so every replica holds it before one answers from it, also one that is
born later. The models are shared, so that takes milliseconds. What is withdrawn stays so in the generation
before and in each that is shipped, until it is restored; what was added ends with its bundle, since its
vectors mean nothing to other models, and the next one is trained with it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recray.bundles.changes import Added, Changes
from recray.errors import ArtefactError
from recray.serving.generations import Generation
from recray.serving.schema import ApiError, Id, Scalar

MOST = 10_000  # ids in a list, and new items with those that came before
DIM = 4096  # numbers of a vector
KEPT_BYTES = 16 << 20  # of all changes of a generation


class Shelf(Protocol):
    """Where changes are kept by the name of their generation, the same for all replicas; calls may block."""

    def put(self, name: str, data: bytes) -> None: ...

    def get(self, name: str) -> bytes | None: ...


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewItem(_Strict):
    """An item that the models do not know yet, with a vector or items that it is like."""

    item: Id
    vector: Annotated[list[float], Field(min_length=1, max_length=DIM)] | None = Field(
        None, description="As the retriever has them."
    )
    like: Annotated[list[Id], Field(min_length=1, max_length=100)] | None = Field(
        None, description="Known items whose mean it takes."
    )
    features: dict[str, Scalar | list[Scalar]] = Field({}, description="Item column -> its value.")


class ItemsRequest(_Strict):
    """What changes in the catalogue; each list may be left out."""

    withdraw: list[Id] = Field(default=[], max_length=MOST, description="Answered no more until restored.")
    restore: list[Id] = Field(default=[], max_length=MOST, description="Withdrawn ones, answered again.")
    add: list[NewItem] = Field(default=[], max_length=1000, description="Answered from now on.")

    @model_validator(mode="after")
    def _something(self) -> ItemsRequest:
        if not (self.withdraw or self.restore or self.add):
            raise ValueError("name items to withdraw, to restore or to add")
        return self

    def plain(self) -> dict[str, Any]:
        """As `changes.change` takes them."""
        return {
            "withdraw": self.withdraw,
            "restore": self.restore,
            "add": [one.model_dump(exclude_none=True) for one in self.add],
        }


def with_items(one: Generation, changes: Changes) -> Generation:
    """The generation of the same bundle with these changes."""
    return dataclasses.replace(one, name=one.bundle + changes.stamp)


def carried(had: Changes, withdraw: Iterable[str], restore: Iterable[str] = ()) -> Changes:
    """What another generation takes over: what is withdrawn and what no more is, on top of its own."""
    return dataclasses.replace(had, withdrawn=tuple(sorted({*had.withdrawn, *withdraw} - {*restore})))


def to_bytes(changes: Changes) -> bytes:
    """As they are kept. Raises ApiError (422) for more than fits."""
    if len(changes.added) > MOST:
        raise ApiError(422, "too_many_items", f"{MOST} new items are the most; ship a bundle", "body.add")
    data = json.dumps(dataclasses.asdict(changes)).encode()
    if len(data) > KEPT_BYTES:
        raise ApiError(422, "too_many_items", "the changes grow too large; ship a bundle", "body")
    return data


def changes_of(shelf: Shelf, one: Generation) -> Changes:
    """The changes of a generation. Raises ArtefactError where nobody kept them."""
    if not one.changed:
        return Changes()
    data = shelf.get(one.name)
    if data is None:
        raise ArtefactError("its changes of items are kept no more", where=one.name, fix="send them again")
    held = json.loads(data)
    added = [Added(new["item"], tuple(new["vector"]), new["features"]) for new in held["added"]]
    return Changes(tuple(held["withdrawn"]), tuple(added))
