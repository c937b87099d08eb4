"""An honest latency: one measurement a machine at a time, in a pinned process of its own.

Two trials that share a machine measure each other, so an exclusive file lock is the machine's one
measuring slot, whatever number of raylets or searches run on it. The child holds the lock's file as
well: a killed parent does not free the slot while its child still runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import recray
from recray.errors import ConfigError, RecrayError
from recray.storage import scratch

SLOT = Path("/tmp/recray-measuring.lock")
STARTUP = 180.0  # seconds a child may take to open what it measures
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BOOTSTRAPS = 200


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a measurement goes on. It ends when the 95 % interval of p99 is narrow, or at the cap.

    width: (high - low) / p99 that is narrow. least, most: requests. seconds: cap of the timed part,
    looked at after every 100 requests, since fewer tell nothing of a p99.
    warmup: requests before the first counted one. threads: of every library in the child.
    rate: requests a second that arrive at this process, one at a time and at random; 0: the next one comes
    when the last is answered. beside: seconds of the same core that each of them takes elsewhere (HTTP).
    """

    width: float = 0.2
    least: int = 400
    most: int = 20_000
    seconds: float = 10.0
    warmup: int = 50
    threads: int = 1
    rate: float = 0.0
    beside: float = 0.0

    def __post_init__(self) -> None:
        low = min(self.warmup, self.rate, self.beside)
        if min(self.width, self.seconds) <= 0 or min(self.least, self.threads) < 1 or low < 0:
            raise ConfigError(f"a measurement cannot be taken with {self}", fix="give more than zero")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Seconds of one request, and how sure its p99 is.

    low, high: 95 % interval of p99. narrow: whether it became as narrow as asked before the cap; the
    interval is told either way. cpu: share of the time that the child had its core (below about .95
    something else ran there). repeats: requests timed; seconds: what timing them took. mean: of answering
    alone, without waiting in the queue of a load. stages: the parts of a request, their p50 and p99.
    """

    p50: float
    p95: float
    p99: float
    low: float
    high: float
    narrow: bool
    cpu: float
    repeats: int
    seconds: float
    mean: float = 0.0
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def measure(call: str, arguments: Mapping[str, Any], effort: Effort | None = None) -> Measurement:
    """Time what `call` makes, in a fresh pinned child process, while holding the measuring slot.

    call: "module:function"; the child imports it and calls it with `arguments` (plain JSON), which gives
    `(ask, n)`: ask(i) answers the i-th of n requests. Raises RecrayError when the child fails.
    """
    effort = effort or Effort()
    with scratch() as folder:
        result = folder / "result.json"
        order = {
            "call": call,
            "arguments": dict(arguments),
            "effort": asdict(effort),
            "core": quiet_core(),
            "result": str(result),
            "parent": os.getpid(),
        }
        with slot() as lock:
            _run(order, effort, lock)
        found = json.loads(result.read_bytes())
    if "error" in found:
        raise RecrayError(f"the measured process failed: {found['error']}")
    return Measurement(**found)


@contextlib.contextmanager
def slot(path: Path = SLOT, *, shared: bool = False) -> Iterator[int]:
    """Wait for the machine's measuring slot and hold it for the block; yields the lock's descriptor.

    shared: for work that is not measured but would disturb a measurement. Any number may hold it
    together, and a measurement waits for all of them.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        try:
            handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            with contextlib.suppress(OSError):
                os.fchmod(handle, 0o666)  # other users of the machine share the slot, whatever our umask
        except FileExistsError:
            handle = os.open(path, flags)
    except OSError as error:
        hint = "it must be a plain file" if error.errno == errno.ELOOP else "make it readable and writable"
        raise RecrayError(
            f"the measuring slot cannot be taken ({error.strerror})", where=path, fix=hint
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def quiet_core() -> int | None:
    """The core to pin to: the last this process may use; None where there is one, or no pinning."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[-1] if len(cores) > 1 else None


def interval_of_p99(blocks: list[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % interval of the 99th percentile of all timings: the wider of two.

    Order statistics: the k-th smallest of n lies below p99 with binomial probability, which assumes
    independent timings. Bootstrap over blocks: noise comes in bursts, so whole blocks (taken one after
    the other) are drawn again.
    """
    from scipy.stats import binom

    times = np.sort(np.concatenate(blocks))
    n = len(times)
    at_low = max(int(binom.ppf(0.025, n, 0.99)) - 1, 0)
    at_high = min(int(binom.ppf(0.975, n, 0.99)), n - 1)
    low, high = float(times[at_low]), float(times[at_high])
    if len(blocks) >= 5:
        rng = np.random.default_rng(n)
        drawn = rng.integers(len(blocks), size=(BOOTSTRAPS, len(blocks)))
        tails = [np.percentile(np.concatenate([blocks[i] for i in row]), 99) for row in drawn]
        low, high = min(low, float(np.percentile(tails, 2.5))), max(high, float(np.percentile(tails, 97.5)))
    return low, high


def _run(order: Mapping[str, Any], effort: Effort, lock: int) -> None:
    """Start the child and wait for it; RecrayError when it dies or hangs."""
    threads = dict.fromkeys(THREAD_VARIABLES, str(effort.threads))
    paths = [str(Path(recray.__file__).parents[1]), *(p for p in sys.path if p)]
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    limit = STARTUP + 3 * effort.seconds
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "recray.tuning.probe"],
            input=json.dumps(order).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=(lock,),
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RecrayError(f"the measured process gave no answer in {limit:.0f} s") from None
    if not Path(order["result"]).exists():
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        raise RecrayError(
            f"the measured process ended with {ended.returncode} ({said[-1][:200] if said else 'no words'})"
        )
