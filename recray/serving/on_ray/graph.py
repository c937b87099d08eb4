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
from recray.bundles.changes import Changes, with_changes
from recray.config import as_dict, build
from recray.errors import ArtefactError, ConfigError
from recray.manifest import KEY_ENV, Artefact, check_signature, open_artefact, signing_key
from recray.progress import say
from recray.serving import aside, auth, parity, planning, process, profiles, settings, stages
from recray.serving.admission import Door
from recray.serving.canary import Tally
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.items import changes_of
from recray.serving.metrics import Meter
from recray.serving.on_ray import early, scaling
from recray.serving.on_ray.hops import split_between
from recray.serving.on_ray.metrics import Teller
from recray.serving.on_ray.pointer import KeptPointer, follow_all, own_name, tallies_of
from recray.serving.profiles import Profile
from recray.serving.resident import Ack, Resident
from recray.serving.router import Follower, Router
from recray.serving.scaling import Batches, Counted
from recray.serving.settings import Batch, GraphArgs
from recray.serving.shipping import Shipper
from recray.serving.state import open_state, seen_by, settled
from recray.storage import place

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own models use what pydantic deprecates
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig
    from ray.serve.context import _get_global_client
    from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

OPTIONS: Mapping[str, Any] = {  # of each deployment, where the file says nothing else
    "max_ongoing_requests": 64,
    "autoscaling_config": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 16},
    "ray_actor_options": {"num_cpus": 0.1},
    "health_check_period_s": 2.0,
    "graceful_shutdown_wait_loop_s": 0.1,
    "graceful_shutdown_timeout_s": 5.0,
}
COMING_IN = {"Ingress": {"max_ongoing_requests": 1000}}  # our door decides: what waits for Serve is unseen
Opened = TypeVar("Opened", bound=Front)
ANSWER_S = 30.0  # what a controller may take to answer


class _Replica(Counted):
    """What both model replicas are: bundles of their own, one torch thread, work in an executor."""

    def __init__(self, args: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        self.args = build(GraphArgs, args)
        stage = self.args.retriever if isinstance(self, RetrieverReplica) else self.args.ranker
        self.executor = ThreadPoolExecutor(stage.threads, thread_name_prefix="recray-model")
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="recray-aside")
        self.follower = _following(lambda one, now: _held_bundle(one, now, self.args), _looked_at, origin)
        self.batches = Batches.of(self.args)
        name = type(self).__name__.removesuffix("Replica")
        self.teller = Teller(name, Meter(), self.args.price, self.batches)
        process.freeze()
        process.take_turns()

    async def holds(self, generation: str) -> str:
        """The generation, or nothing where it is not held."""
        return "" if self.follower.resident.get(generation) is None else generation

    async def follow(self) -> Ack:
        """Hold what the pointer names, see `resident`."""
        return await self.follower.follow()

    async def check_health(self) -> None:
        """Asked by Serve every few seconds: the time to look whether the pointer moved."""
        self.follower.nudge()
        self.teller.tell()

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
        n, timed = len(getattr(asked[0], "wants", "1")), self.batches.timed
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, timed, n, work, bundle, *asked)


class RetrieverReplica(_Replica):
    """`stages.retrieve` in a process of its own."""

    async def retrieve(self, generation: str, batch: stages.RetrieveBatch) -> stages.Found | None:
        return await self._run(generation, stages.retrieve, batch)

    async def similar(self, generation: str, row: int, k: int) -> stages.Found | None:
        return await self._run(generation, stages.similar, row, k)

    async def aside(self, generation: str, work: str, *asked: Any) -> Any:
        bundle = self.follower.resident.get(generation)
        loop = asyncio.get_running_loop()
        return bundle and await loop.run_in_executor(self.beside, aside.WORK[work], bundle, *asked)


class RankerReplica(_Replica):
    """`stages.rank` in a process of its own."""

    async def rank(self, generation: str, batch: stages.RankBatch) -> stages.Found | None:
        return await self._run(generation, stages.rank, batch)


