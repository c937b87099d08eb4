"""What the verbs share: open what they were given, name what they leave, join two wings; and `plan`.

Only `api.py` imports this; it lies above the wings, so that it may hand one what another can do.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from recray import config, manifest, recipes, storage
from recray.errors import ConfigError, InputError, RecrayError
from recray.manifest import Artefact
from recray.progress import say, warn

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle
    from recray.bundles.plan import Plan
    from recray.data.dataset import Dataset
    from recray.evaluation import Report, TopK
    from recray.models.base import Model
    from recray.training.checkpoint import EpochReport
    from recray.training.plan import RunPlan
    from recray.tuning.compress import Limits
    from recray.tuning.space import Space
    from recray.tuning.trial import TrialCache

HTTP_USERS = 300  # that HTTP's share is measured by
Where: TypeAlias = "str | os.PathLike[str]"
Source: TypeAlias = "Where | Artefact"


def open_data(source: Source | Dataset | None, parent_of: Artefact | None = None) -> Dataset:
    """The dataset that was given; without one, the dataset that an artefact's manifest names."""
    from recray.data.dataset import Dataset, open_dataset

    if isinstance(source, Dataset):
        return source
    if source is None:
        assert parent_of is not None
        source = manifest.open_parent(parent_of, "dataset")
    return open_dataset(source.place if isinstance(source, Artefact) else source)


def open_bundle(source: Source | Bundle) -> Bundle:
    """A bundle, opened already or by its place."""
    from recray.bundles.bundle import Bundle
    from recray.bundles.bundle import open_bundle as opened

    if isinstance(source, Bundle):
        return source
    return opened(source.place if isinstance(source, Artefact) else source)


def open_any(source: Any, *kinds: str, verify: bool = True) -> Artefact:
    """Opened, with `verify` every hash checked; an opened Dataset or Bundle gives its own."""
    source = getattr(source, "artefact", source)
    where = source.place if isinstance(source, Artefact) else source
    return manifest.open_artefact(where, *kinds, verify=verify)


def target(out: Where | None, kind: str, *after: Any) -> storage.Place:
    """`out`, or `runs/<kind>-<names of what the result is made from>`; refused where another kind lies."""
    if out is None:
        return storage.place(os.path.join("runs", "-".join([kind, *map(_name, after)])))
    where = storage.place(out)
    try:
        there = manifest.open_artefact(where, verify=False).manifest.kind
    except InputError:  # nothing, or nothing that can be read: `check_writable` judges it
        return where
    if there != kind:
        raise InputError(f"holds a {there}, not an older {kind}", where=where, fix="choose another --out")
    return where


def measure(source: Source | Bundle, dataset: Dataset, split: str, *, beyond: bool = True) -> Report:
    """A checkpoint by full ranking, or a bundle as it is served, on one split of a dataset.

    A ranker that was trained on labels is measured by them: "auc", and "logloss" of each interaction.
    """
    from recray import evaluation

    artefact = open_any(source, "checkpoint", "bundle", verify=False)
    if artefact.manifest.kind == "checkpoint":
        open_any(artefact)  # a bundle's hashes are checked when it is opened to be asked
    _check_split(dataset, split)
    if artefact.manifest.recipe.get("options", {}).get("loss") == "labels":
        return _labelled(artefact, dataset, split)
    catalogue = evaluation.beyond_of(dataset) if beyond else None
    trained = artefact.manifest.parents.get("dataset", {}).get("hash")
    if trained not in (None, dataset.artefact.hash):
        warn(f"{artefact.place} is made from another dataset: what is held out here may be known to it")
    cases, (top_k, model) = dataset.cases(split), _asked(artefact, dataset)
    report = evaluation.evaluate(top_k, cases, catalogue=catalogue)
    return evaluation.with_ratings(report, model, cases)


def _check_split(dataset: Dataset, split: str) -> None:
    if not dataset.has_split(split):
        raise InputError(f"has no {split} split", where=dataset.artefact.place, fix="prepare it with one")


