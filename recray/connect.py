"""The one key to Ray's doors: find or start a cluster, keep its token, stop what we started."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recray.errors import InputError
from recray.progress import say

VERBOSE = "RECRAY_VERBOSE"  # =1 shows Ray's own words and those of its workers
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # =0 is Ray's way to say: bind and speak on 127.0.0.1 only
_WAIT = 15.0  # seconds for a cluster to answer


@contextlib.contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[str]:
    """Connect to `address` (or $RAY_ADDRESS), else start a cluster on this machine for the block.

    A process that is connected already is used as it is. A cluster started here listens on loopback
    only, asks every client for a token, and is stopped at the end of the block, also after Ctrl-C.

    Yields the address. Raises InputError when no cluster answers there within about 15 seconds.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    with contextlib.ExitStack() as stack:
        if target:
            _answers(target)
        else:
            _own_token()
        if not target or target.startswith(("127.", "localhost:")):
            stack.enter_context(_loopback_only())
        stack.callback(_stop)
        _init(target, num_cpus)
        if target:
            say(f"connected to the Ray cluster at {target}")
        import ray as connected

        yield connected.get_runtime_context().gcs_address


def _init(target: str | None, num_cpus: int | None) -> None:
    verbose = os.environ.get(VERBOSE) == "1"
    level = logging.INFO if verbose else logging.ERROR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        arguments: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
        if target:
            arguments["address"] = target
        else:
            arguments |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        try:
            if target:
                _within(_WAIT, lambda: ray.init(**arguments))
            else:
                _reload_token()
                ray.init(**arguments)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            if not target:
                raise
            words = str(error).strip().splitlines()
            raise _unreachable(target, words[0] if words else type(error).__name__) from None


def _stop() -> None:
    """Disconnect; a cluster that this process started ends with it."""
    import ray

    ray.shutdown()


def _own_token() -> None:
    """One token for all clusters that this process starts, unless the user has set one.

    Ray caches mode and token in the process at first use, so a second session must use the same.
    """
    if any(os.environ.get(f"RAY_AUTH_{name}") for name in ("MODE", "TOKEN", "TOKEN_PATH")):
        return
    folder = Path(tempfile.mkdtemp(prefix="recray-token-"))
    atexit.register(_remove_token, folder, os.getpid())
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})


def _remove_token(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork must not take its parent's token away
        shutil.rmtree(folder, ignore_errors=True)


def _reload_token() -> None:
    """Make a Ray that was imported before the token was made see it."""
    _raylet: Any = importlib.import_module("ray._raylet")
    _raylet.Config.initialize("")
    _raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Inside the block, clusters bind 127.0.0.1; collectives of their workers use it too."""
    from ray._private import ray_constants

    before = {name: os.environ.get(name) for name in (_LOOPBACK, "GLOO_SOCKET_IFNAME")}
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[_LOOPBACK] = "0"
    if before["GLOO_SOCKET_IFNAME"] is None and sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment at import only
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _answers(target: str) -> None:
    """Look for a listener before Ray does: it waits for minutes, or ends the process."""
    if target in ("auto", "local") or "://" in target:
        return
    host, colon, port = target.rpartition(":")
    if not colon or not port.isdigit():
        raise InputError("is not an address of a Ray cluster", where=target, fix="write HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(target, str(error)) from None
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=5)
        except grpc.FutureTimeoutError:
            raise _unreachable(target, "what listens there is something else") from None


def _within(seconds: float, call: Any) -> None:
    """Run `call` in a thread for at most so long; its error is raised here."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if caught:
        raise caught[0]


def _unreachable(target: str, why: str) -> InputError:
    return InputError(
        f"no Ray cluster answers here ({why})",
        where=target,
        fix="check the address, and RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH if it asks for a token",
    )
