"""How a graph is served: our own arguments, and the file of Ray Serve that says the rest.

The file is a Ray Serve config (see deployments/serve): `applications[0].args` are `GraphArgs`, its
`deployments` are options of the three deployments by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recray import config
from recray.errors import ConfigError
from recray.feedback.log import Limits
from recray.money import Price
from recray.serving.answers import Keeping
from recray.serving.cache import Caching
from recray.serving.canary import Band
from recray.serving.deadline import Deadlines
from recray.serving.tracing import Tracing

DEPLOYMENTS = ("Ingress", "Retriever", "Ranker")
APP_KEYS = ("name", "route_prefix", "import_path", "args", "deployments")


Layout = Literal["auto", "fused", "split"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How requests are gathered in an ingress replica before they go anywhere."""

    size: int = 32  # concurrent requests that are answered together
    in_flight: int = 2  # split: batches that are on their way at a time
    wait_ms: float = 50.0  # split: after so long a batch goes, however many are on their way

    def __post_init__(self) -> None:
        if self.size < 1 or self.in_flight < 1 or not self.wait_ms >= 0:
            raise ConfigError(
                f"size {self.size} and in_flight {self.in_flight} must be at least 1, "
                f"wait_ms {self.wait_ms} at least 0",
                where="batch",
            )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage with a model."""

    threads: int = 1  # of the executor in a replica, each running one batch at a time

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"threads {self.threads} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GraphArgs:
    """What `build_app` takes: `args` of the application in a Serve config."""

    bundle: str
    token_file: str | None = None  # read by each ingress replica; else $RECRAY_TOKEN, else no token
    token_digest: str | None = None  # sha256 of the token as hex, in place of the token itself
    access_log: bool = True  # one line of JSON a request, on standard error of the ingress replica
    layout: Layout = "auto"  # fused: models in the ingress replica; auto: see `planning`
    batch: Batch | None = None  # None: as planned
    retriever: Stage = field(default_factory=Stage)  # of a fused replica: its threads
    ranker: Stage = field(default_factory=Stage)
    state: str | None = None  # of users: a folder of one machine or redis://HOST:PORT/0; None keeps none
    feedback: str | None = None  # folder of the logs of events and impressions; default the folder of `state`
    feedback_limits: Limits = field(default_factory=Limits)  # of each of the two logs, a machine
    admin_token_file: str | None = None  # opens /admin; else $RECRAY_ADMIN_TOKEN, else nothing does
    admin_token_digest: str | None = None
    signing_key_file: str | None = None  # read on every node; else $RECRAY_SIGNING_KEY, else none is asked
    signed: bool = False  # refuse to start without that key; set where `recray serve` finds one
    p99_ms: float | None = None  # all stages are sized for it together, see `scaling`; None: by Ray Serve
    trace: Tracing = field(default_factory=Tracing)  # spans of a share of the requests; by default of none
    answers: Keeping = field(default_factory=Keeping)  # kept for GET /v1/why; by default none are
    deadline: Deadlines = field(default_factory=Deadlines)  # of what the models answer
    cache: Caching = field(default_factory=Caching)  # of answers, by each ingress replica; by default none
    canary: Band = field(default_factory=Band)  # what a canary may be worse by before it is rolled back
    price: Price = field(default_factory=Price)  # of a machine, for the metric of cost per 1,000 answers

    def __post_init__(self) -> None:
        if self.p99_ms is not None and not self.p99_ms > 0:
            raise ConfigError(f"{self.p99_ms} milliseconds must be above zero", where="p99_ms")


def read_file(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(args without the bundle, deployment -> its options) of a Serve config with one application.

    Raises ConfigError for a file that is no such config; keys of Ray Serve's own are checked later.
    """
    app, where = _app_of(path)
    args = app.get("args") or {}
    check_keys(args, GraphArgs.__dataclass_fields__, f"{where}.args")
    entries = app.get("deployments") or []
    if not isinstance(entries, list):
        raise ConfigError("deployments must be a list", where=where)
    options: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or entry.get("name") not in DEPLOYMENTS:
            raise ConfigError(
                f"a deployment must be named one of {', '.join(DEPLOYMENTS)}", where=f"{where}.deployments"
            )
        options[entry["name"]] = {key: value for key, value in entry.items() if key != "name"}
    return {key: value for key, value in args.items() if key != "bundle"}, options


def policy_of(path: str) -> dict[str, Any]:
    """The autoscaling policy of such a file, as it is written there; empty where it has none."""
    app, where = _app_of(path)
    policy = app.get("autoscaling_policy") or {}
    check_keys(policy, ("policy_function", "policy_kwargs"), f"{where}.autoscaling_policy")
    return dict(policy)


def _app_of(path: str) -> tuple[dict[str, Any], str]:
    """(the one application of a file, its place in words)."""
    import yaml

    try:
        whole = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"is not YAML ({str(error).splitlines()[0]})", where=path) from None
    known = ("proxy_location", "http_options", "grpc_options", "logging_config", "applications")
    check_keys(whole, known, path)
    apps = whole.get("applications")
    if not isinstance(apps, list) or len(apps) != 1:
        raise ConfigError("must have one application", where=path, fix="see deployments/serve/graph.yaml")
    where = f"{path}: applications[0]"
    check_keys(apps[0], (*APP_KEYS, "logging_config", "autoscaling_policy"), where)
    return apps[0], where


def check_keys(value: object, known: Iterable[str], where: str) -> None:
    """Raises ConfigError unless `value` is a mapping with only `known` keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"must be a mapping, not {value!r:.80}", where=where)
    names = list(known)
    for key in value:
        if key not in names:
            error = config.unknown_name("setting", str(key), names)
            raise ConfigError(error.what, where=where, fix=error.fix)
