"""The door to Ray Serve: three deployments around `stages`, and an application that starts and stops.

`build_app` is the import path of deployments/serve/*.yaml; `serving` puts the same graph on a cluster
for the length of a block, and `run` until somebody stops it. A hop between deployments costs more
than a small model, so a request makes two at most, with a few hundred bytes each.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from recray import connect
from recray.bundles.bundle import open_bundle, open_front
from recray.config import as_dict, build
from recray.errors import ConfigError, InputError, RecrayError
from recray.manifest import open_artefact
from recray.progress import say
from recray.serving import auth, process, settings, stages
from recray.serving.http import build_asgi
from recray.serving.schema import ApiError
from recray.serving.settings import GraphArgs
from recray.storage import place

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.config import AutoscalingConfig
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
    from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

OPTIONS: Mapping[str, Any] = {  # of each deployment, where the file says nothing else
    "max_ongoing_requests": 64,
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 16},
    "ray_actor_options": {"num_cpus": 0.1},
    "health_check_period_s": 2.0,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5.0,
}
TRIES = 3  # of a hop whose replica dies; another replica is asked, since every stage is a pure function
STOP_S = 30.0  # what Serve may take to stop


class _Replica:
    """What both model replicas are: a bundle of their own, one torch thread, work in an executor."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self.args = build(GraphArgs, args)
        self.bundle = open_bundle(self.args.bundle, threads=1)

    async def generation(self) -> str:
        return self.bundle.generation

    async def pid(self) -> int:
        """The process of this replica, for whoever has to look at it (or to kill it in a test)."""
        return os.getpid()


class RetrieverReplica(_Replica):
    """A `stages.RetrieverStage` in a process of its own."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__(args)
        self.stage = stages.RetrieverStage(self.bundle, self.args.retriever)

    async def retrieve(self, ask: stages.RetrieveAsk) -> stages.Found | None:
        return await self.stage.retrieve(ask)

    async def similar(self, ask: stages.SimilarAsk) -> stages.Found | None:
        return await self.stage.similar(ask)


class RankerReplica(_Replica):
    """A `stages.RankerStage` in a process of its own."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__(args)
        self.stage = stages.RankerStage(self.bundle, self.args.ranker)

    async def rank(self, ask: stages.RankAsk) -> stages.Found | None:
        return await self.stage.rank(ask)


class IngressReplica:
    """The HTTP door: ids outside, rows inside; it holds no model."""

    def __init__(self, args: Mapping[str, Any], retriever: Any, ranker: Any | None) -> None:
        known = build(GraphArgs, args)
        self.token_digest = _token_digest(known)
        running = _running_http()
        assert running is not None
        auth.check_exposure(running.host, self.token_digest)
        if known.access_log:
            process.log_to_stderr("recray.access")
        self.ingress = stages.Ingress(
            open_front(known.bundle),
            retrieve=_Hop(retriever, "retrieve"),
            similar=_Hop(retriever, "similar"),
            rank=None if ranker is None else _Hop(ranker, "rank"),
            generations=[_Hop(handle, "generation") for handle in (retriever, ranker) if handle is not None],
        )

    def __serve_build_asgi_app__(self) -> Any:
        return build_asgi(self.ingress, token_digest=self.token_digest)


Ingress = serve.deployment(name="Ingress")(serve.ingress()(IngressReplica))
Retriever = serve.deployment(name="Retriever")(RetrieverReplica)
Ranker = serve.deployment(name="Ranker")(RankerReplica)


class _Hop:
    """One method of another deployment, asked again elsewhere when its replica dies."""

    def __init__(self, handle: Any, method: str) -> None:
        self._method, self._where = getattr(handle, method), f"{handle.deployment_name}"

    async def __call__(self, *asks: Any) -> Any:
        for tried in range(TRIES):
            try:
                return await self._method.remote(*asks)
            except (RayActorError, ReplicaUnavailableError):
                await asyncio.sleep(0.02 * tried)  # the router has dropped the dead one by now
            except (DeploymentUnavailableError, BackPressureError):
                break
        raise ApiError(503, "unavailable", "a stage does not answer now", self._where)


def build_app(args: dict[str, Any]) -> Any:
    """The application that a Serve config imports; `args` are `GraphArgs`. Raises InputError."""
    return _graph(args, {})


