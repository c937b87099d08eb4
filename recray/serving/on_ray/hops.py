"""From an ingress to the replicas that have the models, and what is done when one of them dies."""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from recray.bundles.bundle import Front
from recray.errors import ArtefactError
from recray.serving.cache import Caching
from recray.serving.ingress import Ingress, Split
from recray.serving.schema import ApiError
from recray.serving.settings import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

TRIES = 3  # of a hop whose replica dies; another replica is asked, since every stage is a pure function


class Hop:
    """One method of another deployment, asked again elsewhere when its replica dies; `first` are its first
    arguments."""

    def __init__(self, handle: Any, method: str, *first: Any) -> None:
        self._method, self._where, self._first = getattr(handle, method), f"{handle.deployment_name}", first

    async def __call__(self, *asks: Any) -> Any:
        for tried in range(TRIES):
            try:
                return await self._method.remote(*self._first, *asks)
            except (RayActorError, ReplicaUnavailableError):
                await asyncio.sleep(0.02 * tried)  # the router has dropped the dead one by now
            except (DeploymentUnavailableError, BackPressureError):
                break
        raise ApiError(503, "unavailable", "a stage does not answer now", self._where)


def split_between(
    front: Front, batch: Batch, retriever: Any, ranker: Any | None, caching: Caching
) -> Ingress:
    """A generation whose models are in other replicas."""
    name = front.generation
    if ranker is None and front.artefact.holds("ranker"):
        raise ArtefactError("has a ranker, and this application has no Ranker replicas", where=name)
    ranks = ranker is not None and front.artefact.holds("ranker")
    hops = (retriever, ranker) if ranks else (retriever,)
    split = Split(
        front,
        batch,
        retrieve=Hop(retriever, "retrieve", name),
        similar=Hop(retriever, "similar", name),
        aside=Hop(retriever, "aside", name),
        rank=Hop(ranker, "rank", name) if ranks else None,
        generations=[Hop(handle, "holds", name) for handle in hops],
    )
    return Ingress(front, split, caching)