def plan(
    dataset: Source | Dataset | None = None,
    *,
    recipe: str = "sasrec",
    set: Sequence[str] = (),
    workers: int = 0,
    rows: float | None = None,
    dim: int = 64,
    batch: int = 2048,
    lookups: float = 20,
    distinct: float | None = None,
    memory: str | None = None,
    wire: str | None = None,
    rates: Mapping[str, float] | None = None,
) -> RunPlan:
    """Say before a training run who would hold what, bytes a worker, bytes sent and seconds a step.

    Args:
        dataset: plans the recipe's training on it; without one, a table of `rows` x `dim` is planned.
        set: changes of the recipe. `train.table_optimizer`, `train.table_dtype` and `train.wire` count
            for a bare table, too.
        workers: 0 and 1 are one process.
        batch, lookups: of a bare table: examples a step, ids an example.
        distinct: of a bare table: share of a worker's ids that are distinct; by default of uniform ids.
        memory: "64GiB", of each worker on a machine of its own; by default the workers share this one.
        wire: "10GB/s", what a worker can send; between machines by default ten gigabit Ethernet.
        rates: others of `recray.training.plan.Machine`, in bytes and seconds; by default measured here.

    Raises:
        InputError: it would not fit into memory; the message says what would.
        ConfigError: an unknown recipe, setting or rate, or a model that is not trained in steps.

    Example: `recray.plan(rows=1e9, dim=64, workers=64, memory="64GiB").step_s`
    """
    if (dataset is None) == (rows is None):
        raise InputError("nothing to plan, or two things", fix="give either a dataset or --rows")
    chosen, ranks = recipes.recipe(recipe, list(set)), max(1, workers)
    given = dict(rates or {})
    if wire is not None:
        given["wire"] = config.parse_bytes(wire.removesuffix("/s"), what="wire")
    room = None if memory is None else config.parse_bytes(memory, what="memory")
    from recray.training import plan as planning
    from recray.training import work as reckoning
    from recray.training.machine import measured_machine

    if rows is None:
        work = reckoning.dataset_work(chosen, open_data(dataset), ranks=ranks)
    else:
        work = reckoning.table_work(
            rows, dim, asked=batch * lookups, train=chosen.train, ranks=ranks, distinct=distinct
        )
    machine = measured_machine(memory=room, shared_by=ranks if room is None else 1)
    machine = config.build(planning.Machine, {**dataclasses.asdict(machine), **given}, where="rates")
    return planning.check_fits(planning.make_plan(work, ranks, machine))


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `tune` asks of the training wing: a checkpoint at a place, and its validation metrics."""

    recipe: recipes.Recipe
    dataset: str
    metric: str

    def __call__(
        self, point: Mapping[str, Any], where: storage.Place, told: Callable[[int, float], None]
    ) -> Mapping[str, float]:
        from recray.training.run import train

        def after(epoch: EpochReport) -> None:
            if epoch.value is not None:
                told(epoch.epoch, epoch.value)

        words = [f"train.metric={self.metric}", *(f"{key}={value}" for key, value in point.items())]
        data = open_data(self.dataset)
        made = train(data, config.override(self.recipe, words), out=where, after=after)
        return measure(made, data, "valid", beyond=False).means


def limits(
    p99: str, size: str, *, rps: float, cost_per_1k: float | None, price: Mapping[str, float] | None
) -> Limits:
    """What `compress` is asked for, in words, as numbers. Raises ConfigError for what cannot be read."""
    from recray.money import Price
    from recray.tuning.compress import Limits

    asked = Limits(
        p99=config.parse_duration(p99, what="p99"),
        size=config.parse_bytes(size, what="size"),
        cost=math.inf if cost_per_1k is None else cost_per_1k,
        rps=rps,
        price=config.build(Price, dict(price or {}), where="price"),
    )
    _ = asked.budget  # refuses what nothing fits
    return asked


def compressed(
    checkpoint: Source,
    ranker: Source | None,
    data: Source | Dataset | None,
    *,
    limits: Limits,
    http: str | None,
    out: Where | None,
    **more: Any,
) -> Artefact:
    """What `compress` does once its limits are read."""
    from recray.tuning.compress import search_compress

    http_s = 0.0
    if http is not None and http not in ("lite", "fast"):
        http_s = config.parse_duration(http, what="http")
    retriever = open_any(checkpoint, "checkpoint")
    behind = None if ranker is None else open_any(ranker, "checkpoint")
    dataset, where = open_data(data, retriever), target(out, "search", retriever)
    if http in ("lite", "fast"):
        http_s, more["http_mean_s"], more["kept"] = _http_share(retriever, behind, dataset, http, where)
    base = None if behind is None else _measured_plan(retriever, behind)
    return search_compress(
        retriever, behind, dataset, limits=limits, http_overhead_s=http_s, base=base, out=where, **more
    )


def _http_share(
    retriever: Artefact, ranker: Artefact | None, data: Dataset, profile: str, out: storage.Place
) -> tuple[float, float, dict[str, TrialCache]]:
    """(what HTTP adds to an answer, its 99th percentile and mean in seconds; where it is kept).

    The uncompressed models are asked for the same users, one client after the other, in this process and over
    Ray Serve. Raises RecrayError when a request fails.
    """
    import numpy as np

    from recray.bundles.build import build
    from recray.demonstration import ask
    from recray.serving.on_ray import serving
    from recray.tuning.results import open_cache
    from recray.tuning.trial import Trial

    of = [each.hash for each in (retriever, ranker) if each is not None]
    cache = open_cache(out, {"http": profile, "of": of, "versions": manifest.versions()}, "http")
    name = cache.hash({"profile": profile})
    for kept in cache.load():
        return kept.metrics["p99"], kept.metrics["mean"], {"http": cache}
    with storage.scratch() as folder:
        bundle = build(folder / "bundle", retriever, ranker, data)
        users = data.users.ids_of(np.arange(min(HTTP_USERS, data.n_users)))
        alone = []
        for user in [*users[:20], *users]:
            start = time.perf_counter()
            bundle.recommend(user=user)
            alone.append(time.perf_counter() - start)
        with serving(bundle.artefact.place.uri, port=0, name="http-share", profile=profile) as url:  # type: ignore[arg-type]
            ask(url, users[:20], clients=1)  # warm-up
            asked, failed = ask(url, users, clients=1)
    if failed:
        raise RecrayError(f"HTTP's share cannot be measured ({failed[0]})", fix="give it, as in --http 2ms")
    shares = np.maximum(np.subtract(asked, alone[-len(users) :]), 0)
    p99, mean = float(np.percentile(shares, 99)), float(shares.mean())
    cache.keep(Trial(hash=name, number=1, point={"profile": profile}, metrics={"p99": p99, "mean": mean}))
    say(f"HTTP, profile {profile}, takes {p99 * 1e3:.2f} ms of p99, {mean * 1e3:.2f} ms as a rule")
    return p99, mean, {"http": cache}


def shown_trial(found: Artefact, trial: str) -> dict[str, Any]:
    """One trial of a search in full, its values of each user left out. Raises InputError."""
    from recray.tuning.chosen import told_trial

    if found.manifest.kind != "search":
        raise InputError(f"is a {found.manifest.kind} and has no trials", where=found.place)
    return told_trial(found, trial)


def check_search(fit: Fit, space: Space) -> None:
    """Refuse, before any trial, a setting, a metric or a dataset that no trial could use."""
    from recray.training.run import resolve

    known = _metrics(fit.recipe)
    if fit.metric not in known:
        raise config.unknown_name("metric", fit.metric, known)
    for name, dimension in space.dimensions.items():
        ends = (dimension.tidy(dimension.low), dimension.tidy(dimension.high))
        for value in dimension.choices or ends:
            resolve(config.override(fit.recipe, [f"{name}={value}"]))
    _check_split(open_data(fit.dataset), "valid")


def _metrics(recipe: recipes.Recipe) -> tuple[str, ...]:
    """What `measure` finds of the recipe's model, on a dataset that has what it takes."""
    from recray.metrics import ranking
    from recray.models import build_model, model_class
    from recray.models.base import Catalogue

    if recipe.options.get("loss") == "labels":
        return ("auc", "logloss")
    known = tuple(f"{name}@{k}" for name in ranking.NAMES for k in (10, 20))
    if not hasattr(model_class(recipe.model), "predicts"):
        return known
    model: Any = build_model(recipe.model, Catalogue(1, {}), recipe.options, allocate=False)
    return (*known, "rmse", "mae") if model.predicts else known


