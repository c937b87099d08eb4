"""What one replica holds: every generation that the pointer names, and no other.

Following a state is all there is: at birth, when told to, and now and then on one's own. It loads what is
missing beside what answers, and lets go of what is no longer named; a request that is under way keeps what
it was stamped with until it is answered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from recray.serving.generations import Generation, State

Held = TypeVar("Held")


@dataclass(frozen=True, kw_only=True)
class Ack:
    """What a replica says after it has followed: what it holds, and why not the rest."""

    replica: str
    version: int
    holds: tuple[str, ...]
    problems: dict[str, str] = field(default_factory=dict)


class Resident(Generic[Held]):
    """`load(generation, current)` opens a bundle, given what answers now (None at birth), and raises for one
    that must not be held. `vary(generation, held)` makes it of one of the same bundle with other items,
    which is quicker. Raises at birth only when the current generation cannot be held."""

    def __init__(
        self,
        load: Callable[[Generation, Held | None], Held],
        state: State,
        *,
        replica: str = "",
        vary: Callable[[Generation, Held], Held] | None = None,
    ) -> None:
        self._load, self._vary, self._replica = load, vary, replica
        self._lock = threading.Lock()  # one load at a time
        self._failed: dict[str, str] = {}
        self._version = state.version
        self.state = state
        self.held: dict[str, Held] = {state.current.name: load(state.current, None)}
        self.follow(state)

    def get(self, name: str) -> Held | None:
        """What is held under a name; None means refuse."""
        return self.held.get(name)

    def follow(self, state: State) -> Ack:
        """Hold what a state names; an older one than is known changes nothing. May take as long as loading
        does, so it belongs on a thread of its own; the state itself counts at once."""
        if state.version > self.state.version:
            self.state = state
        with self._lock:
            now = self.state
            names, before = {one.name for one in now.resident}, self.held
            self.held = {name: one for name, one in self.held.items() if name in names}
            if now.version != self._version:  # another step: what failed in the last one is tried again
                self._failed, self._version = {}, now.version
            for one in now.resident:
                if one.name in self.held or one.name in self._failed:
                    continue
                try:
                    loaded = self._loaded(one, before, self.held.get(now.current.name))
                except Exception as error:
                    self._failed[one.name] = str(error) or type(error).__name__
                else:
                    self.held = {**self.held, one.name: loaded}
                    before = {**before, one.name: loaded}
            return Ack(
                replica=self._replica,
                version=now.version,
                holds=tuple(self.held),
                problems=dict(self._failed),
            )

    def _loaded(self, one: Generation, held: Mapping[str, Held], current: Held | None) -> Held:
        """From another of the same bundle where there is one, else from its folder."""
        kin = [name for name in held if name.partition("+")[0] == one.bundle]
        if kin and self._vary is not None:
            return self._vary(one, held[kin[0]])
        return self._load(one, current)
