"""One trade, one recipe: which models fit it, and what its answers must never hold.

A domain is advice in the form of settings, taken by `recray build`: how events weigh, the retriever, the
ranker behind it, and a filter that all answers pass. Each is a start to tune from, not an optimum: their
order on your log is what `recray evaluate` says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recray import api, columns, config, recipes, storage
from recray.errors import ArtefactError, InputError
from recray.manifest import digest, open_artefact
from recray.progress import say

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle
    from recray.data.dataset import Dataset
    from recray.manifest import Artefact


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What fits one trade. `retriever` and `ranker` are recipes with changes; no ranker is no name."""

    about: str
    retriever: Sequence[str]  # name, changes ...
    ranker: Sequence[str] = ()
    events: Mapping[str, float] = field(default_factory=dict)  # kind of event -> weight, where a log has any
    needs: Mapping[str, str] = field(default_factory=dict)  # item column that the filter asks -> its kind
    filter: Mapping[str, Any] = field(default_factory=dict)


DOMAINS: dict[str, Domain] = {
    "shop": Domain(
        about="what to buy next: order matters, a purchase says more than a look",
        retriever=("sasrec",),
        ranker=("dlrm",),
        events={"view": 1, "cart": 3, "buy": 5, "purchase": 5},
    ),
    "social": Domain(
        about="whom or what to follow: who is alike counts, order hardly",
        retriever=("ials", "options.dim=128"),
        ranker=("neumf",),
        events={"view": 1, "like": 2, "comment": 3, "share": 4, "follow": 5},
    ),
    "video": Domain(
        about="what to watch next: long histories, several tastes in one account",
        retriever=("mind",),
        ranker=("dcn",),
        events={"view": 1, "like": 2, "finish": 3},
    ),
    "music": Domain(
        about="what to play next: sessions, where the last few plays say most",
        retriever=("gru4rec",),
        ranker=("neumf",),
        events={"skip": 0, "play": 1, "like": 3},
    ),
    "news": Domain(
        about="what to read now: items live for days, so what they are made of decides",
        retriever=("two-tower",),
        ranker=("dcn",),
        events={"impression": 0, "click": 1, "read": 3},
    ),
    "ads": Domain(
        about="what to show in this situation: circumstances and their crosses decide",
        retriever=("two-tower",),
        ranker=("dcn",),
        events={"impression": 0, "click": 1, "conversion": 5},
    ),
    "course": Domain(
        about="what to learn next: one thing builds on another",
        retriever=("sasrec", "options.max_len=30"),
        ranker=("neumf",),
        events={"view": 1, "enrol": 3, "finish": 5},
    ),
    "finance": Domain(
        about="what suits an investor: nothing above a risk; items need a column risk, 1 to 7",
        retriever=("ease",),
        needs={"risk": "numbers"},
        filter={"risk": {"max": 5}},
    ),
    "health": Domain(
        about="what may be offered to all: nothing that a rule holds back; items need a column restricted",
        retriever=("item-knn",),
        needs={"restricted": "true and false"},
        filter={"restricted": [False]},  # what is unknown is held back, too
    ),
}


def build(
    logs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    domain: str,
    *,
    out: str | os.PathLike[str] = "",
    set: Sequence[str] = (),
    workers: int | tuple[int, int] = 0,
    **given: Any,
) -> Bundle:
    """From logs to a bundle by a domain's recipe: prepare, train, train the ranker behind it, bundle.

    Args:
        domain: a name of `DOMAINS`.
        out: a folder for dataset/, retriever/, ranker/ and bundle/ (default `runs/DOMAIN`). What is
            there already and made from the same is kept, so a run that was cut off goes on.
        set: changes of both recipes: `("train.epochs=5",)`.
        workers: of the retriever's training, see `recray.train`; the ranker is trained in this process.
        given: the other arguments of `recray.prepare`.

    Raises:
        ConfigError: an unknown domain or setting.
        InputError: as `recray.prepare`, or item columns that the domain's filter asks are missing.

    Example: `recray.build("events.parquet", "shop", items="items.parquet").recommend(user="42")`
    """
    if domain not in DOMAINS:
        raise config.unknown_name("domain", domain, DOMAINS)
    chosen, folder = DOMAINS[domain], storage.place(out or os.path.join("runs", domain))
    if "event_weights" not in given and chosen.events and _has_events(logs, given):
        given["event_weights"] = chosen.events
    say(f"{domain}: {chosen.about}")
    data = api.prepare(logs, out=(folder / "dataset").uri, **given)
    _check_items(domain, data)

    def trained(stage: str, recipe: Sequence[str], **more: Any) -> Artefact:
        name, *changes = recipe
        place = folder / stage
        parents = {"dataset": data.artefact.hash}
        parents |= {role: made.hash for role, made in more.items() if role == "retriever"}
        found = _kept(place, name, [*changes, *set], parents)
        return found or api.train(data, recipe=name, set=[*changes, *set], out=place.uri, **more)

    retriever = trained("retriever", chosen.retriever, workers=workers)
    ranker = trained("ranker", chosen.ranker, retriever=retriever) if chosen.ranker else None
    return api.bundle(retriever, ranker=ranker, data=data, filter=chosen.filter, out=(folder / "bundle").uri)


def _check_items(domain: str, data: Dataset) -> None:
    """Raise InputError where the items lack a column that the domain's filter asks, or hold another kind."""
    import pyarrow as pa

    features = data.item_features
    for name, kind in DOMAINS[domain].needs.items():
        if features is None or name not in features.column_names:
            words, fix = f"domain {domain} needs an item column {name!r}", "give it with --items FILE"
            raise InputError(words, where=data.artefact.place, fix=fix)
        held = features.schema.field(name).type
        number = pa.types.is_integer(held) or pa.types.is_floating(held) or pa.types.is_decimal(held)
        if not (pa.types.is_boolean(held) if kind == "true and false" else number):
            words = f"domain {domain} needs {kind} in the item column {name!r}, which holds {held}"
            raise InputError(words, where=data.artefact.place, fix=f"write {kind} there")


def _kept(place: storage.Place, recipe: str, changes: Sequence[str], parents: Mapping[str, str]) -> Any:
    """The checkpoint that lies there, of this very recipe and made from these; None where there is none."""
    from recray.training.run import resolve

    wanted = resolve(recipes.recipe(recipe, tuple(changes)))
    try:
        found = open_artefact(place, "checkpoint")
    except ArtefactError:
        return None
    manifest = found.manifest
    same = {role: parent["hash"] for role, parent in manifest.parents.items()} == dict(parents)
    if not same or digest(manifest.recipe) != digest(config.as_dict(wanted)):
        return None
    say(f"{place} already holds this checkpoint; nothing to do")
    return found


def _has_events(logs: Any, given: Mapping[str, Any]) -> bool:
    """Whether the logs tell kinds of events apart."""
    from recray.data import files, formats

    one = isinstance(logs, (str, os.PathLike, storage.Place))
    found = files.list_files([logs] if one else logs)
    return any(columns.EVENT in formats.sniff(file, given.get("columns")).columns for file in found)
