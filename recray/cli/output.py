"""What a verb hands back to be printed: text for a person, the same as data for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from recray.manifest import Artefact


class Output(NamedTuple):
    """`text` is standard output as it is, `data` with `--json`; `code` is the exit status."""

    text: str
    data: Mapping[str, Any] = {}
    code: int = 0


def made(artefact: Artefact) -> Output:
    """An artefact: its path, or what its manifest says of it."""
    manifest = artefact.manifest
    data = {
        "path": str(artefact.place),
        "kind": manifest.kind,
        "hash": manifest.hash,
        "report": manifest.report,
    }
    return Output(str(artefact.place), data)
