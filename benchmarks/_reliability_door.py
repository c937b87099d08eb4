"""A whole application in this process, without Ray: one ingress replica that answers, ships, takes events and
new items, and keeps its answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recray.bundles.bundle import Bundle, open_bundle
from recray.bundles.changes import with_changes
from recray.serving import auth, parity
from recray.serving.answers import AnswerLog, Keeping
from recray.serving.canary import Tally
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.items import changes_of
from recray.serving.resident import Ack, Resident
from recray.serving.router import Router
from recray.serving.seen import Seen
from recray.serving.settings import Batch
from recray.serving.shipping import Shipper
from recray.serving.state import open_state


class Board:
    """A pointer and a shelf in memory; all that the pointer ever was is kept."""

    def __init__(self, first: State) -> None:
        self.kept = [first]
        self.shelf: dict[str, bytes] = {}

    def read(self) -> State:
        return self.kept[-1]

    def write(self, state: State) -> bool:
        if state.version != self.kept[-1].version + 1:
            return False
        self.kept.append(state)
        return True

    def put(self, name: str, data: bytes) -> None:
        self.shelf[name] = data

    def get(self, name: str) -> bytes | None:
        return self.shelf.get(name)


@contextlib.contextmanager
def door(bundle: Bundle, folder: Path, admin: str) -> Iterator[Any]:
    """The application of a bundle; its events and answers lie in `folder`; admin: its admin's token."""
    board = Board(State(current=Generation(bundle.generation, bundle.artefact.place.uri)))

    def answering(made: Bundle) -> Ingress:
        return Ingress(made, Fused(made, Batch()))

    def load(one: Generation, now: Ingress | None) -> Ingress:
        opened = bundle if now is None else open_bundle(one.uri, threads=1)
        return answering(with_changes(opened, changes_of(board, one)))

    def vary(one: Generation, held: Ingress) -> Ingress:
        assert isinstance(held.front, Bundle)
        made = with_changes(held.front, changes_of(board, one))
        parity.sound(made)
        return answering(made)

    async def everyone() -> tuple[list[Ack], bool]:
        return [resident.follow(board.read())], True

    async def counts() -> list[Mapping[str, Tally]]:
        return [router.tallies]

    resident = Resident(load, board.read(), vary=vary)
    router = Router(resident, lambda: None)
    answers, users = AnswerLog(folder, Keeping(hours=1)), open_state(str(folder))
    assert users is not None
    try:
        yield build_asgi(
            router,
            users=users,
            admin_digest=auth.digest(admin),
            steps=Shipper(router, board, everyone, counts, shelf=board),
            seen=Seen(kept=answers, held=lambda: resident.held),
        )
    finally:
        answers.close()
        users.close()