def packed(
    found: Artefact, trial: str | None, ranker: Source | None, filter: Mapping[str, Any] | None = None
) -> tuple[Plan, Artefact, Artefact | None]:
    """What a bundle of a checkpoint or search is made of: plan, retriever and ranker checkpoints."""
    from recray.bundles.plan import Plan

    plan, retriever, behind = _packed(found, trial, ranker)
    return dataclasses.replace(plan or Plan(), filter=filter or {}), retriever, behind


def _packed(
    found: Artefact, trial: str | None, ranker: Source | None
) -> tuple[Plan | None, Artefact, Artefact | None]:
    if found.manifest.recipe.get("search") == "compress":
        from recray.tuning.chosen import plan_of_trial

        if ranker is not None:
            raise InputError("has its own ranker, or none", where=found.place, fix="leave --ranker out")
        roles = ("checkpoint", "ranker") if "ranker" in found.manifest.parents else ("checkpoint",)
        models = [open_any(manifest.open_parent(found, role), "checkpoint") for role in roles]
        return plan_of_trial(found, trial), models[0], models[1] if models[1:] else None
    if trial is not None:
        raise InputError("keeps no trial to choose", where=found.place, fix="leave --trial out")
    if found.manifest.kind == "search":
        found = manifest.open_artefact(found.place / "best", "checkpoint")
    if ranker is None:
        return None, found, None
    second = open_any(ranker, "checkpoint")
    return _measured_plan(found, second), found, second


