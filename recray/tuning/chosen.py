"""Find one trial of a finished compression search: the chosen one, or one that is named."""

from __future__ import annotations

import json
from typing import Any

from recray import config
from recray.bundles.plan import Plan
from recray.errors import InputError
from recray.manifest import Artefact


def plan_of_trial(search: Artefact, trial: str | None = None) -> Plan:
    """The plan of the chosen trial; or of `trial`, its number, its hash or the start of it.

    Raises InputError when nothing was chosen (no trial fits the budget), for a name that means none or
    several trials, and for a trial that failed.
    """
    name = trial or search.manifest.report["chosen"]["trial"]
    if name is None:
        raise InputError(
            "no trial fits the budget of this search", where=search.place, fix="name one of its trials"
        )
    found = _named(search, str(name))
    if found["error"]:
        raise InputError(f"trial {found['number']} failed ({found['error']})", where=search.place)
    return config.build(Plan, found["detail"]["plan"], where="plan")


def _named(search: Artefact, name: str) -> dict[str, Any]:
    files = [file for file in search.manifest.files if file.startswith("trials/")]
    matching = [file for file in files if file.startswith(f"trials/{name}")]
    trials = [json.loads(search.file(file).read_bytes()) for file in matching or files]
    if not matching:
        trials = [one for one in trials if name.isdecimal() and one["number"] == int(name)]
    if len(trials) != 1:
        known = ", ".join(sorted(file[7:15] for file in files)[:8])
        what = "several trials" if trials else "no trial"
        raise InputError(f"{name!r} means {what}", where=search.place, fix=f"there are {known}")
    found: dict[str, Any] = trials[0]
    return found