def _graph(args: Mapping[str, Any], deployments: Mapping[str, Mapping[str, Any]]) -> Any:
    """Ingress -> Retriever -> Ranker, or Ingress -> Retriever for a bundle without a ranker.

    `deployments` maps a deployment's name to options of Ray Serve.
    """
    known = build(GraphArgs, args)
    plain = as_dict(dataclasses.replace(known, bundle=place(known.bundle).uri))
    options = {name: _options(name, deployments.get(name, {})) for name in settings.DEPLOYMENTS}
    retriever = Retriever.options(**options["Retriever"]).bind(plain)
    ranker = None
    if stages.has_ranker(open_artefact(known.bundle, "bundle", verify=False)):
        ranker = Ranker.options(**options["Ranker"]).bind(plain)
    return Ingress.options(**options["Ingress"]).bind(plain, retriever, ranker)


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
) -> Iterator[str]:
    """Serve a bundle for the length of the block; yields the base URL, ready to be asked.

    config: a Serve config whose args and deployment options count (its bundle, host and port do not).
    port 0 takes a free one. A cluster at `address` (or the process's own) is used, else one is started;
    where Serve runs already, this becomes one more application, under `/<name>`. All that was started
    is stopped at the end, also after Ctrl-C or SIGTERM.

    Raises InputError, before anything starts, for a busy port or for a host beyond loopback without a
    token; ArtefactError for what is no bundle; ConfigError for the file.
    """
    args, deployments = settings.read_file(config) if config is not None else ({}, {})
    args["bundle"] = open_artefact(place(bundle), "bundle").place.uri
    found = auth.find_token(token, args.pop("token_file", None))
    if found is not None:
        args["token_digest"] = auth.digest(found)
    auth.check_exposure(host, args.get("token_digest"))
    build(GraphArgs, args)
    for deployment, given in deployments.items():
        _options(deployment, given)
    if not (address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        process.check_free(host, port)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process.sigterm_interrupts())
        stack.enter_context(connect.session(address))
        stack.enter_context(process.sigterm_interrupts())  # Ray has set its own
        stack.enter_context(_quiet())
        root = stack.enter_context(_serve_on(host, port, args.get("token_digest")))
        yield stack.enter_context(_application(_graph(args, deployments), name, root))


def run(
    bundle: str | os.PathLike[str],
    *,
    config: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    address: str | None = None,
) -> None:
    """`serving`, until Ctrl-C or SIGTERM."""
    try:
        with serving(bundle, config=config, host=host, port=port, token=token, address=address) as url:
            say(f"serving {bundle} at {url} (documentation at {url}/docs, Ctrl-C stops)")
            threading.Event().wait()
    except KeyboardInterrupt:
        say("stopped")


@contextlib.contextmanager
def _serve_on(host: str, port: int, token_digest: str | None) -> Iterator[str]:
    """Serve running on the connected cluster; yields its root URL. Stops it if it was started here."""
    running = _running_http()
    if running is not None:
        auth.check_exposure(running.host, token_digest)
        if port not in (0, running.port):
            raise InputError(
                f"Ray Serve listens on port {running.port} of this cluster already",
                where=f"port {port}",
                fix=f"use --port {running.port} or 0",
            )
        yield process.root_url(running.host, running.port)
        return
    port = process.check_free(host, port)
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
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
def _application(app: Any, name: str, root: str) -> Iterator[str]:
    taken = _get_global_client().get_serve_details()["applications"]
    prefixes = {details["route_prefix"] for details in taken.values()}
    name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in taken)
    prefix = f"/{name}" if "/" in prefixes else "/"
    url = root + prefix.rstrip("/")
    try:
        try:
            serve.run(
                app,
                name=name,
                route_prefix=prefix,
                logging_config={"enable_access_log": False, "log_level": "WARNING"},
            )
        except RuntimeError as error:
            status = serve.status().applications.get(name)
            raise RecrayError(f"the graph did not start: {_last_line(status, error)}", where=name) from None
        process.wait_ready(url)
        yield url
    finally:
        serve.delete(name)


def _options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one deployment; `num_replicas` puts fixed replicas in place of autoscaling."""
    settings.check_keys(given, (f for f in DeploymentSchema.model_fields if f != "name"), name)
    for part, model in (
        ("autoscaling_config", AutoscalingConfig),
        ("ray_actor_options", RayActorOptionsSchema),
    ):
        if given.get(part) is not None:
            settings.check_keys(given[part], model.model_fields, f"{name}.{part}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            DeploymentSchema(name=name, **given)
            if given.get("autoscaling_config") is not None:
                AutoscalingConfig(**given["autoscaling_config"])
    except (ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ConfigError(": ".join(lines[1:3]) or lines[0], where=name) from None
    made = {**OPTIONS, **given}
    if isinstance(given.get("num_replicas"), int):
        made.pop("autoscaling_config")
    return made


def _token_digest(args: GraphArgs) -> str | None:
    if args.token_digest is not None:
        return args.token_digest
    token = auth.find_token(token_file=args.token_file)
    return None if token is None else auth.digest(token)


def _running_http() -> Any | None:
    """The HTTP options of the Serve that runs on the connected cluster, or None."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


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
