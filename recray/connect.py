"""The one key to Ray's doors: find or start a cluster, keep its token, stop what we started."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from recray.errors import InputError
from recray.progress import say


@contextlib.contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None, quiet: bool = True) -> Iterator[str]:
    """Connect to `address` (or $RAY_ADDRESS), else start a cluster on this machine for the block.

    A process that is connected already is used as it is. A cluster started here listens on loopback
    only, asks every client for a token, and is stopped at the end of the block, also after Ctrl-C.

    Yields the address. Raises InputError when the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    target = address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        if not target:
            stack.enter_context(_token())  # Ray reads the mode when it is first imported
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray

        if ray.is_initialized():
            yield ray.get_runtime_context().gcs_address
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(
                    address=target,
                    num_cpus=None if target else num_cpus,
                    include_dashboard=None if target else False,
                    logging_level=logging.ERROR if quiet else logging.INFO,
                    log_to_driver=not quiet,
                    **({} if target else {"_node_ip_address": "127.0.0.1"}),
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            if not target:
                raise
            raise InputError(f"no Ray cluster answers ({error})", where=target) from None
        stack.callback(ray.shutdown)
        if target:
            say(f"connected to the Ray cluster at {target}")
        yield ray.get_runtime_context().gcs_address


@contextlib.contextmanager
def _token() -> Iterator[None]:
    """A token for a cluster that lives as long as the block, unless the user has set one."""
    if os.environ.get("RAY_AUTH_MODE") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="recray-token-") as folder:
        path = Path(folder) / "token"
        import secrets

        path.write_text(secrets.token_hex(32))
        path.chmod(0o600)
        new = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
        os.environ.update(new)
        try:
            yield
        finally:
            for key in new:
                os.environ.pop(key, None)
