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


def told_trial(search: Artefact, name: str) -> dict[str, Any]:
    """All that is kept of one trial, named as for `plan_of_trial`, and its row of `front.json`.

    The values of each user are left out. Raises InputError for a name that means none or several.
    """
    found = _named(search, name)
    front = json.loads(search.file("front.json").read_bytes())
    row: dict[str, Any] = next((row for row in front["trials"] if row["trial"] == found["hash"]), {})
    detail = {key: value for key, value in found["detail"].items() if key != "values"}
    return {**row, "number": found["number"], "seconds": found["seconds"], "detail": detail}


def _named(search: Artefact, name: str) -> dict[str, Any]:
    files = [file for file in search.manifest.files if file.startswith("trials/")]
    every = [{"hash": file[7:-5], **json.loads(search.file(file).read_bytes())} for file in files]
    trials = [one for one in every if name.isdecimal() and one["number"] == int(name)]
    trials = trials or [one for one in every if one["hash"].startswith(name)]
    if len(trials) != 1:
        known = ", ".join(sorted(file[7:15] for file in files)[:8])
        what = "several trials" if trials else "no trial"
        raise InputError(f"{name!r} means {what}", where=search.place, fix=f"there are {known}")
    found: dict[str, Any] = trials[0]
    return found
