"""External id <-> dense row. Rows are given in order of first appearance and never change: an `Ids` only
grows, so what was trained on the old rows fits the new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray.errors import ArtefactError
from recray.storage import Place, place

_FEW = 10_000  # up to so many ids a Python dict answers quicker than hashing all known ids again


def merge(words: Sequence[Any]) -> tuple[Any, list[NDArray[np.int32]]]:
    """(all words once, by order of first appearance; for each input, int32 rows of its words in them).

    words: Arrow string arrays, each of distinct strings.
    """
    if not words:
        return pa.array([], pa.string()), []
    coded = [pa.DictionaryArray.from_arrays(np.arange(len(w), dtype=np.int32), w) for w in words]
    chunks = pa.chunked_array(coded).unify_dictionaries().chunks
    return chunks[0].dictionary, [chunk.indices.to_numpy() for chunk in chunks]


class Ids:
    """An immutable list of distinct strings; row r stands for the r-th. Ids are kept exactly ("007")."""

    def __init__(self, values: Any) -> None:
        """`values`: distinct strings, an Arrow string array or any iterable of str."""
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        if not isinstance(values, pa.Array):
            values = pa.array(list(values), pa.string())
        self.values: Any = values

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ids) and bool(self.values.equals(other.values))

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, id_: str) -> bool:
        return id_ in self._row

    def __repr__(self) -> str:
        return f"Ids({len(self)})"

    def id_of(self, row: int) -> str:
        """The id of one row; IndexError outside [0, len)."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return str(self.values[int(row)].as_py())

    def ids_of(self, rows: Any) -> list[str]:
        """The ids of many rows, in order."""
        if len(rows) > _FEW:
            return list(self.values.take(pa.array(np.asarray(rows, np.int64))).to_pylist())
        listed = rows if isinstance(rows, list) else np.asarray(rows, np.int64).tolist()
        if listed and min(listed) < 0:
            raise IndexError(f"row {min(listed)} of {len(self)}")
        names = self._names
        return [names[row] for row in listed]

    def rows_of(self, ids: Any) -> NDArray[np.int32]:
        """int32[n]: the row of each id, -1 where it is unknown."""
        if not isinstance(ids, (pa.Array, pa.ChunkedArray)):
            ids = list(ids)
            if len(ids) <= _FEW:
                row = self._row
                return np.array([row.get(i, -1) for i in ids], np.int32)
            ids = pa.array(ids, pa.string())
        found = pc.fill_null(pc.index_in(ids, value_set=self.values), -1)
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        rows: NDArray[np.int32] = found.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        return rows

    def extend(self, ids: Iterable[str] | Any) -> Ids:
        """These ids after the known ones: each new one once, in order of first appearance."""
        if not isinstance(ids, (pa.Array, pa.ChunkedArray)):
            ids = pa.array(list(ids), pa.string())
        new = pc.unique(ids)
        new = new.filter(pc.invert(pc.is_in(new, value_set=self.values)))
        return (
            Ids(pa.concat_arrays([self.values.cast(pa.string()), new.cast(pa.string())]))
            if len(new)
            else self
        )

    def save(self, path: Path) -> None:
        """One Parquet column "id"."""
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"id": self.values.cast(pa.string())})
        pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)

    def digest(self) -> str:
        """A hash of these ids in this order, alike however they are stored."""
        return hashlib.sha256(orjson.dumps(self.values.to_pylist())).hexdigest()

    @staticmethod
    def load(where: str | Path | Place) -> Ids:
        """What `save` wrote. Raises ArtefactError for a file that is something else."""
        at = place(where)
        try:
            with at.open() as file:
                return Ids(pq.read_table(file, columns=["id"]).column("id"))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ArtefactError(f"is not a file of ids ({error})", where=at) from None

    @cached_property
    def _row(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self.values.to_pylist())}

    @cached_property
    def _names(self) -> list[str]:
        return list(self._row)  # the same strings, in the order of their rows
