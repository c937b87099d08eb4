"""The application: deployments around `stages`, their options, and how many of them.

A hop between deployments costs more than a small model: a fused graph makes none, a split one two a
batch of requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from recray.bundles.bundle import Bundle, Front, open_bundle, open_front
from recray.config import as_dict, build
from recray.errors import ArtefactError, ConfigError
from recray.manifest import KEY_ENV, Artefact, check_signature, open_artefact, signing_key
from recray.progress import say
from recray.serving import auth, parity, planning, process, profiles, settings, stages
from recray.serving.canary import Tally
from recray.serving.generations import Generation, Pointer, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress, Split, has_ranker
from recray.serving.on_ray.pointer import KeptPointer, follow_all, own_name, tallies_of
from recray.serving.profiles import Profile
from recray.serving.resident import Ack, Resident
from recray.serving.router import Follower, Router
from recray.serving.schema import ApiError
from recray.serving.settings import Batch, GraphArgs
from recray.serving.shipping import Shipper
from recray.serving.state import open_state, settled
from recray.storage import place

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    import ray
    from ray import serve
    from ray.exceptions import RayActorError
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
Opened = TypeVar("Opened", bound=Front)
TRIES = 3  # of a hop whose replica dies; another replica is asked, since every stage is a pure function
ANSWER_S = 30.0  # what a controller may take to answer


class _Replica:
    """What both model replicas are: bundles of their own, one torch thread, work in an executor."""

    def __init__(self, args: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        self.args = build(GraphArgs, args)
        stage = self.args.retriever if isinstance(self, RetrieverReplica) else self.args.ranker
        self.executor = ThreadPoolExecutor(stage.threads, thread_name_prefix="recray-model")
        self.follower = _following(lambda one, now: _held_bundle(one, now, self.args), origin)

    async def holds(self, generation: str) -> str:
        """The generation, or nothing where it is not held."""
        return "" if self.follower.resident.get(generation) is None else generation

    async def follow(self) -> Ack:
        """Hold what the pointer names, see `resident`."""
        return await self.follower.follow()

    async def check_health(self) -> None:
        """Asked by Serve every few seconds: the time to look whether the pointer moved."""
        self.follower.nudge()

    async def pid(self) -> int:
        """The process of this replica, for whoever has to look at it (or to kill it in a test)."""
        return os.getpid()

    async def _run(
        self, generation: str, work: Callable[..., stages.Found], *asked: Any
    ) -> stages.Found | None:
        """`work` on one of our threads; None for a question about a bundle that is not held."""
        bundle = self.follower.resident.get(generation)
        if bundle is None:
            self.follower.nudge()
            return None
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, bundle, *asked)


class RetrieverReplica(_Replica):
    """`stages.retrieve` in a process of its own."""

    async def retrieve(self, generation: str, batch: stages.RetrieveBatch) -> stages.Found | None:
        return await self._run(generation, stages.retrieve, batch)

    async def similar(self, generation: str, row: int, k: int) -> stages.Found | None:
        return await self._run(generation, stages.similar, row, k)


class RankerReplica(_Replica):
    """`stages.rank` in a process of its own."""

    async def rank(self, generation: str, batch: stages.RankBatch) -> stages.Found | None:
        return await self._run(generation, stages.rank, batch)


class IngressReplica:
    """The HTTP door: ids outside, rows inside; it holds the models where there is no retriever to ask."""

    def __init__(
        self, args: Mapping[str, Any], origin: Mapping[str, Any], retriever: Any | None, ranker: Any | None
    ) -> None:
        known = build(GraphArgs, args)
        self.token_digest = _token_digest(known)
        running = running_http()
        assert running is not None
        auth.check_exposure(running.host, self.token_digest)
        if known.access_log:
            process.log_to_stderr("recray.access")
        self.admin_digest = _admin_digest(known)
        self.users = open_state(known.state, known.feedback, known.feedback_limits)
        self.watching: asyncio.Task[None] | None = None
        self.args, self.stages = known, (retriever, ranker)
        self.follower = _following(self._held, origin)
        self.router = Router(self.follower.resident, self.follower.nudge)
        self.shipper = _shipper(self.router, self.follower.pointer, known, self.stages)

    def _held(self, one: Generation, now: Ingress | None) -> Ingress:
        """One generation as this ingress answers from it. Raises InputError for what must not be held."""
        batch, (retriever, ranker) = self.args.batch or Batch(), self.stages
        if retriever is None:
            bundle = _held_bundle(one, None if now is None else cast(Bundle, now.front), self.args)
            made = Ingress(bundle, Fused(bundle, batch, self.args.retriever.threads))
        else:
            made = _split(_same(open_front(one.uri), one, self.args), batch, retriever, ranker)
        if now is not None:
            parity.same_catalogue(made.front, now.front)
        return made

    async def follow(self) -> Ack:
        """Hold what the pointer names, and answer from whom it says."""
        return await self.follower.follow()

    async def tallies(self) -> dict[str, Tally]:
        """What this replica counted, by generation."""
        return self.router.tallies

    async def check_health(self) -> None:
        """Asked by Serve every few seconds: the time to look at the pointer and at the canary."""
        self.follower.nudge()
        if self.watching is None or self.watching.done():
            self.watching = asyncio.get_running_loop().create_task(self.shipper.watch())

    async def pid(self) -> int:
        """The process of this replica."""
        return os.getpid()

    def __serve_build_asgi_app__(self) -> Any:
        return build_asgi(
            self.router,
            token_digest=self.token_digest,
            users=self.users,
            admin_digest=self.admin_digest,
            steps=self.shipper,
        )


IngressDeployment = serve.deployment(name="Ingress")(serve.ingress()(IngressReplica))
Retriever = serve.deployment(name="Retriever")(RetrieverReplica)
Ranker = serve.deployment(name="Ranker")(RankerReplica)


class _Hop:
    """One method of another deployment, asked again elsewhere when its replica dies; `first` are its first
    arguments."""

    def __init__(self, handle: Any, method: str, *first: Any) -> None:
        self._method, self._where, self._first = getattr(handle, method), f"{handle.deployment_name}", first

    async def __call__(self, *asks: Any) -> Any:
        for tried in range(TRIES):
            try:
                return await self._method.remote(*self._first, *asks)
            except (RayActorError, ReplicaUnavailableError):
                await asyncio.sleep(0.02 * tried)  # the router has dropped the dead one by now
            except (DeploymentUnavailableError, BackPressureError):
                break
        raise ApiError(503, "unavailable", "a stage does not answer now", self._where)


def build_app(args: dict[str, Any]) -> Any:
    """The application that a Serve config imports; `args` are `GraphArgs`. Raises InputError."""
    return graph(args, {}, running_profile())


def graph(args: Mapping[str, Any], deployments: Mapping[str, Mapping[str, Any]], profile: Profile) -> Any:
    """Ingress alone, Ingress -> Retriever -> Ranker, or without a ranker where the bundle has none.

    `deployments` maps a deployment's name to options of Ray Serve.
    """
    known = build(GraphArgs, args)
    artefact = _signed(open_artefact(known.bundle, "bundle", verify=False), known)
    plan = planning.make_plan(
        planning.loads_of(artefact),
        cluster(),
        planning.COSTS[profile],
        layout=known.layout,
        batch=known.batch,
    )
    say(f"layout {plan.layout}: {plan.reason}")
    at = dataclasses.replace(
        known,
        bundle=place(known.bundle).uri,
        layout=plan.layout,
        batch=plan.batch,
        signed=known.signed or signing_key(known.signing_key_file) is not None,
    )
    at = settled(at, machines())
    first = State(current=Generation(artefact.hash[:12], at.bundle))
    plain, origin = as_dict(at), {"run": uuid.uuid4().hex, "first": first.as_dict()}
    options = {
        name: options_of(name, deployments.get(name, {}), plan.replicas) for name in settings.DEPLOYMENTS
    }
    ingress = IngressDeployment.options(**options["Ingress"])
    if plan.layout == "fused":
        return ingress.bind(plain, origin, None, None)
    retriever = Retriever.options(**options["Retriever"]).bind(plain, origin)
    ranker = Ranker.options(**options["Ranker"]).bind(plain, origin) if has_ranker(artefact) else None
    return ingress.bind(plain, origin, retriever, ranker)


def _following(load: Callable[[Generation, Any], Any], origin: Mapping[str, Any]) -> Follower[Any]:
    """What this replica holds, loaded before it serves, and the pointer that it follows."""
    pointer = KeptPointer(origin["run"], State.from_dict(origin["first"]))
    return Follower(Resident(load, pointer.read(), replica=own_name()[1]), pointer)


def _held_bundle(one: Generation, now: Bundle | None, args: GraphArgs) -> Bundle:
    """A bundle for a replica, one thread an operator, since requests are what runs side by side; beside a
    running one it is looked at first."""
    import torch

    torch.set_num_threads(1)
    bundle = _same(open_bundle(one.uri, threads=1), one, args)
    if now is not None:
        parity.sound(bundle, beside=now)
    return bundle


def _same(front: Opened, one: Generation, args: GraphArgs) -> Opened:
    if front.artefact.hash[:12] != one.name:
        raise ArtefactError("was replaced while it was in use", where=one.uri)
    _signed(front.artefact, args)
    return front


def _signed(artefact: Artefact, args: GraphArgs) -> Artefact:
    """The artefact, its signature checked where a key is set. Raises InputError."""
    key = signing_key(args.signing_key_file)
    if key is not None:
        check_signature(artefact, key)
    elif args.signed:
        raise ConfigError("the signing key is missing here", where=f"${KEY_ENV}", fix="set it on every node")
    return artefact


def _split(front: Front, batch: Batch, retriever: Any, ranker: Any | None) -> Ingress:
    """A generation whose models are in other replicas."""
    name = front.generation
    if ranker is None and has_ranker(front.artefact):
        raise ArtefactError("has a ranker, and this application has no Ranker replicas", where=name)
    ranks = ranker is not None and has_ranker(front.artefact)
    hops = (retriever, ranker) if ranks else (retriever,)
    split = Split(
        front,
        batch,
        retrieve=_Hop(retriever, "retrieve", name),
        similar=_Hop(retriever, "similar", name),
        rank=_Hop(ranker, "rank", name) if ranks else None,
        generations=[_Hop(handle, "holds", name) for handle in hops],
    )
    return Ingress(front, split)


def _shipper(router: Router, pointer: Pointer, args: GraphArgs, hops: Sequence[Any]) -> Shipper:
    app, _ = own_name()
    names = ["Ingress", *(handle.deployment_name for handle in hops if handle is not None)]
    return Shipper(
        router,
        pointer,
        everyone=lambda: follow_all(app, names),
        counts=lambda: tallies_of(app, "Ingress"),
        band=args.canary,
        opened=lambda uri: _signed(open_artefact(place(uri), "bundle"), args),
    )


def cluster() -> planning.Machine:
    """The nodes of the connected cluster, each as the smallest of them."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        return planning.this_machine()
    return planning.Machine(
        cores=max(1, int(min(node["CPU"] for node in nodes))),
        memory=int(min(node.get("memory", 0) for node in nodes)) or planning.this_machine().memory,
        gpus=int(min(node.get("GPU", 0) for node in nodes)),
        nodes=len(nodes),
    )


