"""What is counted in a replica, told to Ray's metrics: the agent of each node has it scraped by Prometheus.

Ray takes some microseconds for a number, so it is told totals now and then, not requests one by one.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from recray.money import Price
from recray.serving.metrics import METRICS, Meter, gathered, used, worked
from recray.serving.on_ray.pointer import own_name
from recray.serving.router import Router
from recray.serving.scaling import Batches

log = logging.getLogger("recray.serving")
NOTHING = 1e-9  # what a counter of nothing is told, to be there at all: Ray takes nothing that is not above 0


class Teller:
    """Hands the counts of the replica that this process is to Ray, labelled with its application and
    deployment."""

    def __init__(self, deployment: str, meter: Meter, price: Price, batches: Batches) -> None:
        self._meter, self._price, self._batches = meter, price, batches
        self._tags = {"application": own_name()[0], "deployment": deployment}
        self._made: dict[str, Any] = {}
        self._failed = False

    def tell(self, router: Router | None = None) -> None:
        """Hand over what has changed since the last time; router: an ingress's, to look at its queues.
        What goes wrong is said once: a count that is lost harms nobody, a replica that is called ill does."""
        try:
            self._tell(router)
        except Exception as error:
            if not self._failed:
                log.warning("metrics cannot be told: %s", error)
            self._failed = True

    def _tell(self, router: Router | None) -> None:
        used(self._meter, self._price)
        worked(self._meter, self._batches.sums())
        if router is not None:
            gathered(self._meter, router)
        for sample in self._meter.collect():
            made = self._made.get(sample.name)
            if made is None:
                made = self._made[sample.name] = self._metric(sample.name)
            if sample.kind == "gauge":
                made.set(float(sample.value), sample.labels)
            else:
                made.inc(float(max(sample.value, NOTHING)), sample.labels)

    def _metric(self, name: str) -> Any:
        whole, _, part = name.rpartition("_")
        metric = METRICS[name] if name in METRICS else METRICS[whole]
        labels = (*metric.labels, *(("le",) if name not in METRICS and part == "bucket" else ()))
        kind = Gauge if metric.kind == "gauge" else Counter
        return kind(f"recray_{name}", metric.about, (*labels, *self._tags)).set_default_tags(self._tags)


def metrics_url() -> str:
    """Where one node of the connected cluster tells its metrics; the others have the same on theirs."""
    node = next(node for node in ray.nodes() if node["Alive"])
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