def _measured_plan(retriever: Artefact, ranker: Artefact) -> Plan | None:
    """How the two are put together where the ranker was trained behind this retriever; else None."""
    from recray.bundles.plan import Plan

    if ranker.manifest.parents.get("retriever", {}).get("hash") != retriever.hash:
        return None
    told = ranker.manifest.report["two_stages"]
    return Plan(**{name: told[name] for name in ("candidates", "blend") if name in told})


def _asked(artefact: Artefact, dataset: Dataset) -> tuple[TopK, Model]:
    """How an artefact is asked for its best items, and the model that may predict ratings.

    Raises ConfigError where its items are not those of the dataset.
    """
    from recray import evaluation

    if artefact.manifest.kind == "bundle":
        bundle = open_bundle(artefact)
        if bundle.items != dataset.items:
            words = "knows other items than the dataset, or in another order"
            raise ConfigError(words, where=artefact.place, fix="give the dataset it was trained on")
        allowed = bundle.filters.mask(bundle.wanted(None))
        return evaluation.recommender_top_k(bundle.recommender, allowed), bundle.recommender.retriever
    from recray.models.base import Ranker, Retriever
    from recray.models.saved import check_items, load_model

    check_items(artefact, dataset)
    model = load_model(artefact)
    assert isinstance(model, (Retriever, Ranker))
    return evaluation.model_top_k(model), model


def _labelled(artefact: Artefact, dataset: Dataset, split: str) -> Report:
    from recray.evaluation import Report
    from recray.metrics.binary import auc, losses
    from recray.models.features import FeatureRanker
    from recray.models.saved import check_items, load_model

    check_items(artefact, dataset)
    model = load_model(artefact)
    assert isinstance(model, FeatureRanker)
    labels, logits = model.labelled(dataset, split)
    if labels.all() or not labels.any():
        what = "only what was taken" if labels.all() else "nothing that was taken"
        raise InputError(f"its {split} split has {what}: no AUC", where=dataset.artefact.place)
    rows = dataset.interactions(split).user_rows
    return Report({"logloss": losses(labels, logits)}, rows, {"auc": auc(labels, logits)})


def _name(source: Any) -> str:
    """The bare name of what a result is made from: no folder, kind or extension."""
    artefact = getattr(source, "artefact", source)
    place = artefact.place if isinstance(artefact, Artefact) else storage.place(artefact)
    name = place.name
    for kind in manifest.KINDS:
        name = name.removeprefix(f"{kind}-")
    return name.split(".")[0] or "unnamed"
