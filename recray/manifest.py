"""Artefacts: a folder with a `manifest.json` that says what it is and what it was made from.

`hash` names the content (kind, files, parents, recipe): two runs that make the same thing have the
same hash. `checksum` covers the manifest itself. Opening checks both, and the files it reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import hmac
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recray.errors import ArtefactError, InputError
from recray.storage import MANIFEST, SIGNATURE, Place, place, scratch, staged

FORMAT = 1
KEY_ENV, KEY_BYTES = "RECRAY_SIGNING_KEY", 16
KINDS = ("dataset", "checkpoint", "search", "bundle", "recommendations", "answers")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds. `files` maps a relative name to its bytes and sha256."""

    kind: str
    files: Mapping[str, Mapping[str, Any]]
    parents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # role -> {uri, hash}
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the resolved configuration
    report: Mapping[str, Any] = field(default_factory=dict)  # what was counted or measured
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    format: int = FORMAT
    hash: str = ""
    checksum: str = ""


@dataclass(frozen=True)
class Artefact:
    """An opened artefact: its place and its manifest."""

    place: Place
    manifest: Manifest

    @property
    def hash(self) -> str:
        return self.manifest.hash

    def as_parent(self) -> dict[str, str]:
        return {"uri": self.place.uri, "hash": self.hash}

    def holds(self, name: str) -> bool:
        """Whether the manifest lists that file, or one in that folder: what else lies there is not ours."""
        return any(listed == name or listed.startswith(f"{name}/") for listed in self.manifest.files)

    def file(self, name: str) -> Place:
        """The place of a file that the manifest lists."""
        if name not in self.manifest.files:
            raise ArtefactError(f"has no file {name!r}", where=self.place)
        return self.place / name

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """The folder on this machine: itself, or a verified copy that lives inside the block."""
        if not self.place.remote:
            yield self.place.local
            return
        with scratch() as folder:
            for name in (*self.manifest.files, MANIFEST):
                goal = folder / name
                goal.parent.mkdir(parents=True, exist_ok=True)
                goal.write_bytes((self.place / name).read_bytes())
            copy = Artefact(place(folder), self.manifest)
            for name in self.manifest.files:
                check_file(copy, name)
            yield folder


def write_artefact(
    out: str | os.PathLike[str] | Place,
    kind: str,
    fill: Callable[[Path], Mapping[str, Any] | None],
    *,
    parents: Mapping[str, Artefact] | None = None,
    recipe: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> Artefact:
    """Let `fill(folder)` write the files aside, add the manifest, rename into `out`.

    What `fill` returns is merged into the report. Nothing is left behind when it raises.
    """
    target = place(out)
    with staged(target) as folder:
        counted = fill(folder) or {}
        files = {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        manifest = _sealed(
            Manifest(
                kind=kind,
                files=files,
                parents={role: parent.as_parent() for role, parent in (parents or {}).items()},
                recipe=dict(recipe or {}),
                report={**(report or {}), **counted},
                versions=versions(),
                created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            )
        )
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True))
        if (key := signing_key()) is not None:
            (folder / SIGNATURE).write_text(_signature(manifest, key))
    return Artefact(target, manifest)


