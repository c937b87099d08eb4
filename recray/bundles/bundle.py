"""A bundle: everything a replica needs to answer, in one immutable folder.

ids/items.parquet ids/users.parquet · histories/*.npy of the known users · items.parquet features ·
context.json · popularity.npy · retriever/ ranker/ (see `bundles/stage.py`) · index/
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray import config
from recray.bundles.answer import Answer, Item, Reason, Request, Why, histories_of
from recray.bundles.changes import Changes, id_list, id_text
from recray.bundles.filters import Filter, Filters
from recray.bundles.plan import Plan
from recray.bundles.rules import checked
from recray.bundles.stage import read_stage
from recray.data.ids import Ids
from recray.data.sequences import Histories
from recray.errors import ArtefactError, InputError
from recray.feedback.events import Kept, order
from recray.manifest import Artefact, open_artefact
from recray.models.base import Ranker, Retriever
from recray.models.embeddings import DenseTable, Table
from recray.recommender import Ranked, Recommender
from recray.retrieval.arrange import Groups, Rules
from recray.retrieval.index import Index, index_class, index_params
from recray.storage import Place

__all__ = ["Answer", "Bundle", "Front", "Item", "Request", "open_bundle", "open_front"]

Made = TypeVar("Made")

WEIGHED = ("retriever/", "ranker/", "index/")  # what `model_bytes` counts


@dataclass(frozen=True, eq=False)
class Front:
    """A bundle without its models: checks what is asked, and turns ids into rows and rows into ids. Nothing
    in it changes, so one serves many threads."""

    artefact: Artefact
    plan: Plan
    items: Ids
    users: Ids
    histories: Histories  # of `users`, all that was known when the bundle was built
    item_features: pa.Table | None  # row i = item row i
    context_values: Mapping[str, Sequence[str]]  # column -> values, row 0 = unknown
    filters: Filters = field(repr=False)
    popularity: NDArray[np.float32] = field(repr=False)  # of the items that the models know
    changes: Changes | None = field(default=None, repr=False, kw_only=True)

    @property
    def generation(self) -> str:
        """Names this bundle's content: the first 12 letters of its hash, and what changed since."""
        return self.artefact.hash[:12] + (self.changes.stamp if self.changes else "")

    @property
    def known(self) -> int:
        """How many items the models know; the others came later."""
        return len(self.items) - (len(self.changes.added) if self.changes else 0)

    @property
    def model_bytes(self) -> int:
        """Bytes of the files that hold weights, tables, graphs and the index.

        Ids, histories, item features and popularity do not count: they are data, not model, and no
        compression of a model changes them.
        """
        files = self.artefact.manifest.files
        return sum(int(entry["bytes"]) for name, entry in files.items() if name.startswith(WEIGHED))

    def request(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
        filter: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        *,
        exclude_seen: bool = True,
        events: Sequence[Kept] = (),
        pin: Sequence[Any] = (),
        caps: Mapping[str, int] | None = None,
        diversity: float = 0.0,
    ) -> Request:
        """Check what was asked and turn its ids into rows; `events` are the user's since the bundle was
        built, oldest first. Raises InputError."""
        degraded: tuple[str, ...] = ()
        weights: NDArray[np.float32] | None = None
        if history is not None:
            rows = self.items.rows_of(id_list("history", history))
        elif user is not None:
            at = int(self.users.rows_of([id_text("user", user)])[0])
            rows, weights = self._history(at, events)
            if at < 0 and not len(rows):
                degraded = ("unknown user",)
        else:
            rows = np.empty(0, np.int32)
        seen = {*rows.tolist()}
        if -1 in seen:  # of a history that is given, which has no weights
            rows, degraded = rows[rows >= 0], ("unknown history",) if len(seen) == 1 else degraded
        barred = {*self.items.rows_of(id_list("exclude", exclude)).tolist(), *(seen if exclude_seen else ())}
        barred.discard(-1)
        if self.changes is not None:  # of what was added nothing was learned
            weights = None if weights is None else weights[rows < self.known]
            rows = rows[rows < self.known]
        made = Request(
            history=np.asarray(rows, np.int32),
            exclude=np.array(sorted(barred), np.int32),
            k=self._count(k),
            filter=self.wanted(filter),
            context=self._context(context),
            degraded=degraded,
            weights=weights,
        )
        return self._ruled(made, pin, caps, diversity) if pin or caps or diversity else made

    def _ruled(self, made: Request, pin: Any, caps: Any, diversity: Any) -> Request:
        rules, known = checked(made.k, pin, caps, diversity, self.items, self.filters)
        mask = self.allowed(made)
        pinned = np.array(sorted(row for _, row in rules.pins) if rules else [], int)
        out = np.isin(pinned, made.exclude) if mask is None else np.isin(pinned, made.exclude) | ~mask[pinned]
        if self.changes is not None:
            out |= np.isin(pinned, self.items.rows_of(self.changes.withdrawn))
        degraded = made.degraded if known and not out.any() else (*made.degraded, "pin left out")
        return replace(made, rules=rules, degraded=degraded)

    def _history(
        self, at: int, events: Sequence[Kept]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32] | None]:
        """The history of user row `at` (below 0: not known) with the events that the model can use, and its
        weights where the bundle has any."""
        some = slice(*self.histories.offsets[at : at + 2]) if at >= 0 else slice(0, 0)
        rows, weights, known = self.histories.items[some], self.histories.weights, self.histories.times
        if not events:
            return rows, None if weights is None else weights[some]
        found = self.items.rows_of([event.item for event in events])
        strong = np.array([event.weight for event in events], np.float32)
        used = (found >= 0) & (strong > 0)
        times = np.array([event.time for event in events])
        placed = order(rows, None if known is None else known[some], found[used], times[used])
        both = np.concatenate([rows, found[used]])[placed]
        return both, None if weights is None else np.concatenate([weights[some], strong[used]])[placed]

    def allowed(self, request: Request) -> NDArray[np.bool_] | None:
        """The items that the request's filter leaves, bool[N], or None without a filter."""
        return self.filters.mask(request.filter)

    def groups(self, rules: Rules | None) -> Groups:
        """The values of the columns that rules cap."""
        return {} if rules is None else self.filters.groups(column for column, _ in rules.caps)

    def context(self, request: Request) -> dict[str, NDArray[np.int32]]:
        """The request's circumstances as a ranker takes them, a batch of one."""
        return {name: np.array([row], np.int32) for name, row in request.context.items()}

    def answer(self, request: Request, ranked: Ranked, at: int = 0) -> Answer:
        """Line `at` of what was ranked, as ids."""
        rows = ranked.rows[at]
        kept = rows >= 0
        names, scores = self.items.ids_of(rows[kept]), ranked.scores[at][kept].tolist()
        source, pinned = ranked.sources[at], request.pinned
        items = [Item(name, score, source) for name, score in zip(names, scores)]
        if pinned:
            items = [
                replace(i, source="pin") if r in pinned else i for i, r in zip(items, rows[kept].tolist())
            ]
        return Answer(items[: request.k], self.generation, list(request.degraded))

    def wanted(self, filter: Mapping[str, Any] | None) -> Filter:
        """What a request's filter and the bundle's own ask together. Raises InputError."""
        return self.filters.checked(self.plan.filter) + self.filters.checked(filter)

    def shared(self, row: int, other: int) -> dict[str, str]:
        """Feature column -> what two items have in common in it: words that are equal, or are in both
        lists. Numbers are no likeness."""
        table, made = self.item_features, {}
        if table is None:
            return {}
        for name in table.column_names:
            both = [table.column(name)[at].as_py() for at in (row, other)]
            a, b = (value if isinstance(value, list) else [value] for value in both)
            common = [
                str(value) for value in a if value in b and isinstance(value, (str, bool)) and value != ""
            ]
            if common:
                made[name] = ", ".join(common)
        return made

    def _count(self, k: Any) -> int:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InputError(f"k is {k!r:.80}", fix="give a whole number from 1")
        return min(int(k), len(self.items))

    def _context(self, given: Any) -> dict[str, int]:
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise InputError(f"context is {given!r:.80}", fix='write {"column": "value"}')
        known = self.context_values
        for column in given:
            if column not in known:
                fix = f"choose of {', '.join(known)}" if known else "this bundle has no context columns"
                raise InputError(f"unknown context column {column!r:.80}", fix=fix)
        return {
            column: values.index(text) if (text := str(given.get(column, ""))) in values else 0
            for column, values in known.items()
        }


