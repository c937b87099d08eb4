"""Where an application's state lies on a cluster, and how all of its replicas are reached.

The pointer is kept in the key-value store of the cluster's head, as Serve's own state is: one key a version,
written only where there is none, so of two writers one has won. What is kept is a few hundred bytes.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Sequence
from typing import Any

from recray.serving.generations import State
from recray.serving.resident import Ack
from recray.serving.schema import ApiError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    from ray import serve
    from ray.exceptions import RayError
    from ray.experimental import internal_kv
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

SPACE = "recray"
KEPT = 8  # versions before the newest
SHELVES = 32  # generations' changes of items, before those that nobody names go
TALK_S = 600.0  # what replicas may take to follow, loading included
ASK_S = 5.0  # what they may take for anything else


class KeptPointer:
    """The pointer of one running application; `first` is its state before anybody has written one."""

    def __init__(self, run: str, first: State) -> None:
        self._prefix, self._first = f"generations/{run}/", first
        self._shelf = f"changes/{run}/"

    def read(self) -> State:
        """The state of the highest version."""
        for _ in range(3):
            keys = internal_kv._internal_kv_list(self._prefix, namespace=SPACE)
            if not keys:
                return self._first
            found = internal_kv._internal_kv_get(max(keys), namespace=SPACE)
            if found is not None:  # else it was the oldest of those kept, and we were slow
                return State.from_dict(json.loads(found))
        raise ApiError(503, "unavailable", "the pointer changes too fast to be read")

    def write(self, state: State) -> bool:
        """Put down a version; False where there is one."""
        text = json.dumps(state.as_dict())
        there = internal_kv._internal_kv_put(self._key(state.version), text, False, namespace=SPACE)
        if not there and state.version > KEPT:
            internal_kv._internal_kv_del(self._key(state.version - KEPT), namespace=SPACE)
        return not there

    def put(self, name: str, data: bytes) -> None:
        """Keep the changes of a generation; see `items.Shelf`. Old ones go when there are many."""
        internal_kv._internal_kv_put(self._shelf + name, data, True, namespace=SPACE)
        keys = internal_kv._internal_kv_list(self._shelf, namespace=SPACE)
        if len(keys) > SHELVES:
            wanted = {self._shelf + one.name for one in self.read().resident} | {self._shelf + name}
            for key in keys:
                if (key.decode() if isinstance(key, bytes) else key) not in wanted:
                    internal_kv._internal_kv_del(key, namespace=SPACE)

    def get(self, name: str) -> bytes | None:
        """What was kept for a generation."""
        found: bytes | None = internal_kv._internal_kv_get(self._shelf + name, namespace=SPACE)
        return found

    def _key(self, version: int) -> str:
        return f"{self._prefix}{version:010d}"


async def follow_all(app: str, deployments: Sequence[str]) -> tuple[list[Ack], bool]:
    """Every replica's word after it has followed, and whether those are all that run. ApiError: 503."""
    try:
        told = [_told(app, name, "follow", TALK_S) for name in deployments]
        acks = [ack for one in await asyncio.gather(*told) for ack in one]
        running = await asyncio.to_thread(_running, app, deployments)
    except (RayError, RayServeException, TimeoutError) as error:
        words = f"not every replica answers now ({type(error).__name__})"
        raise ApiError(503, "unavailable", words) from None
    return acks, running <= {ack.replica for ack in acks}


async def tallies_of(app: str, deployment: str) -> list[Any]:
    """The tallies of every ingress replica that answers."""
    try:
        return await _told(app, deployment, "tallies", ASK_S)
    except (RayError, RayServeException, TimeoutError):
        return []


async def _told(app: str, deployment: str, method: str, within_s: float) -> list[Any]:
    handle = serve.get_deployment_handle(deployment, app)
    return list(await handle.broadcast(method).results_async(timeout_s=within_s))


def _running(app: str, deployments: Sequence[str]) -> set[str]:
    details = _get_global_client().get_serve_details()["applications"][app]["deployments"]
    replicas = [one for name in deployments for one in details[name]["replicas"]]
    return {one["replica_id"] for one in replicas if one["state"] == "RUNNING"}


def own_name() -> tuple[str, str]:
    """(application, id) of the replica that this process is."""
    context = serve.get_replica_context()
    return context.app_name, context.replica_id.unique_id