def machines() -> int:
    """How many machines the connected cluster spans; several of its nodes may be on one."""
    return len({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]})


def options_of(name: str, given: Mapping[str, Any], replicas: int = 2) -> dict[str, Any]:
    """The options of one deployment, which grows to `replicas` where nothing else is given;
    `num_replicas` puts fixed ones in place of autoscaling."""
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
    scaling = {"autoscaling_config": {**OPTIONS["autoscaling_config"], "max_replicas": replicas}}
    made = {**OPTIONS, **scaling, **given}
    if isinstance(given.get("num_replicas"), int):
        made.pop("autoscaling_config")
    return made


def _token_digest(args: GraphArgs) -> str | None:
    if args.token_digest is not None:
        return args.token_digest
    token = auth.find_token(token_file=args.token_file)
    return None if token is None else auth.digest(token)


def _admin_digest(args: GraphArgs) -> str | None:
    if args.admin_token_digest is not None:
        return args.admin_token_digest
    token = auth.find_token(token_file=args.admin_token_file, env=auth.ADMIN_ENV)
    return None if token is None else auth.digest(token)


def running_http() -> Any | None:
    """The HTTP options of the Serve that runs on the connected cluster, or None."""
    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def running_profile() -> Profile:
    """The profile of the Serve instance that runs on the connected cluster, as its controller was started."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return "lite"
    flag = client._controller.__ray_call__.remote(lambda _, name: os.environ.get(name), profiles.MARK)
    return "fast" if ray.get(flag, timeout=ANSWER_S) == "1" else "lite"
