"""The verb `refit`: a bundle and what its users did since -> the bundle that follows it; the path closes.

Only `api.py` imports this. Between the two bundles lie artefacts of their own, in `<out>.from`: the dataset
with the feedback in it, and the checkpoints that were trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recray import config, manifest, recipes, storage
from recray.composing import open_any, open_data, target
from recray.manifest import Artefact
from recray.progress import say

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle
    from recray.composing import Source, Where
    from recray.data.dataset import Dataset


def refit(
    bundle: Source | Bundle,
    *,
    events: Where,
    data: Source | Dataset | None = None,
    set: Sequence[str] = (),
    fresh: bool = False,
    workers: int = 0,
    out: Where | None = None,
) -> Bundle:
    """Train a bundle's models again, on its dataset and the feedback since, and pack them as it was packed.

    Ids keep their rows, so models that are trained by gradient go on from the bundle's own; others are
    fitted anew. What the dataset holds already, from an earlier refit, is not added again.

    Args:
        events: the folder of `recray serve --feedback` (or `--state`).
        data: default the dataset that the bundle's manifest names, its hash checked.
        set: changes of the retriever's recipe, `("train.epochs=3",)`.
        fresh: begin with new weights.
        workers: as of `train`; a ranker behind its retriever is trained in this process.
        out: default `runs/bundle-<bundle>-refit`; what it is made from lies beside it, in `<out>.from`.

    Raises:
        InputError: no events, or none that the dataset does not hold.
        ArtefactError: altered, or what the bundle was made from is not there.
        ConfigError: a setting, or a model that cannot go on (then `fresh` helps).

    Example: `recray.refit("runs/bundle", events="runs/state", out="runs/bundle-2")`
    """
    found = open_any(bundle, "bundle")
    dataset = open_data(data, found)
    olds = [
        open_any(manifest.open_parent(found, role), "checkpoint")
        for role in ("checkpoint", "ranker")
        if role in found.manifest.parents
    ]
    goal = target(out, "bundle", f"{found.place.name.removeprefix('bundle-')}-refit")
    work = goal.beside(f"{goal.name}.from")
    storage.check_writable(goal)
    chosen = [_recipe(old, list(set) if old is olds[0] else [], fresh) for old in olds]

    from recray.bundles.build import build
    from recray.data.extend import extend
    from recray.feedback.join import write
    from recray.training.run import train

    with storage.scratch() as folder:
        file = folder / "feedback.parquet"
        told = write(events, file)
        say(_words(told))
        longer = extend(dataset, file, out=work / "dataset")
    made: list[Artefact] = []
    for recipe, old in zip(chosen, olds):
        behind = made[0] if "retriever" in old.manifest.parents else None
        place = work / ("retriever" if old is olds[0] else "ranker")
        at = 0 if behind is not None else workers
        made.append(train(longer, recipe, workers=at, retriever=behind, out=place))
    plan = _plan(found, made[-1])
    second = made[1] if made[1:] else None
    return build(goal, made[0], second, longer, plan, parent=found, told={"feedback": told})


def _recipe(old: Artefact, changes: list[str], fresh: bool) -> recipes.Recipe:
    """The recipe of a checkpoint, going on from it; its teacher was one of another dataset."""
    from recray.models import model_class

    recipe = config.build(recipes.Recipe, old.manifest.recipe, where=str(old.place))
    start = old.place.uri if model_class(recipe.model).gradient and not fresh else ""
    again = dataclasses.replace(recipe.train, start=start, teacher="")
    return config.override(dataclasses.replace(recipe, train=again), changes)


def _plan(found: Artefact, last: Artefact) -> Any:
    """The bundle's plan; the share of a ranker that was trained behind its retriever is the new one.

    How many candidates it has stays: a search may have chosen it for its budget.
    """
    from recray.bundles.plan import Plan

    plan = config.build(Plan, found.manifest.recipe["plan"], where="plan")
    told = last.manifest.report.get("two_stages", {})
    return dataclasses.replace(plan, **{name: told[name] for name in ("blend",) if name in told})


def _words(told: Mapping[str, Any]) -> str:
    clicked = [f"{name} {c['answered']} of {c['answers']}" for name, c in told["generations"].items()]
    repeated = f", {told['repeated']:,} repeated" if told["repeated"] else ""
    answered = f"; answers with an event: {', '.join(clicked)}" if clicked else ""
    return f"{told['events']:,} events{repeated}{answered}"
