"""New and withdrawn items of an open bundle: another bundle that shares its models, made in milliseconds.

The folder stays as it is. What changed since it was built is a value, named by its content: bundles that
took the same changes in any order bear the same generation, so stages that hold different ones refuse each
other. The next training takes new items from the log and needs no changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from recray.bundles.filters import Filters
from recray.errors import ArtefactError, InputError
from recray.manifest import digest
from recray.retrieval.delta import Delta
from recray.storage import write_file

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle, Front

    Some = TypeVar("Some", bound=Front)

LARGEST = float(np.finfo(np.float32).max)  # of a vector's numbers
ADD = 'write {"item": id, "vector": [numbers] or "like": [item ids], "features": {"column": value}}'


@dataclass(frozen=True)
class Added:
    """A new item: its vector, and what is known of its features."""

    item: str
    vector: tuple[float, ...]
    features: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Changes:
    """All that changed since a bundle was built: ids that are withdrawn, and new items by id."""

    withdrawn: tuple[str, ...] = ()
    added: tuple[Added, ...] = ()

    @property
    def stamp(self) -> str:
        """Names the content; "" for no changes."""
        return f"+{digest(asdict(self))[:8]}" if self.withdrawn or self.added else ""

    def save(self, path: Path) -> None:
        """One JSON file, written aside and renamed."""
        write_file(path, json.dumps(asdict(self), sort_keys=True).encode())

    @staticmethod
    def load(path: Path) -> Changes:
        """What `save` wrote. Raises ArtefactError for anything else."""
        try:
            held = json.loads(path.read_bytes())
            added = [Added(one["item"], tuple(one["vector"]), one["features"]) for one in held["added"]]
            return Changes(tuple(held["withdrawn"]), tuple(added))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"is no file of changes ({error})", where=path) from None


def change(
    bundle: Bundle,
    *,
    withdraw: Iterable[str] = (),
    restore: Iterable[str] = (),
    add: Iterable[Mapping[str, Any]] = (),
) -> Bundle:
    """The bundle with these changes after those that it has; the given one stays as it is.

    withdraw: ids that are answered no more, until they are given to restore. add: new items with a vector
    of the retriever's, or with known items that they are like, whose mean they take; and maybe features.
    Raises InputError for an unknown id, a known new one, and a vector or feature that does not fit.
    """
    had = bundle.changes or Changes()
    new = {one.item: one for one in had.added}
    for one in add:
        made = _added(bundle, one)
        if made.item in new or made.item in bundle.items:
            raise InputError(
                f"item {made.item!r:.80} is known", fix="add each once; features come by training"
            )
        new[made.item] = made
    out = set(had.withdrawn)
    for ids, act in ((withdraw, out.update), (restore, out.difference_update)):
        if isinstance(ids, str):
            raise InputError(f"{ids!r:.80} is one id", fix="give a list of item ids")
        named = id_list("what is withdrawn or restored", ids)
        unknown = [one for one in named if one not in new and one not in bundle.items]
        if unknown:
            raise InputError(f"unknown item {unknown[0]!r:.80}")
        act(named)
    return with_changes(bundle, Changes(tuple(sorted(out)), tuple(new[item] for item in sorted(new))))


def with_changes(bundle: Some, changes: Changes) -> Some:
    """A bundle, or its front, with exactly these changes. Raises InputError where they do not fit."""
    from recray.bundles.bundle import Bundle

    n = bundle.known
    items = type(bundle.items)(bundle.items.values.slice(0, n)).extend([one.item for one in changes.added])
    if len(items) != n + len(changes.added):
        raise InputError("an item that is added is known", fix="leave it out of the changes")
    features = _extended(bundle.item_features, n, changes.added)
    made: dict[str, Any] = {
        "items": items,
        "item_features": features,
        "filters": Filters(features, len(items)),
        "changes": changes if changes.stamp else None,
    }
    if isinstance(bundle, Bundle):
        vectors = np.array([one.vector for one in changes.added], np.float32) if changes.added else None
        gone = items.rows_of(changes.withdrawn).tolist()
        made["recommender"] = bundle.recommender.with_delta(Delta(n, vectors, (r for r in gone if r >= 0)))
    return replace(bundle, **made)


def _added(bundle: Bundle, given: Mapping[str, Any]) -> Added:
    if not isinstance(given, Mapping) or not {"item"} <= set(given) <= {"item", "vector", "like", "features"}:
        raise InputError(f"a new item is {given!r:.80}", fix=ADD)
    if ("vector" in given) == ("like" in given):
        raise InputError(f"new item {given['item']!r:.80} has no vector, or two", fix=ADD)
    if not isinstance(given.get("features", {}), Mapping):
        raise InputError(f"features of {given['item']!r:.80} are {given['features']!r:.80}", fix=ADD)
    name, index = id_text("a new item", given["item"]), bundle.recommender.index
    if not name or index is None:
        raise InputError(
            f"item {name!r:.80} cannot be added: "
            + ("it has no id" if index is not None else "the model has no item vectors"),
            fix="train again with it",
        )
    like = "like" in given
    vector = _mean(bundle, given["like"]) if like else _numbers(given["vector"], index.table.dim)
    features = {str(column): value for column, value in given.get("features", {}).items()}
    for column in features:
        bundle.filters.known(column, "feature")
    try:
        name.encode(), json.dumps(features)
    except (TypeError, ValueError) as error:
        raise InputError(f"item {name!r:.80} cannot be kept as JSON ({error})") from None
    made = Added(name, tuple(float(value) for value in vector), features)
    _extended(bundle.item_features, 0, (made,))  # a value that does not fit is said now
    return made


def _mean(bundle: Bundle, like: Any) -> Sequence[float]:
    rows = bundle.items.rows_of([str(one) for one in like] if isinstance(like, (list, tuple)) else [])
    if not len(rows) or rows.min() < 0:
        raise InputError(f"like is {like!r:.80}", fix="give known item ids")
    mean: list[float] = bundle.recommender.vectors(rows.astype(np.int64)).mean(dim=0).tolist()
    return mean


def _numbers(given: Any, dim: int) -> Sequence[float]:
    numbers: list[Any] = list(given) if isinstance(given, (list, tuple, np.ndarray)) else []
    kinds = (int, float, np.integer, np.floating)
    sound = all(isinstance(x, kinds) and not isinstance(x, bool) for x in numbers)
    sound = sound and all(-LARGEST <= x <= LARGEST for x in numbers)  # an int has no end
    if len(numbers) != dim or not sound:
        raise InputError(f"a vector is {given!r:.80}", fix=f"give {dim} finite numbers")
    return numbers


def _extended(features: pa.Table | None, n: int, added: Sequence[Added]) -> pa.Table | None:
    """The first n rows of a feature table, and behind them the new items'; nothing where nothing is told."""
    if features is None:
        return None
    columns = {}
    for name in features.column_names:
        old = features.column(name).slice(0, n)
        kind = old.type.value_type if pa.types.is_dictionary(old.type) else old.type
        told = [one.features.get(name) for one in added]
        try:
            new = pa.array(told, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise InputError(f"feature {name!r} wants {kind}, not {told!r:.80}") from None
        plain = old.cast(kind) if pa.types.is_dictionary(old.type) else old
        columns[name] = pa.chunked_array([*plain.chunks, new], kind)
    return pa.table(columns)


def id_text(what: str, value: Any) -> str:
    """An id as text; numbers are taken as they are written."""
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise InputError(f"{what} {value!r:.80} is not an id", fix="give text")
    return str(value)


def id_list(what: str, values: Any) -> list[str]:
    """A list of ids as text."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
        raise InputError(f"{what} is {values!r:.80}", fix="give a list of item ids")
    return [value if type(value) is str else id_text(what, value) for value in values]