class IngressReplica(Counted):
    """The HTTP door: ids outside, rows inside; it holds the models where there is no retriever to ask."""

    def __init__(
        self, args: Mapping[str, Any], origin: Mapping[str, Any], retriever: Any | None, ranker: Any | None
    ) -> None:
        known = build(GraphArgs, args)
        self.token_digest = auth.found_digest(known.token_digest, known.token_file)
        running = running_http()
        assert running is not None
        auth.check_exposure(running.host, self.token_digest)
        if known.access_log:
            process.log_to_stderr("recray.access")
        admin = known.admin_token_digest, known.admin_token_file
        self.admin_digest = auth.found_digest(*admin, env=auth.ADMIN_ENV)
        self.users = open_state(known.state, known.feedback, known.feedback_limits)
        self.watching: asyncio.Task[None] | None = None
        self.args, self.stages = known, (retriever, ranker)
        self.batches = Batches.of(known, hops=sum(one is not None for one in self.stages))
        self.follower = _following(self._held, self._varied, origin)
        self.seen = seen_by(known, lambda: self.follower.resident.held)
        self.router = Router(self.follower.resident, self.follower.nudge, self.seen.meter)
        self.teller = Teller("Ingress", self.seen.meter, known.price, self.batches)
        self.shipper = _shipper(self.router, cast(KeptPointer, self.follower.pointer), known, self.stages)
        process.freeze()
        process.take_turns()
        process.accept_all(asyncio.get_running_loop())

    def _held(self, one: Generation, now: Ingress | None) -> Ingress:
        """One generation as this ingress answers from it. Raises InputError for what must not be held."""
        if self.stages[0] is None:
            front: Front = _held_bundle(one, None if now is None else cast(Bundle, now.front), self.args)
        else:
            front = _same(open_front(one.uri), one, self.args)
        if now is not None:
            parity.same_catalogue(front, now.front)
        return self._answering(front)

    def _varied(self, held: Ingress, changes: Changes) -> Ingress:
        """Another generation of the same bundle."""
        front = held.front
        return self._answering(
            _looked_at(front, changes) if isinstance(front, Bundle) else with_changes(front, changes)
        )

    def _answering(self, front: Front) -> Ingress:
        batch = self.args.batch or Batch()
        if not isinstance(front, Bundle):
            return split_between(front, batch, *self.stages, self.args.cache)
        fused = Fused(front, batch, self.args.retriever.threads)
        fused.batches.noted = self.batches.add
        return Ingress(front, fused, self.args.cache)

    async def follow(self) -> Ack:
        """Hold what the pointer names, and answer from whom it says."""
        return await self.follower.follow()

    async def tallies(self) -> dict[str, Tally]:
        """What this replica counted, by generation."""
        return self.router.tallies

    async def check_health(self) -> None:
        """Asked by Serve every few seconds: the time to look at the pointer and at the canary."""
        self.follower.nudge()
        self.teller.tell(self.router)
        if self.seen.tidy() and self.users is not None:
            self.users.tidy()
        if self.watching is None or self.watching.done():
            self.watching = asyncio.get_running_loop().create_task(self.shipper.watch())

    async def pid(self) -> int:
        """The process of this replica."""
        return os.getpid()

    def __serve_build_asgi_app__(self) -> Any:
        early.gate = build_asgi(
            self.router,
            token_digest=self.token_digest,
            users=self.users,
            admin_digest=self.admin_digest,
            steps=self.shipper,
            seen=self.seen,
            door=Door(self.args.deadline),
        )
        return early.gate


IngressDeployment = serve.deployment(name="Ingress")(serve.ingress()(IngressReplica))
Retriever = serve.deployment(name="Retriever")(RetrieverReplica)
Ranker = serve.deployment(name="Ranker")(RankerReplica)


def build_app(args: dict[str, Any]) -> Any:
    """The application that a Serve config imports; `args` are `GraphArgs`. Raises InputError."""
    return graph(args, {}, running_profile())[0]


def graph(
    args: Mapping[str, Any], deployments: Mapping[str, Mapping[str, Any]], profile: Profile
) -> tuple[Any, set[str]]:
    """(Ingress alone, Ingress -> Retriever -> Ranker, or without a ranker where the bundle has none; the
    names of its deployments).

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
        name: options_of(
            name, scaling.paced(deployments.get(name, {}), plan.replicas, known.p99_ms), plan.replicas
        )
        for name in settings.DEPLOYMENTS
    }
    ingress = IngressDeployment.options(**options["Ingress"])
    if plan.layout == "fused":
        return ingress.bind(plain, origin, None, None), {"Ingress"}
    retriever = Retriever.options(**options["Retriever"]).bind(plain, origin)
    if not artefact.holds("ranker"):
        return ingress.bind(plain, origin, retriever, None), {"Ingress", "Retriever"}
    ranker = Ranker.options(**options["Ranker"]).bind(plain, origin)
    return ingress.bind(plain, origin, retriever, ranker), {*settings.DEPLOYMENTS}


def _following(
    load: Callable[[Generation, Any], Any], vary: Callable[[Any, Changes], Any], origin: Mapping[str, Any]
) -> Follower[Any]:
    """What this replica holds, loaded before it serves, and the pointer that it follows. vary: with other
    items."""
    pointer = KeptPointer(origin["run"], State.from_dict(origin["first"]))

    def varied(one: Generation, held: Any) -> Any:
        return vary(held, changes_of(pointer, one))

    def loaded(one: Generation, now: Any) -> Any:
        made = load(one, now)
        return varied(one, made) if one.changed else made

    return Follower(Resident(loaded, pointer.read(), replica=own_name()[1], vary=varied), pointer)


def _looked_at(bundle: Bundle, changes: Changes) -> Bundle:
    """The bundle with these changes, its answers looked at."""
    made = with_changes(bundle, changes)
    parity.sound(made)
    return made


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
    if front.artefact.hash[:12] != one.bundle:
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


def _shipper(router: Router, pointer: KeptPointer, args: GraphArgs, hops: Sequence[Any]) -> Shipper:
    app, _ = own_name()
    names = ["Ingress", *(handle.deployment_name for handle in hops if handle is not None)]
    return Shipper(
        router,
        pointer,
        everyone=lambda: follow_all(app, names),
        counts=lambda: tallies_of(app, "Ingress"),
        band=args.canary,
        opened=lambda uri: _signed(open_artefact(place(uri), "bundle"), args),
        shelf=pointer,
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
    made = {**OPTIONS, **COMING_IN.get(name, {}), **scaling, **given}
    if isinstance(given.get("num_replicas"), int):
        made.pop("autoscaling_config")
    return made


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
