"""What recommendations cost: C = requests x compute + storage, made concrete for one rented machine.

A machine's price an hour is parted between its cores and its memory as list prices of clouds part it: a core
costs about as much as GB_A_CORE gigabytes. Per request then: seconds of a core, of which only BUSY can be
sold (the rest waits for the next request to come). Storage: what every replica holds, for as long as the
requests take to come. Pure arithmetic, no measuring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recray.errors import ConfigError

GB_A_CORE = 7.5  # gigabytes of memory at the price of a core
BUSY = 0.7  # of a core's time that is sold before requests wait long
PROCESS = 430e6  # bytes of a replica before it holds a model
REQUESTS = 1000


@dataclass(frozen=True, kw_only=True)
class Price:
    """A machine's price: `hour` (in any currency) for `cores` and `memory_gb`. The default is about what a
    cloud's list asks for two cores and 8 GB in dollars. Raises ConfigError for what is not above zero."""

    hour: float = 0.10
    cores: float = 2.0
    memory_gb: float = 8.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ConfigError(f"price {name} is {value:g}", fix="write hour=0.10,cores=2,memory_gb=8")

    @property
    def core_second(self) -> float:
        """Of one core."""
        return self.hour / (self.cores + self.memory_gb / GB_A_CORE) / 3600

    @property
    def byte_second(self) -> float:
        """Of one byte of memory."""
        return self.core_second / GB_A_CORE / 1e9


@dataclass(frozen=True)
class Bill:
    """Of 1,000 recommendations; a difference of two bills (Delta C) is a bill, too."""

    compute: float
    storage: float

    @property
    def total(self) -> float:
        """C = requests x compute + storage."""
        return self.compute + self.storage

    def __sub__(self, other: Bill) -> Bill:
        return Bill(self.compute - other.compute, self.storage - other.storage)

    def as_dict(self) -> dict[str, float]:
        """With the total."""
        return {"compute": self.compute, "storage": self.storage, "total": self.total}


def bill(core_s: float, size: float, price: Price, rps: float = 0.0, least: int = 1) -> Bill:
    """1,000 recommendations of `core_s` seconds of a core each, by replicas that hold `size` bytes.

    rps: the load; 0 is one replica that answers one client after the other. There are as many replicas as
    keep each BUSY at the most, each on a core, and at least `least`.
    """
    rate = rps or BUSY / core_s
    replicas = max(least, math.ceil(rate * core_s / BUSY - 1e-9))
    compute = REQUESTS * core_s / BUSY * price.core_second
    return Bill(compute, replicas * (PROCESS + size) * REQUESTS / rate * price.byte_second)
