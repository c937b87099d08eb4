"""What was asked of prepare: options resolved, every file looked at, inputs fingerprinted; and a tally."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from recray import columns as col
from recray import config
from recray.data import features, files, formats, parts, spans, splits
from recray.data.interactions import Problem, Rules
from recray.errors import InputError
from recray.progress import say, warn
from recray.storage import Place, place

VERSION = 2  # of the preparation: a change of what it makes changes the fingerprint
SAID = 3  # files of a log whose reading is told


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of prepare; see there."""

    items: Any = None
    users: Any = None
    links: Any = None
    columns: Mapping[str, str] = field(default_factory=dict)
    context: tuple[str, ...] = ()
    event_weights: Mapping[str, float] = field(default_factory=dict)
    valid: Any = None
    test: Any = None
    split: str = "leave-one-out"
    dedupe: bool = False
    min_weight: float | None = None


@dataclass(frozen=True)
class Request:
    """What was asked for, resolved: the files, how each is read, and what is done with them."""

    options: Options
    groups: Mapping[str, tuple[formats.Source, ...]]  # split ("train" for the log) -> its files
    spans: Mapping[str, tuple[spans.Span, ...]]
    recipe: Mapping[str, Any]  # of the artefact: the options and the fingerprints
    rules: Rules
    plan: parts.Plan

    @property
    def has_times(self) -> bool:
        """Whether every file of the log has times; a given split without them keeps its order."""
        return all(col.TIME in source.columns for source in self.groups["train"])

    @property
    def has_weights(self) -> bool:
        """Whether a weight can be other than 1."""
        return bool(self.options.event_weights) or self._some(col.WEIGHT)

    @property
    def has_events(self) -> bool:
        """Whether a file has kinds of events."""
        return self._some(col.EVENT)

    def _some(self, role: str) -> bool:
        return any(role in source.columns for group in self.groups.values() for source in group)


@dataclass
class Tally:
    """What was read and what was dropped."""

    rows: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)

    def count(self, rows: int, problems: Mapping[str, Problem]) -> None:
        """Add what one block had; blocks come in input order, so the first example is the log's first."""
        self.rows += rows
        for reason, problem in problems.items():
            before = self.problems.get(reason, replace(problem, count=0))
            self.problems[reason] = replace(before, count=before.count + problem.count)

    def reasons(self) -> str:
        """Why rows were dropped, in one line."""
        return "; ".join(
            f"{p.count} {reason} (first: line {p.place()} of {os.path.basename(p.file)}: {p.example})"
            for reason, p in self.problems.items()
        )

    def check(self, left: int, where: object) -> None:
        """Refuse a log of which nothing is left, or most lines do not even parse."""
        if not self.rows:
            raise InputError("has no rows below its header", where=where)
        if not left:
            raise InputError(f"nothing is left of {self.rows} rows: {self.reasons()}", where=where)
        broken = sum(
            p.count for reason, p in self.problems.items()
            if reason.startswith(("wrong number", "not a JSON", "not valid UTF-8", "malformed"))
        )  # fmt: skip
        if broken > self.rows / 2:
            raise InputError(
                f"{broken} of {self.rows} rows cannot be read: {self.reasons()}",
                where=where,
                fix="check --columns",
            )


def inspect(logs: Any, options: Options) -> Request:
    """Check the options, look at every file, and fingerprint the inputs. Raises InputError."""
    for name, number in (("min-weight", options.min_weight), *options.event_weights.items()):
        if number is not None and not math.isfinite(number):
            raise InputError(f"{name} is {number}", fix="give a finite number")
    if options.split not in splits.METHODS:
        raise config.unknown_name("split", options.split, splits.METHODS)
    given = options.valid is not None or options.test is not None
    groups: dict[str, tuple[formats.Source, ...]] = {}
    made: dict[str, tuple[spans.Span, ...]] = {}
    prints: dict[str, Any] = {}
    for name, paths in (("train", logs), ("valid", options.valid), ("test", options.test)):
        if paths is not None:
            groups[name], made[name], prints[name] = _look(paths, options)
    for name in ("items", "users", "links"):
        path = getattr(options, name)
        if path is not None:
            prints[name] = [os.path.basename(place(path).path), features.fingerprint(path)]
    train = groups["train"]
    timed = [source for source in train if col.TIME in source.columns]
    if 0 < len(timed) < len(train):
        other = next(source.place for source in train if source not in timed)
        warn(f"{other} has no times, so those of {timed[0].place} are not used, either")
    if options.event_weights and not any(col.EVENT in s.columns for s in train):
        raise InputError("event weights, but no event column", fix="name it: --columns event=NAME")
    if options.split == "time" and not given and not all(col.TIME in s.columns for s in train):
        raise InputError("a split by time, but no time column", fix="name it: --columns time=NAME")
    recipe = {
        "prepare": VERSION,
        "inputs": prints,
        "columns": dict(options.columns),
        "context": list(options.context),
        "event_weights": dict(options.event_weights),
        "split": "given" if given else options.split,
        "dedupe": options.dedupe,
        "min_weight": options.min_weight,
    }
    plan = parts.Plan("none" if given else options.split, options.dedupe, given)
    rules = Rules.today(options.min_weight, options.event_weights)
    return Request(options, groups, made, recipe, rules, plan)


def _look(paths: Any, options: Options) -> tuple[tuple[formats.Source, ...], tuple[spans.Span, ...], Any]:
    """(how each file is read, their spans in order, their fingerprints)."""
    one = isinstance(paths, (str, os.PathLike, Place))
    sources = [
        formats.sniff(where, options.columns, options.context)
        for where in files.list_files([paths] if one else list(paths))
    ]
    for source in sources[:SAID]:
        say(f"reading {source.assumed()}")
    if len(sources) > SAID:
        say(f"reading {len(sources) - SAID} more files likewise")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        scanned = list(pool.map(spans.scan, sources))
    cut = tuple(span for _, found in scanned for span in found)
    return (
        tuple(sources),
        cut,
        [[os.path.basename(s.place.path), sha] for s, (sha, _) in zip(sources, scanned)],
    )
