"""Starting and stopping: Serve on a cluster for the length of a block, and one application on it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from recray import connect
from recray.config import build, parse_duration
from recray.errors import ConfigError, InputError, RecrayError
from recray.manifest import open_artefact
from recray.progress import say
from recray.serving import auth, process, profiles, settings
from recray.serving.on_ray.graph import cluster, graph, machines, options_of, running_http, running_profile
from recray.serving.on_ray.metrics import metrics_url
from recray.serving.on_ray.scaling import declaration
from recray.serving.profiles import Profile
from recray.serving.settings import GraphArgs
from recray.storage import place

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    import ray
    from ray import serve
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

STOP_S = 30.0  # what Serve may take to stop


@contextlib.contextmanager
def serving(
    bundle: str | os.PathLike[str],
    *,
    config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    address: str | None = None,
    name: str = "recray",
    profile: Profile = "lite",
    p99: str | None = None,
    state: str | None = None,
    feedback: str | None = None,
) -> Iterator[str]:
    """Serve a bundle for the length of the block; yields the base URL, ready to be asked.

    config: a Serve config whose args and deployment options count (its bundle, host and port do not).
    port 0 takes a free one; profile: see `profiles`; p99 ("50ms"), state, feedback: see `GraphArgs`, before
    the file's own.
    Without a state one is kept for the length of the block. A cluster at `address` (or the process's own) is
    used, else one is started; where Serve runs already, this becomes one more application, under
    `/<name>`. All that was started is stopped at the end, also after Ctrl-C or SIGTERM.

    Raises InputError, before anything starts, for a busy port or for a host beyond loopback without a
    token; ArtefactError for what is no bundle; ConfigError for the file or the profile.
    """
    profiles.check(profile)
    args, deployments = settings.read_file(config) if config is not None else ({}, {})
    policy = settings.policy_of(config) if config is not None else {}
    args["bundle"] = open_artefact(place(bundle), "bundle").place.uri
    args = auth.with_digests(args, token)
    auth.check_exposure(host, args.get("token_digest"))
    p99_ms = None if p99 is None else 1e3 * parse_duration(p99, what="p99")
    own = (("state", state), ("feedback", feedback), ("p99_ms", p99_ms))
    args |= {key: value for key, value in own if value is not None}
    if "layout" not in args and {"Retriever", "Ranker"} & set(deployments):
        args["layout"] = "split"
    build(GraphArgs, args)
    for deployment, given in deployments.items():
        options_of(deployment, given)
    if args.get("p99_ms") is not None and isinstance(deployments.get("Ingress", {}).get("num_replicas"), int):
        words = "Ingress has a fixed num_replicas beside a target of p99: nothing would be scaled"
        raise ConfigError(words, where=str(config), fix="give it an autoscaling_config, or leave p99_ms out")
    if not (address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        process.check_free(host, port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process.sigterm_interrupts())
        stack.enter_context(connect.session(address))
        stack.enter_context(process.sigterm_interrupts())  # Ray has set its own
        stack.enter_context(_quiet())
        root = stack.enter_context(_serve_on(host, port, args.get("token_digest"), profile))
        args = stack.enter_context(_with_state(args))
        app, names = graph(args, deployments, running_profile())
        there = {name: given for name, given in deployments.items() if name in names}
        declared = declaration(args, there, policy) if args.get("p99_ms") is not None else None
        yield stack.enter_context(_application(app, name, root, declared))


def run(
    bundle: str | os.PathLike[str],
    *,
    config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    address: str | None = None,
    profile: Profile = "lite",
    p99: str | None = None,
    state: str | None = None,
    feedback: str | None = None,
) -> None:
    """`serving`, until Ctrl-C or SIGTERM."""
    try:
        with serving(
            bundle, config=config, host=host, port=port, token=token, address=address, profile=profile,
            p99=p99, state=state, feedback=feedback,
        ) as url:  # fmt: skip
            also = f"documentation at {url}/docs, metrics at {metrics_url()}"
            say(f"serving {bundle} at {url} ({also}, Ctrl-C stops)")
            threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")


@contextlib.contextmanager
def _with_state(args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments with a place for the state: where none is given, a folder that goes with the block."""
    if "state" in args or machines() > 1:
        if "state" not in args:
            say("no events are kept: on several machines that takes --state redis://HOST:PORT/0")
        yield dict(args)
        return
    with tempfile.TemporaryDirectory(prefix="recray-state-", ignore_cleanup_errors=True) as folder:
        yield {**args, "state": folder}


@contextlib.contextmanager
def _serve_on(host: str, port: int, token_digest: str | None, profile: Profile) -> Iterator[str]:
    """Serve running on the connected cluster; yields its root URL. Stops it if it was started here."""
    running = running_http()
    if running is not None:
        auth.check_exposure(running.host, token_digest)
        if port not in (0, running.port):
            raise InputError(
                f"Ray Serve listens on port {running.port} of this cluster already",
                where=f"port {port}",
                fix=f"use --port {running.port} or 0",
            )
        if profile == "fast" and running_profile() != "fast":
            raise ConfigError(
                "Ray Serve runs on this cluster already, without the flags of the profile fast",
                where="--profile fast",
                fix="stop it first (`serve shutdown`), or use --profile lite",
            )
        yield process.root_url(running.host, running.port)
        return
    port = process.check_free(host, port)
    machine = cluster()
    with profiles.environment(profile, cores=machine.cores, here=machine.nodes == 1) as variables:
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
                controller_options={"runtime_env": {"env_vars": variables}} if variables else None,
            )
            yield process.root_url(host, port)
        finally:
            if not serve.status().applications:  # somebody else may have joined
                _shut_serve()


