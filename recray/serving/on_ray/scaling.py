"""The door of `serving.scaling` to Ray Serve: one policy for all deployments of an application.

Serve calls an application's `autoscaling_policy` in its controller, with what handles count and what our
replicas say by `record_autoscaling_stats`; it takes one only by a config (`serve deploy`, or its REST door),
so `start` sends a config where a target is given. The class is copied there with this module: what it needs
is imported, and it never raises, since that would stop the scaling of every application.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from recray.serving import scaling

POLICY, BUILD = "recray.serving.on_ray.scaling:Together", "recray.serving.on_ray:build_app"
CADENCE: Mapping[str, Any] = {  # of `autoscaling_config` beside a target, where the file says nothing else
    "metrics_interval_s": 1.0,
    "look_back_period_s": 10.0,
    "upscale_delay_s": 0.0,  # the policy is patient itself
    "downscale_delay_s": 0.0,
}
LEAST: Mapping[str, Any] = {"min_replicas": 1, "target_ongoing_requests": 16}
LOOK_S = 1.0  # between two looks; Serve calls ten times as often


class Together:
    """Sizes all stages together from the target that the ingress says; without one, nothing is changed."""

    def __init__(self, calm_s: float = 60.0, drain_s: float = 10.0) -> None:
        self._calm_s, self._drain_s = float(calm_s), float(drain_s)
        self._watch, self._memory, self._looked = scaling.Watch(), scaling.Memory(), 0.0

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Deployment -> replicas, for those that scale; empty for no change."""
        if time.monotonic() < self._looked + LOOK_S:
            return {}, {}
        self._looked = time.monotonic()
        try:
            return self._look(contexts), {}
        except Exception:
            logging.getLogger("ray.serve").exception("the size of the application stays as it is")
            return {}, {}

    def _look(self, contexts: Mapping[Any, Any]) -> dict[Any, int]:
        pools, said = {}, {}
        for context in contexts.values():
            name, reports = context.deployment_name, _by_replica(context.raw_metrics or {})
            self._watch.keep(name, list(reports))
            for replica, series in reports.items():
                self._watch.see(name, replica, series)
                said[name] = {key: line[-1][1] for key, line in series.items() if line}
            pools[name] = scaling.Pool(
                works=self._watch.works(name, int(said.get(name, {}).get("size", 1))),
                least=context.capacity_adjusted_min_replicas,
                most=context.capacity_adjusted_max_replicas,
            )
        ids = {context.deployment_name: one for one, context in contexts.items()}
        door, told = contexts.get(ids.get("Ingress")), said.get("Ingress", {})
        if door is None or (not told.get("target_ms") and door.current_num_replicas):
            return {}
        aim = scaling.Aim(
            target_s=told.get("target_ms", 1000.0) / 1e3,
            fixed_s=told.get("fixed_ms", 0.0) / 1e3,
            calm_s=self._calm_s,
            drain_s=self._drain_s,
        )
        seen = scaling.Seen(
            now=time.monotonic(),
            rate=self._watch.rate,
            ongoing=door.total_num_requests,
            counts={name: contexts[one].target_num_replicas for name, one in ids.items()},
            running={name: contexts[one].current_num_replicas for name, one in ids.items()},
        )
        counts, self._memory = scaling.decide(pools, aim, seen, self._memory)
        return {ids[name]: count for name, count in counts.items()}


def paced(given: Mapping[str, Any], replicas: int, target_ms: float | None) -> dict[str, Any]:
    """The options of a deployment, with our cadence where a target is given; it grows to `replicas` where
    the options say nothing else. A fixed number of replicas stays fixed."""
    if target_ms is None or isinstance(given.get("num_replicas"), int):
        return dict(given)
    own = given.get("autoscaling_config") or {}
    return {**given, "autoscaling_config": {**LEAST, "max_replicas": replicas, **CADENCE, **own}}


def declaration(
    args: Mapping[str, Any],
    deployments: Mapping[str, Mapping[str, Any]],
    policy: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The application of a Serve config that has our policy, with what `policy` says of it; without its
    name and prefix."""
    own = []
    for name, given in deployments.items():
        options = dict(given)
        if options.get("autoscaling_config") is not None:
            options["autoscaling_config"] = {**LEAST, **CADENCE, **options["autoscaling_config"]}
        own.append({"name": name, **options})
    made = {"import_path": BUILD, "args": dict(args), "deployments": own}
    return {**made, "autoscaling_policy": {"policy_function": POLICY, **policy}}


def _by_replica(metrics: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Replica -> metric -> its points, from Ray's metric -> replica -> points."""
    made: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, replicas in metrics.items():
        for replica, points in replicas.items():
            line = [(point.timestamp, point.value) for point in points]
            made.setdefault(str(replica), {})[name] = line
    return made
