"""Where artefacts lie: a local folder or any `pyarrow.fs` URI (s3://, gs://, hdfs://, file://).

Local artefacts are written beside their place and renamed into it. Object stores have no rename:
there files go up first and `manifest.json` last, so a folder without a manifest is not an artefact.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from recray.errors import InputError

if TYPE_CHECKING:
    from pyarrow import NativeFile

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"  # beside the manifest, where a key was set when it was written
FRESH_S = 2.0  # age at which a scratch folder has its lock, if it will ever have one
_COPY = 8 << 20  # bytes a copy moves at a time


@dataclass(frozen=True)
class Place:
    """A file or folder, local or remote. `uri` is what the user wrote."""

    uri: str
    path: str  # inside `fs`
    remote: bool

    @cached_property
    def fs(self) -> Any:
        from pyarrow import fs

        return _remote(self.uri)[0] if self.remote else fs.LocalFileSystem()

    @property
    def local(self) -> Path:
        """The local path; a programming error for a remote place."""
        if self.remote:
            raise ValueError(f"{self.uri} is not local")
        return Path(self.path)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    def __truediv__(self, name: str) -> Place:
        return self._at(lambda path: f"{path}/{name}")

    def beside(self, name: str) -> Place:
        """What has this name in the same folder."""
        return self._at(lambda path: f"{path.rpartition('/')[0]}/{name}")

    def _at(self, moved: Callable[[str], str]) -> Place:
        """Another place of the same file system; the query of a URI says how it is reached, and stays."""
        base, mark, query = self.uri.partition("?") if self.remote else (self.uri, "", "")
        made = Place(
            f"{moved(base.rstrip('/'))}{mark}{query}", moved(self.path.rstrip("/")), remote=self.remote
        )
        if self.remote:
            made.__dict__["fs"] = self.fs  # one connection for a folder and what is in it
        return made

    def exists(self) -> bool:
        from pyarrow import fs

        if not self.remote:
            return self.local.exists()
        return bool(self.fs.get_file_info(self.path).type != fs.FileType.NotFound)

    def is_dir(self) -> bool:
        from pyarrow import fs

        if not self.remote:
            return self.local.is_dir()
        return bool(self.fs.get_file_info(self.path).type == fs.FileType.Directory)

    def open(self) -> NativeFile:
        """Open for random reads; local files are memory-mapped."""
        import pyarrow as pa

        if not self.remote:
            return pa.memory_map(self.path) if os.path.getsize(self.path) else pa.OSFile(self.path)
        return self.fs.open_input_file(self.path)

    def read_bytes(self) -> bytes:
        if not self.remote:
            return self.local.read_bytes()
        with self.fs.open_input_stream(self.path) as stream:
            return bytes(stream.read())


def place(uri: str | os.PathLike[str] | Place) -> Place:
    """Resolve what a user wrote. Local paths become absolute (Ray workers have other folders)."""
    if isinstance(uri, Place):
        return uri
    text = os.fspath(uri)
    if not text.strip() or "\0" in text:
        raise InputError("is not the name of a file or folder", where=repr(text))
    if "://" in text and not text.startswith("file://"):
        _check_secret(text)
        inside = _remote(text)[1]
        if not inside.strip("/"):
            raise InputError("names no bucket or folder", where=text)
        return Place(text, inside, remote=True)
    bare = unquote(text.removeprefix("file://")) if text.startswith("file://") else text
    path = os.path.abspath(os.path.expanduser(bare))
    return Place(path, path, remote=False)


def _check_secret(uri: str) -> None:
    """Refuse a key in a URI: places are written to manifests and named in what is said."""
    scheme, _, rest = uri.partition("://")
    who, at, _ = rest.partition("?")[0].partition("/")[0].rpartition("@")
    if at and ":" in who:
        raise InputError(
            "holds a secret key, which would be written down with it",
            where=f"{scheme}://...",
            fix="leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )


def _remote(uri: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"not a place we can reach ({error})", where=uri) from None
    return filesystem, path


@contextlib.contextmanager
def staged(out: str | os.PathLike[str] | Place) -> Iterator[Path]:
    """A scratch folder that becomes `out` when the block ends well, and vanishes when it does not.

    An existing artefact (or empty folder) at `out` is replaced; any other folder is refused.
    """
    target = place(out)
    check_writable(target)
    if target.remote:
        with scratch() as folder:
            yield folder
            _upload(folder, target)
        return
    final = target.local
    final.parent.mkdir(parents=True, exist_ok=True)
    with _held(final.parent, f".{final.name}.", ".partial") as folder:
        yield folder
        folder.chmod(0o755)
        _swap(folder, final)


def scratch() -> contextlib.AbstractContextManager[Path]:
    """A folder of this machine for the length of a block; what killed processes left of theirs goes first."""
    return _held(Path(tempfile.gettempdir()), "recray-scratch-", "")


@contextlib.contextmanager
def _held(parent: Path, prefix: str, suffix: str) -> Iterator[Path]:
    """A fresh folder with a lock, and both go with the block. Those without one were left by a kill."""
    _sweep(parent, f"{glob.escape(prefix)}????????{suffix}")
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: what a kill leaves stays there
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, named: str) -> None:
    """Remove the folders that killed processes left: nobody holds their lock."""
    for left in parent.glob(named):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime < FRESH_S:
                continue
            held = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(held)


def check_writable(out: str | os.PathLike[str] | Place) -> None:
    """Refuse, before any work, an `out` that holds something which is not ours to replace."""
    target = place(out)
    if not target.remote and target.local.is_file():
        raise InputError("is a file, and the result is a folder", where=target, fix="choose another --out")
    if other := _not_ours(target):
        words = f"is a folder with other things in it, such as {other!r}"
        raise InputError(words, where=target, fix="choose another --out")
    if target.remote:
        return
    path = target.local
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError("cannot be written", where=path, fix="choose another --out")


def _not_ours(target: Place) -> str:
    """The name of something in a folder that is no part of a result of ours; "" where there is nothing.

    Folders without a file are no part of ours where nothing else is there. Nothing is listed whole: it may be
    somebody's home.
    """
    if not target.remote and not target.local.is_dir():
        return ""
    try:
        raw = json.loads((target / MANIFEST).read_bytes())
        ours = {*raw["files"], MANIFEST, SIGNATURE} if {"format", "kind", "checksum"} <= raw.keys() else set()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        ours = set()
    if target.remote:
        start = len(target.path.rstrip("/")) + 1
        return next((name for path in sorted(_others(target)) if (name := path[start:]) not in ours), "")
    if not ours:
        return min(os.listdir(target.local), default="")
    above = {parent.as_posix() for name in ours for parent in PurePosixPath(name).parents}
    folders = [""]
    while folders:
        folder = folders.pop()
        for found in sorted(os.scandir(target.local / folder), key=lambda found: found.name):
            name = f"{folder}{found.name}"
            if not found.is_dir(follow_symlinks=False):
                if name not in ours:
                    return name
            elif name in above:
                folders.append(f"{name}/")
            elif any(files for _, _, files in os.walk(found.path)):
                return name
    return ""


def _swap(scratch: Path, final: Path) -> None:
    if not final.exists():
        os.rename(scratch, final)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
    os.rename(final, old / "was")
    try:
        os.rename(scratch, final)
    except OSError:
        os.rename(old / "was", final)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _others(target: Place) -> list[str]:
    """The paths of the files below a remote folder."""
    from pyarrow import fs

    chosen = fs.FileSelector(target.path, recursive=True, allow_not_found=True)
    return [i.path for i in target.fs.get_file_info(chosen) if i.type == fs.FileType.File]


def _upload(folder: Path, target: Place) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files.sort(key=lambda p: p.name == MANIFEST and p.parent == folder)  # the manifest last
    old = sorted(_others(target), key=lambda path: path != f"{target.path.rstrip('/')}/{MANIFEST}")
    for path in old:  # the old manifest first: nobody may read it beside new files
        target.fs.delete_file(path)
    target.fs.create_dir(target.path, recursive=True)
    for file in files:
        goal = target / file.relative_to(folder).as_posix()
        with file.open("rb") as source, goal.fs.open_output_stream(goal.path) as sink:
            while block := source.read(_COPY):
                sink.write(block)


def write_file(path: Path, data: bytes) -> None:
    """Write one file aside and rename it into place."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