def open_artefact(uri: str | os.PathLike[str] | Place, *kinds: str, verify: bool = True) -> Artefact:
    """Read and check the manifest; with `verify`, every byte of every file as well.

    Raises ArtefactError for a folder that is missing, altered, or none of `kinds`.
    """
    where = place(uri)
    want = " or ".join(kinds) or "recray artefact"
    try:
        manifest = _read((where / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        known = f"has no {MANIFEST}" if where.exists() else "is not there"
        raise ArtefactError(known, where=where, fix=f"give the folder of a {want}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise ArtefactError(f"{MANIFEST} cannot be used ({error})", where=where) from None
    if kinds and manifest.kind not in kinds:
        raise ArtefactError(f"is a {manifest.kind}, not a {want}", where=where)
    artefact = Artefact(where, manifest)
    if verify:
        for name in manifest.files:
            check_file(artefact, name)
    return artefact


def _read(data: bytes) -> Manifest:
    """Parse and check a manifest; ValueError and its like say what is wrong with it."""
    raw = json.loads(data)
    if not isinstance(raw, dict) or "format" not in raw:
        raise ValueError("it is not a manifest")
    if raw["format"] != FORMAT:
        raise ValueError(f"it has format {raw['format']}, this version reads {FORMAT}")
    manifest = Manifest(**raw)
    if _checksum(manifest) != manifest.checksum or _content_hash(manifest) != manifest.hash:
        raise ValueError("it was altered: its checksum does not match")
    for name in manifest.files:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"it lists a file outside the folder, {name!r}")
    return manifest


def check_file(artefact: Artefact, name: str) -> None:
    """Compare one file's size and sha256 with the manifest."""
    entry, at = artefact.manifest.files[name], artefact.place / name
    try:
        if at.remote:
            data = at.read_bytes()
            same = len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]
        else:
            same = at.local.stat().st_size == entry["bytes"] and sha256(at.local) == entry["sha256"]
    except OSError:
        raise ArtefactError("is missing", where=at, fix="make the artefact again") from None
    if not same:
        raise ArtefactError(
            "was altered: its bytes do not match the manifest", where=at, fix="make the artefact again"
        )


def signing_key(file: str | None = None) -> bytes | None:
    """The key from a file, else from $RECRAY_SIGNING_KEY, else None. Raises InputError for a short one."""
    try:
        text = os.environ.get(KEY_ENV) if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError("the signing key cannot be read", where=file) from None
    if text is None:
        return None
    if len(key := text.strip().encode()) < KEY_BYTES:
        where = f"${KEY_ENV}" if file is None else file
        raise InputError("is too short for a signing key", where=where, fix=f"use {KEY_BYTES} bytes or more")
    return key


def check_signature(artefact: Artefact, key: bytes) -> None:
    """Raises ArtefactError unless the manifest was signed with this key (HMAC-SHA256 over its checksum)."""
    try:
        given = (artefact.place / SIGNATURE).read_bytes()
    except OSError:
        fix = f"make it again where ${KEY_ENV} is set"
        raise ArtefactError("is not signed", where=artefact.place, fix=fix) from None
    if not hmac.compare_digest(given.strip(), _signature(artefact.manifest, key).encode()):
        raise ArtefactError("was signed with another key, or altered", where=artefact.place)


def _signature(manifest: Manifest, key: bytes) -> str:
    return hmac.new(key, b"recray manifest " + manifest.checksum.encode(), hashlib.sha256).hexdigest()


def open_parent(artefact: Artefact, role: str, override: object = None) -> str:
    """The URI of a parent, or `override`; the parent's hash is checked when the manifest names it."""
    if override is not None:
        return str(override)
    entry = artefact.manifest.parents.get(role)
    if entry is None:
        raise ArtefactError(f"names no {role} it was made from", where=artefact.place)
    found = open_artefact(entry["uri"], *((role,) if role in KINDS else ()), verify=False)
    if found.hash != entry["hash"]:
        raise ArtefactError(
            f"is not the {role} that {artefact.place} was made from (hash {found.hash[:12]}, "
            f"expected {entry['hash'][:12]})",
            where=entry["uri"],
            fix=f"give the {role} explicitly",
        )
    return entry["uri"]


def lineage(artefact: Artefact) -> list[dict[str, Any]]:
    """Every ancestor, nearest first: {role, kind, uri, hash, found}; `found` says how it is today.

    `found` is "as named", "missing" or "another" (something else lies there now); only the first is
    followed further.
    """
    rows: list[dict[str, Any]] = []
    waiting = [(role, dict(entry)) for role, entry in artefact.manifest.parents.items()]
    while waiting:
        role, entry = waiting.pop(0)
        row = {"role": role, "kind": None, **entry, "found": "as named"}
        try:
            parent = open_artefact(entry["uri"], verify=False)
        except InputError:
            row["found"] = "missing"
        else:
            row["kind"] = parent.manifest.kind
            if parent.hash != entry["hash"]:
                row["found"] = "another"
            elif all(known["hash"] != parent.hash for known in rows):
                waiting += [(r, dict(e)) for r, e in parent.manifest.parents.items()]
        rows.append(row)
    return rows


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    made = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def digest(value: Any) -> str:
    """sha256 of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions that decide whether a result can be repeated."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("recray", "ray", "torch", "numpy", "pyarrow", "faiss-cpu", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _content_hash(manifest: Manifest) -> str:
    return digest(
        {
            "kind": manifest.kind,
            "files": {name: entry["sha256"] for name, entry in manifest.files.items()},
            "parents": {role: entry["hash"] for role, entry in manifest.parents.items()},
            "recipe": manifest.recipe,
        }
    )


def _checksum(manifest: Manifest) -> str:
    return digest({**dataclasses.asdict(manifest), "checksum": ""})


def _sealed(manifest: Manifest) -> Manifest:
    """Normalize through JSON (tuples become lists, NaN null), then hash and checksum."""
    text = json.dumps(dataclasses.asdict(manifest))
    plain = Manifest(**json.loads(text, parse_constant=lambda _: None))
    hashed = dataclasses.replace(plain, hash=_content_hash(plain))
    return dataclasses.replace(hashed, checksum=_checksum(hashed))
