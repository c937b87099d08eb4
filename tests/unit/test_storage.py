from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import InputError
from recray.storage import MANIFEST, Place, check_writable, place, scratch, staged, write_file


def _tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def _artefact(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / MANIFEST).write_text(_manifest(*files))


def _manifest(*files: str) -> str:
    listed: dict[str, object] = {name: {} for name in files}
    return json.dumps({"format": 1, "kind": "dataset", "checksum": "", "files": listed})


def test_a_local_place_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place("a/b") == place(Path("a") / "b") == place(f"file://{tmp_path}/a/b")
    assert place("a").local == tmp_path / "a"
    assert place(f"file://{tmp_path}/a%20b").local == tmp_path / "a b"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/x").local == tmp_path / "x"
    assert (place("a") / "b/c").local == tmp_path / "a" / "b" / "c"
    assert (place("a") / "b").name == "b"
    same = place("a")
    assert place(same) is same


@pytest.mark.parametrize(
    ("uri", "beside"),
    [("s3://b/a/x?region=r-1&scheme=http", "s3://b/a/x.from?region=r-1&scheme=http"), ("/a/x/", "/a/x.from")],
)
def test_what_is_beside_keeps_how_it_is_reached(uri: str, beside: str) -> None:
    found = place(uri).beside("x.from")
    assert found.uri == beside
    assert found.path == place(beside).path


def test_a_key_in_a_uri_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="holds a secret key") as told:
        place("s3://AKIAKEY:TOPSECRET@bucket/folder")
    assert "AKIAKEY" not in str(told.value)
    assert "TOPSECRET" not in str(told.value)
    assert place("s3://bucket/a:b@c?region=r-1").path == "bucket/a:b@c"


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "nowhere://x/y", "s3://"])
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        place(text)


@given(st.text(min_size=1, max_size=30))
def test_any_text_is_a_place_or_refused(text: str) -> None:
    try:
        found = place(text)
    except InputError:
        return
    assert found.remote or os.path.isabs(found.path)


def test_staged_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as scratch:
        (scratch / "a").write_text("1")
        assert not out.exists()
    assert _tree(tmp_path) == {"deep", "deep/out", "deep/out/a"}
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_half_written_stays(tmp_path: Path, error: type[BaseException]) -> None:
    _artefact(tmp_path / "out", old="1")
    with pytest.raises(error), staged(tmp_path / "out") as scratch:
        (scratch / "new").write_text("2")
        raise error
    assert _tree(tmp_path) == {"out", f"out/{MANIFEST}", "out/old"}


def test_an_artefact_is_replaced_as_a_whole(tmp_path: Path) -> None:
    _artefact(tmp_path / "out", old="1")
    with staged(tmp_path / "out") as scratch:
        _artefact(scratch, new="2")
    assert _tree(tmp_path) == {"out", f"out/{MANIFEST}", "out/new"}


def test_a_failed_swap_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _artefact(tmp_path / "out", old="1")
    rename, calls = os.rename, []

    def second_fails(source: object, goal: object) -> None:
        calls.append(goal)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, goal)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"), staged(tmp_path / "out") as scratch:
        _artefact(scratch, new="2")
    assert _tree(tmp_path) == {"out", f"out/{MANIFEST}", "out/old"}


def test_other_folders_are_not_ours_to_replace(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("miau")
    (tmp_path / "file").write_text("x")
    (tmp_path / "plan" / "notes").mkdir(parents=True)
    for name in ("photos", "file", "file/below", "plan"):
        with pytest.raises(InputError, match="choose another --out"), staged(tmp_path / name):
            pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "empty")
    assert (tmp_path / "photos" / "cat.png").read_text() == "miau"
    assert (tmp_path / "plan" / "notes").is_dir()


def test_what_others_put_below_ours_is_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "parts" / "empty").mkdir(parents=True)
    (out / "parts" / "a").write_text("x")
    (out / MANIFEST).write_text(_manifest("parts/a"))
    check_writable(out)
    (out / "parts" / "empty" / "deep").mkdir()
    (out / "parts" / "empty" / "deep" / "cat.png").write_text("miau")
    with pytest.raises(InputError, match="such as 'parts/empty'"):
        check_writable(out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / "out")


