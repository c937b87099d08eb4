"""The verbs: the same list as the command line, and the only place where the wings meet.

Every verb takes artefacts (opened, or by path or URI) and leaves one; `out` defaults to a folder under
`runs/` that is named after what it was made from. Wings are imported by the verb that needs them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from recray import composing, manifest, recipes
from recray.composing import open_any, open_data, target
from recray.composing import plan as plan  # the one verb that leaves nothing to name
from recray.config import as_dict
from recray.errors import InputError
from recray.manifest import Artefact
from recray.refitting import refit as refit
from recray.serving.client import rollback as rollback
from recray.serving.client import ship as ship
from recray.serving.client import why as why

if TYPE_CHECKING:
    from recray.bundles.bundle import Answer, Bundle
    from recray.composing import Source, Where
    from recray.data.dataset import Dataset
    from recray.doctor import Check
    from recray.evaluation import Report


def prepare(
    logs: Where | Sequence[Where],
    *,
    items: Where | None = None,
    users: Where | None = None,
    links: Where | None = None,
    columns: Mapping[str, str] | None = None,
    context: Sequence[str] = (),
    event_weights: Mapping[str, float] | None = None,
    valid: Where | None = None,
    test: Where | None = None,
    split: Literal["leave-one-out", "time", "none"] = "leave-one-out",
    dedupe: bool = False,
    min_weight: float | None = None,
    workers: int = 0,
    out: Where | None = None,
) -> Dataset:
    """Read interaction logs, check them, map ids to rows, split, and leave a dataset.

    Args:
        logs: CSV, TSV, Parquet or JSON lines, plain or compressed; paths or URIs.
        items, users, links: tables of item features, user features, and links between users.
        columns: role -> header, or position in a file without a header.
        context: columns that are carried along with each interaction.
        event_weights: weight of each kind of event.
        valid, test: splits that are given; otherwise `split` says how to hold interactions out.
        dedupe: keep one of equal interactions.
        min_weight: rows below are left out; by default those not above zero.
        workers: 0 reads in this process, more on Ray Data.
        out: default `runs/dataset-<name of the first log>`.

    Raises:
        InputError: a file or column that cannot be used, or nothing is left to learn from.

    Example: `recray.prepare("events.parquet", columns={"user": "customer", "item": "sku"})`
    """
    from recray.data.prepare import prepare as run

    logs = [logs] if isinstance(logs, (str, os.PathLike)) else list(logs)
    if not logs:
        raise InputError("no log is given", fix="give at least one file")
    return run(
        logs, items=items, users=users, links=links, columns=columns, context=context,
        event_weights=event_weights, valid=valid, test=test, split=split, dedupe=dedupe,
        min_weight=min_weight, workers=workers, out=target(out, "dataset", logs[0]))  # fmt: skip


def train(
    dataset: Source | Dataset,
    *,
    recipe: str = "sasrec",
    workers: int | tuple[int, int] = 0,
    gpu: bool = False,
    retriever: Source | None = None,
    set: Sequence[str] = (),
    out: Where | None = None,
) -> Artefact:
    """Train a recipe's model on a dataset and leave a checkpoint; a killed run goes on where it was.

    Args:
        recipe: a name of `recray.recipes.RECIPES`.
        workers: 0 trains in this process, more on as many Ray Train workers; (2, 4) grows and
            shrinks with the cluster.
        gpu: one device a worker.
        retriever: of a ranker: the checkpoint whose candidates it learns from, and is bundled with.
        set: changes of the recipe, `("train.epochs=5", "options.dim=128")`.
        out: default `runs/checkpoint-<recipe>-<dataset>`.

    Raises:
        ConfigError: an unknown recipe or setting, or workers that cannot be.
        ArtefactError: `dataset` is none.

    Example: `recray.train("runs/ml100k", recipe="sasrec", workers=2)`
    """
    chosen = recipes.recipe(recipe, list(set))
    from recray.training.run import train as run

    data, first = open_data(dataset), None if retriever is None else open_any(retriever, "checkpoint")
    place = target(out, "checkpoint", recipe, data)
    return run(data, chosen, workers=workers, gpu=gpu, retriever=first, out=place)


def evaluate(
    artefact: Source | Bundle,
    *,
    data: Source | Dataset | None = None,
    split: Literal["valid", "test"] = "test",
    baseline: Source | Bundle | None = None,
) -> Report:
    """Measure a checkpoint (full ranking) or a bundle (as it is served) on held-out interactions.

    Args:
        data: default the dataset that the manifest names, its hash checked.
        baseline: another artefact, asked for the same users; `Report.differences` then holds the
            paired differences with their 95 % intervals.

    Raises:
        ArtefactError: altered, of another kind, or its dataset is not there.
        InputError: the dataset has no such split.

    Example: `recray.evaluate("runs/sasrec", baseline="runs/popularity").means["ndcg@10"]`
    """
    measured = open_any(artefact, "checkpoint", "bundle", verify=False)
    dataset = open_data(data, measured)
    report = composing.measure(measured, dataset, split)
    if baseline is None:
        return report
    other = composing.measure(baseline, dataset, split, beyond=False)
    differences = {name: report.against(other, name) for name in other.values}
    return dataclasses.replace(report, differences=differences)


def tune(
    dataset: Source | Dataset,
    *,
    recipe: str = "sasrec",
    space: Sequence[str],
    metric: str = "ndcg@10",
    trials: int = 10,
    scheduler: str = "asha",
    grace: int = 0,
    eta: int = 3,
    set: Sequence[str] = (),
    seed: int = 0,
    workers: int = 0,
    out: Where | None = None,
) -> Artefact:
    """Search a recipe's settings on the validation split; leave every trial and the best checkpoint.

    Args:
        space: `("train.lr=1e-4..1e-2@log", "options.dim=32,64")`, ranges and choices of settings.
        metric: what the best has most of (of losses and errors: least of).
        scheduler, grace, eta: "asha" lets only the best 1/eta of the trials go on after grace, grace * eta,
            ... epochs (grace 0: a sixth of the recipe's); "none" runs all out.
        set: changes of the recipe that all trials share.
        workers: trials at once on Ray Tune; 0 runs them here, one after the other.
        out: default `runs/search-<recipe>-<dataset>`; the checkpoint is in its folder `best`.

    Raises:
        ConfigError: an unknown recipe, setting or metric, or a space that cannot be read.

    Example: `recray.tune("runs/ml100k", recipe="ials", space=["options.dim=32..128"], trials=8)`
    """
    chosen = recipes.recipe(recipe, list(set))
    from recray.tuning.halving import scheduled
    from recray.tuning.recipes import search_recipe
    from recray.tuning.space import Space

    rule, parsed = scheduled(scheduler, grace, eta, chosen.train.epochs), Space.parse(space)
    data = open_data(dataset)
    fit = composing.Fit(chosen, str(data.artefact.place), metric)
    composing.check_search(fit, parsed)
    return search_recipe(
        fit, parsed, dataset=data.artefact, given=as_dict(chosen), metric=metric, trials=trials, halving=rule,
        seed=seed, workers=workers, out=target(out, "search", recipe, data))  # fmt: skip


def compress(
    checkpoint: Source,
    *,
    ranker: Source | None = None,
    data: Source | Dataset | None = None,
    p99: str,
    size: str,
    rps: float = 0,
    cost_per_1k: float | None = None,
    price: Mapping[str, float] | None = None,
    http: str | None = None,
    trials: int = 20,
    seed: int = 0,
    workers: int = 1,
    out: Where | None = None,
) -> Artefact:
    """Search smaller forms of a model under a latency and a size budget; every latency is measured.

    Args:
        checkpoint: a retriever's; `ranker`, if any, is searched together with it.
        p99: "10ms", the 99th percentile of answering one user after the other on one core.
        size: "64MB" for tables, graphs and index. rps: at which p99 must hold, over a replica a core.
        http: its share of p99, "2ms"; "lite" and "fast" measure it once by serving with that profile.
        cost_per_1k: of 1,000 recommendations at most, by `price`: hour, cores, memory_gb of a machine.
        trials: how many plans are built and measured; finished ones are never repeated.
        workers: trials at once on Ray Tune; 0 runs them here. out: default `runs/search-<checkpoint>`.

    Raises:
        BudgetError: nothing that was tried fits; the search is left all the same.
        ConfigError: a budget that cannot be read, or a model with nothing to compress.

    Example: `recray.compress("runs/sasrec", p99="10ms", size="64MB")`
    """
    limits = composing.limits(p99, size, rps=rps, cost_per_1k=cost_per_1k, price=price)
    return composing.compressed(
        checkpoint, ranker, data, limits=limits, http=http,
        trials=trials, seed=seed, workers=workers, out=out)  # fmt: skip


def bundle(
    source: Source,
    *,
    trial: str | None = None,
    ranker: Source | None = None,
    data: Source | Dataset | None = None,
    filter: Mapping[str, Any] | None = None,
    out: Where | None = None,
) -> Bundle:
    """Pack all that a replica needs to answer into one immutable folder, and open it.

    Args:
        source: a retriever's checkpoint, packed as it was trained, or a search by `compress` (its
            chosen trial) or `tune` (its best checkpoint).
        trial: another trial of a search by `compress`: its hash, the start of it, or its number.
        ranker: the checkpoint behind a retriever's; a search has its own.
        data: default the dataset that the manifest names, its hash checked.
        filter: what all answers' items must hold, as a request's: `{"stock": {"min": 1}}`.
        out: default `runs/bundle-<source>`.

    Raises:
        ArtefactError: altered, of another kind, or what it was made from is not there.
        ConfigError: models that do not fit each other or the dataset.

    Example: `recray.bundle("runs/small").recommend(user="196", k=10)`
    """
    from recray.bundles.build import build

    found = open_any(source, "checkpoint", "search")
    plan, retriever, behind = composing.packed(found, trial, ranker, filter)
    return build(target(out, "bundle", found), retriever, behind, open_data(data, retriever), plan)


def recommend(
    bundle: Source | Bundle,
    *,
    user: str | None = None,
    history: Sequence[str] | None = None,
    users: Where | Sequence[str] | None = None,
    k: int = 10,
    why: bool = False,
    workers: int = 0,
    out: Where | None = None,
    **asked: Any,
) -> Answer | Artefact:
    """The k best items for one user or history, or an artefact with those of many users.

    Args:
        user: an id; one nobody knows gets what is popular. history: item ids in its place, oldest first.
        users: ids, or a file with one a line (or a Parquet column `user`); the answers go to `out`.
        why: not of `users`: also say what speaks for each item.
        workers: of `users`: Ray tasks, 0 answers here. out: default `runs/recommendations-<bundle>`.
        asked: exclude, filter, context, pin, caps and diversity, see `Bundle.recommend`.

    Raises:
        InputError: not exactly one of user, history and users, k below 1, or what cannot be asked for.

    Example: `recray.recommend("runs/bundle", history=["50", "181"], k=5).items[0].item`
    """
    if sum(given is not None for given in (user, history, users)) != 1:
        raise InputError("nobody to answer", fix="give one of user, history and users")
    if why and users is not None:
        raise InputError("why is said of one user or history", fix="ask for users without it")
    opened = composing.open_bundle(bundle)
    from recray.bundles.rules import check_fields

    check_fields(asked)
    if users is None:
        return opened.recommend(user=user, history=history, k=k, why=why, **asked)
    from recray.bundles.many import recommend_many

    place = target(out, "recommendations", opened)
    if not workers:
        return recommend_many(opened, users, k=k, out=place, asked=asked)
    from recray.data.on_ray import mapping

    with mapping(workers) as block_map:
        return recommend_many(opened, users, k=k, out=place, block_map=block_map, asked=asked)


def serve(
    bundle: Source | Bundle,
    *,
    config: Where | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    token_file: Where | None = None,
    address: str | None = None,
    profile: Literal["lite", "fast"] = "lite",
    p99: str | None = None,
    state: str | None = None,
    feedback: str | None = None,
) -> None:
    """Answer over HTTP from a Ray Serve application, until Ctrl-C or SIGTERM; then stop it.

    Args:
        config: a Serve config, see `deployments/serve`; its bundle, host and port do not count.
        host, port: beyond loopback only with a token; port 0 takes a free one, said on standard error.
        token, token_file: what clients must send as a bearer token; else the config's or `$RECRAY_TOKEN`.
        address: of a Ray cluster; by default $RAY_ADDRESS, else one is started for as long.
        profile: "fast" has Serve's throughput flags and HAProxy (Linux); Serve must not run already.
        p99: "50ms", for which all stages are sized together while the load changes; by default each alone.
        state: of users' events, a folder of one machine or `redis://HOST:PORT/0`; by default while it runs.
            feedback: where they and all answers are logged for `refit`; by default that folder.

    Raises:
        InputError: no bundle, the port is busy, or the host is open to others without a token.

    Example: `recray.serve("runs/bundle", port=8000)`
    """
    from recray.serving import auth

    token = token if token_file is None else auth.find_token(token, os.fspath(token_file))
    where = open_any(bundle, "bundle", verify=False).place.uri
    from recray.serving.on_ray import run

    run(
        where, host=host, port=port, token=token, address=address, profile=profile, p99=p99, state=state,
        feedback=feedback, config=None if config is None else os.fspath(config))  # fmt: skip


def demo(out: Where = "demo-out", *, quick: bool = False) -> dict[str, Any]:
    """Run the whole path on a synthetic world and leave `report.json` and `report.html` in `out`.

    Args:
        quick: a smaller world and fewer trials.

    Returns: what `report.json` holds.

    Example: `recray.demo("demo-out", quick=True)["http"]["after"]["p99_ms"]`
    """
    from recray import demonstration

    return demonstration.run(sys.modules[__name__], out, quick=quick)


def show(artefact: Source | Bundle | Dataset, *, trial: str | None = None) -> dict[str, Any]:
    """What an artefact is: its manifest and its lineage, as JSON. Every file's hash is checked.

    With `trial`, its number or the start of its hash, that trial of a search in full.

    Raises:
        ArtefactError: missing or altered; InputError: no such trial.

    Example: `recray.show("runs/sasrec")["recipe"]["train"]["lr"]`
    """
    found = open_any(artefact)
    if trial is not None:
        return composing.shown_trial(found, trial)
    told = dataclasses.asdict(found.manifest)
    return {
        "path": str(found.place),
        **{key: told[key] for key in ("kind", "hash", "created", "recipe", "report")},
        "lineage": manifest.lineage(found),
        **{key: told[key] for key in ("files", "versions")},
    }


def doctor(*, ray: bool = False, port: int = 8000) -> list[Check]:
    """Look at this machine and say what would stop recray from working here.

    Args:
        ray: also start a cluster, run one task on it and stop it (about ten seconds).
        port: where a server would listen.

    Example: `all(check.verdict != "fail" for check in recray.doctor())`
    """
    from recray.doctor import examine

    return examine(ray=ray, port=port)