def _shut_serve() -> None:
    """`serve.shutdown()` without its wait: that is a call to an actor which dies in it, and Ray prints so
    on standard output."""
    client = _get_global_client()
    ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=STOP_S)
    deadline = time.monotonic() + STOP_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            break
        time.sleep(0.05)
    client._shutdown = True
    serve.shutdown()


@contextlib.contextmanager
def _application(app: Any, name: str, root: str, declared: dict[str, Any] | None = None) -> Iterator[str]:
    """An application for the block: the one that is bound, or what is declared, which Serve builds itself."""
    taken = _get_global_client().get_serve_details()["applications"]
    prefixes = {details["route_prefix"] for details in taken.values()}
    name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
    prefix = f"/{name}" if "/" in prefixes else "/"
    url = root + prefix.rstrip("/")
    try:
        try:
            quiet = {"enable_access_log": False, "log_level": "WARNING"}
            if declared is None:
                serve.run(app, name=name, route_prefix=prefix, logging_config=quiet)
            else:
                _declare({**declared, "name": name, "route_prefix": prefix, "logging_config": quiet})
        except RuntimeError as error:
            status = serve.status().applications.get(name)
            raise RecrayError(f"the graph did not start: {_last_line(status, error)}", where=name) from None
        process.wait_ready(url)
        yield url
    finally:
        serve.delete(name)


def _declare(declared: Mapping[str, Any]) -> None:
    """Deploy one more application by a config, beside those that were; RuntimeError where it fails."""
    client = _get_global_client()
    others = client.get_serve_details()["applications"].values()
    kept = [
        one["deployed_app_config"]
        for one in others
        if one["deployed_app_config"] and one["status"] != "DELETING"
    ]
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [*kept, declared]}))
    deadline, name = time.monotonic() + process.START_S, declared["name"]
    while time.monotonic() < deadline:
        told = serve.status().applications.get(name)
        if told is not None and told.status == "DEPLOY_FAILED":
            raise RuntimeError(told.message)
        if told is not None and told.status == "RUNNING":
            return
        time.sleep(0.1)
    raise RuntimeError(f"it is not there after {process.START_S:.0f} s")


def _last_line(status: Any, error: Exception) -> str:
    lines = [line.strip() for line in (status.message if status else str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Serve's progress lines and deprecations of its own are not for our users."""
    logger = logging.getLogger("ray.serve")
    before = logger.level
    if os.environ.get(connect.VERBOSE) != "1":
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)
