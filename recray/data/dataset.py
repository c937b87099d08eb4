"""The dataset artefact: ids, interactions by split in parts of contiguous users, features, links.

ids/users.parquet ids/items.parquet       column "id"; row r of the file is row r
interactions/<split>/part-00000.parquet   sorted by (user_row, time, input order); a part = a user range
items.parquet users.parquet links.parquet where given
context.json                              context column -> its values, row 0 being ""
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray import columns as col
from recray.data import feed
from recray.data.headers import CONTEXT
from recray.data.ids import Ids
from recray.data.interactions import Interactions
from recray.data.sequences import Histories, append
from recray.errors import ArtefactError, InputError
from recray.manifest import Artefact, open_artefact
from recray.storage import Place

Part = tuple[int, int]  # (i, n): the i-th of n user partitions


@dataclass(frozen=True, eq=False)
class Cases:
    """B questions with their answers: who is asked, what was known of them, what they took next.

    user_rows int32[B]; histories and targets of the same B users, targets' items all of relevance 1;
    context: column -> int32[B] value rows of each user's first target.
    """

    user_rows: NDArray[np.int32]
    histories: Histories
    targets: Histories
    context: Mapping[str, NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, some: Any) -> Cases:
        """Some of the cases: int array, bool mask or slice over B."""
        context = {name: rows[some] for name, rows in self.context.items()}
        return Cases(self.user_rows[some], self.histories.take(some), self.targets.take(some), context)


class Dataset:
    """An opened dataset artefact. Reading is lazy: a split, and of it a part, at a time."""

    def __init__(self, artefact: Artefact) -> None:
        self.artefact = artefact
        self.report = artefact.manifest.report
        self._whole: dict[str, Histories] = {}  # split -> histories of all users: asked for every epoch

    def __repr__(self) -> str:
        return f"Dataset({str(self.artefact.place)!r}, users={self.n_users}, items={self.n_items})"

    @cached_property
    def users(self) -> Ids:
        return Ids.load(self.artefact.file("ids/users.parquet"))

    @cached_property
    def items(self) -> Ids:
        return Ids.load(self.artefact.file("ids/items.parquet"))

    @property
    def n_users(self) -> int:
        return int(self.report["users"])

    @property
    def n_items(self) -> int:
        return int(self.report["items"])

    @property
    def has_times(self) -> bool:
        return bool(self.report["has_times"])

    @cached_property
    def context_values(self) -> Mapping[str, list[str]]:
        """Context column -> its values; row 0 is "" and stands for unknown."""
        if "context.json" not in self.artefact.manifest.files:
            return {}
        made: dict[str, list[str]] = json.loads(self.artefact.file("context.json").read_bytes())
        return made

    @cached_property
    def context_sizes(self) -> Mapping[str, int]:
        """Context column -> number of value rows, 0 = unknown included."""
        return {name: len(values) for name, values in self.context_values.items()}

    @cached_property
    def item_features(self) -> Any | None:
        """Arrow table, row i = item row i, null where unknown; None where no features were given."""
        return self._table("items.parquet")

    @cached_property
    def user_features(self) -> Any | None:
        """Arrow table, row u = user row u, null where unknown; None where no features were given."""
        return self._table("users.parquet")

    @cached_property
    def links(self) -> NDArray[np.int32] | None:
        """int32[L, 2] pairs of user rows, as given; None where no links were given."""
        table = self._table("links.parquet")
        return (
            None
            if table is None
            else np.stack([table.column(c).to_numpy() for c in ("user_row", "other_row")], 1)
        )

    def has_split(self, name: str) -> bool:
        return bool(self.report["interactions"].get(name, 0))

    def user_range(self, part: Part | None) -> tuple[int, int]:
        """[first, last) user rows of the i-th of n user partitions; all users for None."""
        if part is None:
            return 0, self.n_users
        i, n = part
        if not 0 <= i < n:
            raise ValueError(f"part {i} of {n}")
        return self.n_users * i // n, self.n_users * (i + 1) // n

    def interactions(self, split: str = "train", part: Part | None = None) -> Interactions:
        """The interactions of a split, or of some users only; then just their row groups are read."""
        if split not in col.SPLITS:
            raise InputError(f"unknown split {split!r}", fix=f"one of {', '.join(col.SPLITS)}")
        low, high = self.user_range(part)
        tables = [
            self._rows(name, low, high)
            for name, first, last in self.report["parts"].get(split, ())
            if first < high and last > low
        ]
        return self._interactions(pa.concat_tables(tables) if tables else None)

    def histories(self, split: str = "train", part: Part | None = None) -> Histories:
        """One history for every user (of the part), oldest first; empty for a user without interactions.

        Those of all users lie in mapped files, read-only, where the split is large (`feed.SMALL`).
        """
        if part is None and split in self._whole:
            return self._whole[split]
        if part is None and feed.large(self, split):
            self._whole[split] = feed.histories(self, split, whole=True)
            return self._whole[split]
        low, high = self.user_range(part)
        log = self.interactions(split, part)
        offsets = np.searchsorted(log.user_rows, np.arange(low, high + 1)).astype(np.int64)
        made = Histories(log.item_rows, offsets, log.weights, log.times if log.has_times else None)
        if part is None:
            self._whole[split] = made
        return made

    def cases(self, split: str, limit: int | None = None, seed: int = 0) -> Cases:
        """The users of "valid" (history: train) or "test" (history: train, then valid).

        With a limit at most so many of them, drawn by the seed: only their histories are read.
        """
        if split not in ("valid", "test"):
            raise InputError(f"no cases in split {split!r}", fix="ask for valid or test")
        if not self.has_split(split):
            raise InputError(
                f"has no {split} split", where=self.artefact.place, fix="prepare it with another --split"
            )
        log = self.interactions(split)
        targets = self.histories(split)
        asked = np.flatnonzero(targets.lengths)
        if limit is not None and len(asked) > limit:
            asked = np.sort(np.random.default_rng(seed).choice(asked, limit, replace=False))
        known = self.histories("train").take(asked)
        if split == "test" and self.has_split("valid"):
            known = append(known, self.histories("valid").take(asked))
        context = {name: rows[targets.offsets[:-1][asked]] for name, rows in log.context.items()}
        return Cases(asked.astype(np.int32), known, targets.take(asked), context)

    def _table(self, name: str) -> Any | None:
        if name not in self.artefact.manifest.files:
            return None
        with self.artefact.file(name).open() as file:
            return pq.read_table(file)

    def _rows(self, name: str, low: int, high: int) -> Any:
        """The rows of users [low, high) in one part file, read by row group."""
        where = self.artefact.file(name)
        try:
            with where.open() as file:
                made = pq.ParquetFile(file)
                groups = []
                for g in range(made.num_row_groups):
                    stats = made.metadata.row_group(g).column(0).statistics
                    if stats is None or (stats.min < high and stats.max >= low):
                        groups.append(g)
                table = made.read_row_groups(groups)
        except (pa.ArrowException, OSError) as error:
            raise ArtefactError(f"cannot be read ({error})", where=where) from None
        users = table.column(col.USER_ROW).to_numpy()
        start, stop = np.searchsorted(users, [low, high])
        return table.slice(start, stop - start)

    def _interactions(self, table: Any | None) -> Interactions:
        n = 0 if table is None else table.num_rows

        def column(name: str, kind: Any, default: int) -> NDArray[Any]:
            if table is None or name not in table.column_names:
                return np.full(n, default, kind)
            found: NDArray[Any] = table.column(name).to_numpy().astype(kind, copy=False)
            return found

        names = tuple(self.report.get("events", ()))
        return Interactions(
            column(col.USER_ROW, np.int32, 0),
            column(col.ITEM_ROW, np.int32, 0),
            column(col.TIME, np.int64, 0),
            column(col.WEIGHT, np.float32, 1),
            self.has_times,
            column(col.EVENT, np.int8, 0) if names else None,
            names,
            {name: column(CONTEXT + name, np.int32, 0) for name in self.context_values},
        )


def open_dataset(uri: str | os.PathLike[str] | Place | Dataset) -> Dataset:
    """Open and check a dataset artefact. Raises ArtefactError for anything else."""
    return uri if isinstance(uri, Dataset) else Dataset(open_artefact(uri, "dataset"))
