"""Answers for many users at once: chunks of ids in, one Parquet file out, in the order of the ids.

recommendations.parquet: user (string), place (int32, from 1), item (string), score (float32), source
(string); a user has at most k lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recray.bundles.bundle import Bundle, Request, open_bundle
from recray.bundles.changes import Changes, with_changes
from recray.data.sequences import Histories, append
from recray.data.values import text_of
from recray.errors import ArtefactError, InputError
from recray.manifest import Artefact, write_artefact
from recray.progress import bar, warn
from recray.storage import Place, place

CHUNK = 2048  # users answered together; a task of a cluster
FILE = "recommendations.parquet"
SCHEMA = pa.schema(
    {
        "user": pa.string(),
        "place": pa.int32(),
        "item": pa.string(),
        "score": pa.float32(),
        "source": pa.dictionary(pa.int8(), pa.string()),
    }
)

Chunk = list[str]
BlockMap = Callable[[Callable[[Chunk], pa.Table], Iterable[Chunk]], Iterator[pa.Table]]
"""Applies a function to chunks, here or on a cluster, and gives the results in order."""


def recommend_many(
    bundle: Bundle,
    users: str | os.PathLike[str] | Sequence[str],
    *,
    k: int,
    out: Place,
    block_map: BlockMap = map,
    asked: Mapping[str, Any] | None = None,
) -> Artefact:
    """Leave a "recommendations" artefact with the k best items of each user, what they know left out.

    users: ids, or a file of them (see `read_users`); one that comes twice is answered once. A user
    nobody knows gets what is popular, and is counted in the report. asked: what else `Bundle.recommend`
    takes, alike for all: filter, pin, ..., as JSON has it, since the manifest keeps it. Raises InputError.
    """
    file: Place | None = None
    if isinstance(users, (str, os.PathLike)):
        file, users = place(users), read_users(users)
    ids = list(dict.fromkeys(str(user) for user in users))
    if not ids:
        raise InputError("no user is named", where=file)
    request = bundle.request(k=k, **asked or {})
    recipe = {"k": request.k, "exclude_seen": True, "asked": dict(asked or {})}
    try:
        json.dumps(recipe)
    except (TypeError, ValueError) as error:
        raise InputError(f"what is asked for is no JSON ({error})", fix="give text, numbers, lists") from None
    unknown = int((bundle.users.rows_of(ids) < 0).sum())
    if file is not None and unknown == len(ids):
        warn(f"{file}: the bundle knows none of these {unknown} users; are the ids those of its log?")
    uri = bundle.artefact.place.uri
    answer = partial(_answer_at, uri, bundle.generation, bundle.changes or Changes(), request)
    if block_map is map:
        answer = partial(answer_chunk, bundle, request)

    def fill(folder: Path) -> Mapping[str, Any]:
        chunks = (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
        lines = 0
        with (
            bar("recommending", len(ids), "user") as said,
            pq.ParquetWriter(folder / FILE, SCHEMA) as file,
        ):
            for start, table in zip(range(0, len(ids), CHUNK), block_map(answer, chunks)):
                file.write_table(table)
                lines += len(table)
                said.update(min(CHUNK, len(ids) - start))
        return {"users": len(ids), "unknown_users": unknown, "rows": lines}

    return write_artefact(out, "recommendations", fill, parents={"bundle": bundle.artefact}, recipe=recipe)


def answer_chunk(bundle: Bundle, request: Request, ids: Chunk) -> pa.Table:
    """The answers to a few users as a table of SCHEMA; the same as `Bundle.recommend` one by one.

    request: what is asked for each of them, without a history.
    """
    rows = bundle.users.rows_of(ids)
    ends, weights = bundle.histories.offsets, bundle.histories.weights
    some = [slice(*ends[row : row + 2]) if row >= 0 else slice(0, 0) for row in rows.tolist()]
    histories = Histories.of([bundle.histories.items[at] for at in some])
    barred = histories
    if weights is not None:
        histories = replace(histories, weights=np.concatenate([weights[at] for at in some]))
    if len(request.exclude):
        barred = append(histories, Histories.of([request.exclude] * len(ids)))
    context = {name: np.full(len(ids), row, np.int32) for name, row in request.context.items()}
    arguments = {**bundle.arguments(request), "histories": histories, "exclude": barred, "context": context}
    ranked = bundle.recommender.recommend(**arguments)
    kept = ranked.rows >= 0
    user, position = np.nonzero(kept)
    sources = np.asarray(ranked.sources)[user].astype(object)
    sources[np.isin(ranked.rows[kept], list(request.pinned))] = "pin"
    columns = [
        pa.array(ids, pa.string()).take(pa.array(user)),
        pa.array(position + 1, pa.int32()),
        pa.array(bundle.items.ids_of(ranked.rows[kept]), pa.string()),
        pa.array(ranked.scores[kept], pa.float32()),
        pa.array(sources, pa.string()).dictionary_encode().cast(SCHEMA.field("source").type),
    ]
    return pa.table(columns, schema=SCHEMA)


def read_users(path: str | os.PathLike[str]) -> Chunk:
    """Ids from a text file with one a line, or from the column `user` (or the only one) of a Parquet file.

    They are read as `prepare` reads them: blanks around one are part of it. Raises InputError for a file
    that cannot be read so.
    """
    where = place(path)
    try:
        if where.path.endswith(".parquet"):
            return _user_column(where)
        lines = where.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise InputError(f"cannot be read as user ids ({error})", where=where) from None
    return [user for line in lines if (user := line.removesuffix("\r"))]


def _user_column(where: Place) -> Chunk:
    with where.open() as file:
        table = pq.read_table(file)
    names = table.column_names
    if "user" not in names and len(names) != 1:
        raise InputError("has no column 'user'", where=where, fix="name the column of the ids so")
    words, unreadable = text_of(table.column(names.index("user") if "user" in names else 0))
    if unreadable is not None:
        raise InputError("cannot be read as user ids (not all are UTF-8)", where=where)
    return [user for user in words.to_pylist() if user]


@lru_cache(maxsize=1)
def _opened(uri: str) -> Bundle:
    return open_bundle(uri, threads=1)


def _answer_at(uri: str, generation: str, changes: Changes, request: Request, ids: Chunk) -> pa.Table:
    """`answer_chunk` on a machine that opens the bundle itself, once a process."""
    bundle = _opened(uri)
    if changes != (bundle.changes or Changes()):
        bundle = with_changes(bundle, changes)
    if bundle.generation != generation:
        raise ArtefactError("was replaced while it was in use", where=uri)
    return answer_chunk(bundle, request, ids)
