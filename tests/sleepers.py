"""An application that sleeps where ours works: four replicas are four times as fast on any machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from recray.serving.batching import Batcher
from recray.serving.scaling import Batches, Counted

TAKES_S, TARGET_MS = 0.1, 2000.0


class Sleeper(Counted):
    """An ingress that answers one request after the other."""

    def __init__(self) -> None:
        def sleep(asks: Sequence[int]) -> Sequence[int]:
            time.sleep(TAKES_S)
            return asks

        self.batches = Batches({"size": 1, "target_ms": TARGET_MS, "fixed_ms": 0.0})
        self.batcher: Batcher[int, int] = Batcher(sleep, max_size=1)
        self.batcher.noted = self.batches.add

    async def __call__(self, request: Any) -> str:
        await self.batcher(1)
        return "awake"


def build(args: dict[str, Any]) -> Any:
    """The application that Serve imports: one to four replicas."""
    from ray import serve

    cadence = {"metrics_interval_s": 1, "look_back_period_s": 4, "upscale_delay_s": 0, "downscale_delay_s": 0}
    made = serve.deployment(name="Ingress")(Sleeper).options(
        autoscaling_config={"min_replicas": 1, "max_replicas": 4, **cadence},
        max_ongoing_requests=100,
        ray_actor_options={"num_cpus": 0.1},
    )
    return made.bind()