@given(st.binary(max_size=2000))
def test_write_file_gives_the_bytes_back(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        write_file(path, b"before")
        write_file(path, data)
        assert path.read_bytes() == data == place(path).read_bytes()
        assert place(path).open().read() == data
        assert path.stat().st_mode & 0o777 == 0o644
        assert os.listdir(folder) == ["x"]


def test_write_file_leaves_the_old_one_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "x", b"new")
    assert _tree(tmp_path) == {"x"}
    assert (tmp_path / "x").read_text() == "old"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A local S3 server: `{bucket}` is the start of URIs, `?...` their end."""
    from moto.server import ThreadedMotoServer

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in keys.items():
            patch.setenv(key, value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            tail = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
            place(f"s3://bucket/{tail}").fs.create_dir("bucket")
            yield f"s3://bucket/%s{tail}"
        finally:
            server.stop()


def test_an_object_store_gets_the_manifest_last(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = place(bucket % "run/one")
    assert target.remote
    assert not target.exists()
    order: list[str] = []
    below = Place.__truediv__
    monkeypatch.setattr(Place, "__truediv__", lambda self, name: order.append(name) or below(self, name))  # type: ignore[func-returns-value]
    with staged(target) as scratch:
        _artefact(scratch, a="1", z="2")
    assert [name for name in order if name != MANIFEST] == ["a", "z"]
    assert order[-1] == MANIFEST
    assert (target / "a").read_bytes() == b"1"
    assert (target / "a").uri == bucket % "run/one/a"
    with (target / "z").open() as file:
        assert file.read() == b"2"
    assert target.name == "one"
    with pytest.raises(ValueError, match="is not local"):
        _ = target.local


def test_an_object_store_keeps_nothing_of_the_old_artefact(bucket: str) -> None:
    target = place(bucket % "run/two")
    with staged(target) as scratch:
        _artefact(scratch, old="1")
    with staged(target) as scratch:
        _artefact(scratch, new="2")
    assert not (target / "old").exists()
    assert (target / "new").read_bytes() == b"2"
    (target.fs).delete_file((target / MANIFEST).path)
    with pytest.raises(InputError, match="other things"):
        check_writable(target)


@pytest.mark.parametrize("where", ["local", "object store"])
@pytest.mark.parametrize(
    "more",
    [
        {MANIFEST: '{"name": "an extension", "manifest_version": 3}', "code.js": "1"},
        {MANIFEST: "no json"},
        {MANIFEST: "[]"},
        {"notes.txt": "mine"},
        {"own/other.txt": "mine"},
    ],
)
def test_only_what_is_ours_is_replaced(tmp_path: Path, bucket: str, where: str, more: dict[str, str]) -> None:
    out = tmp_path / "out"
    _artefact(out, old="1")
    for name, text in more.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    before = _tree(out)
    target = place(out)
    if where == "object store":
        target = place(bucket % tmp_path.name)
        for path in sorted(p for p in out.rglob("*") if p.is_file()):
            at = target / path.relative_to(out).as_posix()
            at.fs.create_dir(at.path.rpartition("/")[0], recursive=True)
            with at.fs.open_output_stream(at.path) as file:
                file.write(path.read_bytes())
    with pytest.raises(InputError, match="other things in it, such as"), staged(target) as scratch:
        _artefact(scratch, new="2")
    assert _tree(out) == before


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead, other = tmp_path / ".out.abcdefgh.partial", tmp_path / ".more.abcdefgh.partial"
    for folder in (dead, other):
        folder.mkdir()
        os.utime(folder, (0, 0))
    with staged(tmp_path / "out") as first:
        os.utime(first, (0, 0))
        with staged(tmp_path / "out") as second:
            assert not dead.exists()
            assert first.exists()
            assert other.exists()
            (second / MANIFEST).write_text(_manifest())
        (first / MANIFEST).write_text(_manifest())


def test_the_next_scratch_folder_sweeps_those_of_killed_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import sys, time
from recray.storage import scratch
with scratch() as folder:
    (folder / "large").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(600)
"""
    others = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        dead, alive = (Path(str(one.stdout and one.stdout.readline().decode().strip())) for one in others)
        others[0].kill()
        others[0].wait()
        for folder in (dead, alive):
            os.utime(folder, (0, 0))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with scratch() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([alive, mine])
            assert (alive / "large").exists()
    finally:
        for one in others:
            one.kill()
            one.communicate()
