"""The search artefact, and the folder beside it where trials wait until there is one.

front.json    every trial: its point, metrics, whether it fits, whether another beats it
trials/       one file a trial, named by its hash
chosen.json   which one, why, and what bounded it
best/         (hyper-parameter searches) the best trial's checkpoint
trials.html   (hyper-parameter searches) a picture of all trials
parts/        (compression) what was measured of single choices, one file each, see `forecast.py`
http/         (compression) what HTTP was measured to add, where it was
front.html    (compression) quality against p99 and bytes of all trials, to be explored; front.svg a picture
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recray.errors import ArtefactError
from recray.manifest import Artefact, open_artefact, write_artefact
from recray.storage import Place, check_writable, place
from recray.tuning.trial import Trial, TrialCache, file_bytes


def open_cache(
    out: str | os.PathLike[str] | Place,
    context: Mapping[str, Any],
    folder: str = "trials",
    *,
    holds: Callable[[Mapping[str, Any]], bool] = lambda point: True,
) -> TrialCache:
    """The trials that wait beside `out`; those of a search that is finished there are taken over.

    holds: see `TrialCache`. Raises InputError, before any work, when `out` cannot be written.
    """
    target = place(out)
    check_writable(target)
    cache = TrialCache(waiting(target) / folder, context, holds)
    try:
        done = open_artefact(target, "search", verify=False)
    except ArtefactError:
        return cache
    known = {trial.hash for trial in cache.load()}
    for trial in TrialCache(done.place / folder, context, holds).load():
        if trial.hash not in known:
            cache.keep(trial)
    return cache


def waiting(out: Place) -> Place:
    """The folder beside `out` that a search uses until its artefact stands, and a killed one leaves."""
    return out.beside(f".{out.name}.search")


def write_search(
    out: str | os.PathLike[str] | Place,
    cache: TrialCache,
    trials: Sequence[Trial],
    *,
    front: Mapping[str, Any],
    chosen: Mapping[str, Any],
    parents: Mapping[str, Artefact],
    recipe: Mapping[str, Any],
    best: Callable[[Path], object] | None = None,
    pages: Mapping[str, str] | None = None,
    report: Mapping[str, Any] | None = None,
    kept: Mapping[str, TrialCache] = MappingProxyType({}),
) -> Artefact:
    """Leave the search at `out` and clear what waited beside it; `kept` has a folder of its own for each.

    `best` fills the folder `best/`; `pages` are further files, name -> text; `report` is told, too.
    """

    def fill(folder: Path) -> Mapping[str, Any]:
        (folder / "trials").mkdir()
        for trial in trials:
            (folder / "trials" / f"{trial.hash}.json").write_bytes(file_bytes(trial, cache.context))
        for name, more in kept.items():
            (folder / name).mkdir()
            for one in more.load():
                (folder / name / f"{one.hash}.json").write_bytes(file_bytes(one, more.context))
        (folder / "front.json").write_text(json.dumps(front, indent=1))
        (folder / "chosen.json").write_text(json.dumps(chosen, indent=1))
        for name, text in (pages or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        if best is not None:
            best(folder / "best")
        failed = sum(trial.error is not None for trial in trials)
        return {"trials": len(trials), "failed": failed, "chosen": dict(chosen), **(report or {})}

    made = write_artefact(out, "search", fill, parents=parents, recipe=recipe)
    discard(waiting(place(out)))
    return made


def discard(folder: Place) -> None:
    """Remove a folder of ours, wherever it lies."""
    if not folder.exists():
        return
    if folder.remote:
        folder.fs.delete_dir(folder.path)
    else:
        shutil.rmtree(folder.local, ignore_errors=True)


def copied(source: Place, folder: Path) -> None:
    """The checkpoint at `source` as the new folder `folder`, its hashes checked."""
    with open_artefact(source, "checkpoint").local() as local:
        shutil.copytree(local, folder)
