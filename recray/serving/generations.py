"""Which bundles an application answers from: a pointer with a version, and the steps it can take.

A state names the current generation, the one before it, and maybe a next one: loading while its share is 0,
on canary while it is above. Each step makes the state of the next version, and whoever writes a version
first has won (`Pointer`), so two who ship at a time cannot both. Replicas hold all that the state names
(`resident.Resident`); a request is stamped with one of them and answered by that one alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from recray.errors import InputError

LOAD_S = 900.0  # after so long a generation that is still loading no longer stands in another's way


@dataclass(frozen=True)
class Generation:
    """One bundle: its name (the first 12 letters of its hash, and what changed since; see `items`) and where
    replicas find it."""

    name: str
    uri: str

    @property
    def bundle(self) -> str:
        """The name without what changed since."""
        return self.name.partition("+")[0]

    @property
    def changed(self) -> bool:
        """Whether items were added or withdrawn since it was built."""
        return "+" in self.name


@dataclass(frozen=True, kw_only=True)
class State:
    """What the pointer says. Steps raise InputError where they cannot be taken."""

    current: Generation
    previous: Generation | None = None
    next: Generation | None = None
    share: float = 0.0  # of users whom `next` answers
    since: float = 0.0  # seconds since 1970 when `next` was named
    why: str = "started"  # words for the newest step
    version: int = 1

    @property
    def resident(self) -> tuple[Generation, ...]:
        """All that a replica holds, the most needed first."""
        named = (self.current, self.next, self.previous)
        return tuple({one.name: one for one in named if one is not None}.values())

    def order(self, key: str) -> list[str]:
        """Whom a request is stamped with, and whom in turn where that one is refused."""
        named = [one.name for one in (self.current, self.previous) if one is not None]
        if self.next is None or not self.share:
            return named
        chosen = bucket(self.next.name, key) < self.share
        return [self.next.name, *named] if chosen else [*named, self.next.name]

    def load(self, one: Generation, now: float) -> State:
        """Name the next one, which nobody is answered from yet."""
        if self.next is not None and (self.share or now < self.since + LOAD_S):
            words = f"generation {self.next.name} is {'on canary' if self.share else 'being loaded'}"
            raise InputError(words, fix="wait for it, ship it whole, or roll it back")
        return self._step(next=one, share=0.0, since=now, why=f"loading {one.name}")

    def split(self, share: float) -> State:
        """Let the next one answer a share of the users."""
        assert self.next is not None
        return self._step(share=share, why=f"{self.next.name} answers {share:.2%} of the users")

    def flip(self) -> State:
        """Make the next one the current."""
        assert self.next is not None
        return self._step(
            current=self.next, previous=self.current, next=None, share=0.0, why=f"shipped {self.next.name}"
        )

    def change(self, before: Generation | None) -> State:
        """Make the next one, which is the current with other items, the current; `before` stays the one to
        roll back to."""
        assert self.next is not None
        return self._step(
            current=self.next, previous=before, next=None, share=0.0, why=f"items changed: {self.next.name}"
        )

    def drop(self, why: str) -> State:
        """Forget the next one."""
        return self._step(next=None, share=0.0, why=why)

    def back(self) -> State:
        """Roll back: the next one is dropped if there is one, else the one before is current again."""
        if self.next is not None:
            return self.drop(f"rolled back {self.next.name}")
        if self.previous is None:
            raise InputError("there is nothing to roll back to", fix="ship a bundle first")
        return self._step(
            current=self.previous, previous=self.current, why=f"rolled back to {self.previous.name}"
        )

    def _step(self, **changes: Any) -> State:
        return dataclasses.replace(self, version=self.version + 1, **changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> State:
        """The state that `as_dict` told."""
        named = {role: told[role] and Generation(**told[role]) for role in ("current", "previous", "next")}
        return cls(**{**told, **named})


class Pointer(Protocol):
    """Where the state lies, the same for all replicas; calls may block."""

    def read(self) -> State:
        """The state of the highest version."""
        ...

    def write(self, state: State) -> bool:
        """Put down a version; False where somebody else has written that one."""
        ...


def bucket(salt: str, key: str) -> float:
    """A number in [0, 1) that a key keeps for as long as the salt is the same."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