@dataclass(frozen=True, eq=False)
class Bundle(Front):
    """An opened bundle: the front and the models behind it."""

    recommender: Recommender

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        exclude: Sequence[str] = (),
        filter: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        *,
        exclude_seen: bool = True,
        why: bool = False,
        pin: Sequence[Any] = (),
        caps: Mapping[str, int] | None = None,
        diversity: float = 0.0,
    ) -> Answer:
        """The k best items for a user, or for a history of item ids, oldest first.

        A given history replaces the one that is known of the user. Nobody, an unknown user and a
        history of unknown items get the most popular items. `exclude` names items not to show,
        `filter` features they must have, `context` the circumstances the ranker knows. Fewer than k
        items come back when no more are left. With `why` the reasons for each come along.

        `pin` gives items places: ids for the first ones, {"item": id, "place": 3} for a certain one; what
        is excluded or filtered out is not pinned. `caps` is how many items of each value of a column there
        may be at most, `diversity` 0 .. 1 how much less than scores it counts that items are unlike each
        other (see `retrieval.arrange`). Raises InputError.
        """
        rules: dict[str, Any] = {"pin": pin, "caps": caps, "diversity": diversity}
        asked = self.request(user, history, k, exclude, filter, context, exclude_seen=exclude_seen, **rules)
        answer = self.answer(asked, self.recommender.recommend(**self.arguments(asked)))
        if why:
            rows = self.items.rows_of([item.item for item in answer.items])
            answer.why.extend(self.reasons(asked, int(row)) for row in rows)
        return answer

    def arguments(self, request: Request) -> dict[str, Any]:
        """The request as the arguments of `Recommender.recommend`, a batch of one."""
        return {
            "histories": histories_of([request]),
            "k": request.k,
            "exclude": Histories.of([request.exclude]),
            "allowed": self.allowed(request),
            "context": self.context(request),
            "rules": request.rules,
            "groups": self.groups(request.rules),
        }

    def similar(self, item: str, k: int = 10, filter: Mapping[str, Any] | None = None) -> Answer:
        """The k items nearest to one. Raises InputError for an unknown item."""
        row = int(self.items.rows_of([id_text("item", item)])[0])
        if row < 0:
            raise InputError(f"unknown item {item!r:.80}")
        mask = self.filters.mask(self.wanted(filter))
        ranked = self.recommender.similar(row, self._count(k), mask)
        empty = np.empty(0, np.int32)
        return self.answer(Request(empty, empty, self._count(k), (), {}), ranked)

    def why(
        self,
        item: str,
        user: str | None = None,
        history: Sequence[str] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> Why:
        """Why this item has its score for a user, or for a history of item ids. Raises InputError."""
        row = int(self.items.rows_of([id_text("item", item)])[0])
        if row < 0:
            raise InputError(f"unknown item {item!r:.80}")
        return self.reasons(self.request(user, history, context=context), row)

    def reasons(self, asked: Request, row: int) -> Why:
        """Why the item of a row has its score for a request."""
        item = self.items.id_of(row)
        if row >= self.known:  # nothing was learned of it yet
            return Why(item, 0.0, 0.0, False, [], self.generation)
        history_1, barred = histories_of([asked]), Histories.of([asked.exclude])
        made, among = self.recommender, None
        if made.ranker is not None and 0 < made.blend < 1:
            among = made.retrieve(history_1, made.depth(asked.k, asked.rules), barred, self.allowed(asked))
        found = made.why(history_1, row, self.context(asked), among)
        known = self.items.ids_of(found.rows) if found.kind == "history" else [""] * len(found.rows)
        reasons = [
            Reason(float(weight), name, self.shared(row, int(other)) if name else {})
            for weight, name, other in zip(found.weights, known, found.rows)
        ]
        return Why(item, found.score, found.base, found.additive, reasons, self.generation)


def open_bundle(uri: str | os.PathLike[str] | Place, *, threads: int | None = None) -> Bundle:
    """Open a bundle, every file's hash checked. Raises ArtefactError.

    threads: of one call of an ONNX graph; by default those of torch in this process.
    """
    return _opened(uri, lambda artefact, folder: _read(artefact, folder, threads))


def open_front(uri: str | os.PathLike[str] | Place) -> Front:
    """Open a bundle without its models, every file's hash checked all the same. Raises ArtefactError."""
    return _opened(uri, _front)


def _opened(uri: str | os.PathLike[str] | Place, read: Callable[[Artefact, Path], Made]) -> Made:
    artefact = open_artefact(uri, "bundle")
    with artefact.local() as folder:
        try:
            return read(artefact, folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            if isinstance(error, InputError):
                raise
            raise ArtefactError(f"is not a bundle we can read ({error})", where=artefact.place) from None


def read_index(folder: Path, retriever: Retriever, plan: Plan) -> Index | None:
    """The index of a bundle's folder over the retriever's table; None for one without vectors."""
    if not retriever.has_vectors:
        return None
    params = index_params(plan.index, plan.index_params)
    return index_class(plan.index).load(folder, item_table(retriever), params)


def item_table(retriever: Retriever) -> Table:
    """The table of item vectors: the encoded one where it is the vectors, else a table of them."""
    if "item" in retriever.tables and type(retriever).item_vectors is Retriever.item_vectors:
        table = retriever.tables["item"]
        assert isinstance(table, Table)
        return table
    return DenseTable.of(retriever.item_vectors())


def _read(artefact: Artefact, folder: Path, threads: int | None) -> Bundle:
    front = _front(artefact, folder)
    retriever = read_stage(folder / "retriever", threads=threads)
    ranker = read_stage(folder / "ranker", threads=threads) if artefact.holds("ranker") else None
    assert isinstance(retriever, Retriever)
    assert ranker is None or isinstance(ranker, Ranker)
    recommender = Recommender(
        retriever,
        read_index(folder / "index", retriever, front.plan),
        ranker,
        front.plan.candidates,
        popularity=front.popularity,
        blend=front.plan.blend,
    )
    return Bundle(
        **{name: getattr(front, name) for name in Front.__dataclass_fields__}, recommender=recommender
    )


def _front(artefact: Artefact, folder: Path) -> Front:
    items = Ids.load(folder / "ids" / "items.parquet")
    features = pq.read_table(folder / "items.parquet") if artefact.holds("items.parquet") else None
    return Front(
        artefact=artefact,
        plan=config.build(Plan, artefact.manifest.recipe["plan"], where="plan"),
        items=items,
        users=Ids.load(folder / "ids" / "users.parquet"),
        histories=_histories(artefact, folder),
        item_features=features,
        context_values=json.loads((folder / "context.json").read_bytes()),
        filters=Filters(features, len(items)),
        popularity=np.load(folder / "popularity.npy", allow_pickle=False),
    )


def _histories(artefact: Artefact, folder: Path) -> Histories:
    """Mapped, not read: a request touches the pages of its user. Plain arrays are cut quicker."""
    paths = [folder / name for name in artefact.manifest.files if name.startswith("histories/")]
    arrays = {p.stem: np.asarray(np.load(p, mmap_mode="r", allow_pickle=False)) for p in paths}
    return Histories(arrays["items"], arrays["offsets"], arrays.get("weights"), arrays.get("times"))
