from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray import manifest
from recray.errors import ArtefactError, InputError
from recray.manifest import Artefact, Manifest, lineage, open_artefact, open_parent, write_artefact
from recray.storage import MANIFEST


def _make(out: Path, kind: str = "dataset", text: str = "hello", **options: Any) -> Artefact:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text(text)
        (folder / "b.bin").write_bytes(bytes(range(256)))
        return {"counted": 2}

    return write_artefact(out, kind, fill, **options)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    made = _make(tmp_path / "a", recipe={"sizes": (1, 2)}, report={"nan": float("nan")})
    found = open_artefact(tmp_path / "a", "dataset")
    assert found.manifest == made.manifest
    assert found.manifest.recipe == {"sizes": [1, 2]}
    assert found.manifest.report == {"counted": 2, "nan": None}
    assert set(found.manifest.files) == {"deep/a.txt", "b.bin"}
    assert found.file("b.bin").read_bytes() == bytes(range(256))
    assert {"python", "torch", "ray"} <= set(found.manifest.versions)
    with pytest.raises(ArtefactError, match="has no file 'c'"):
        found.file("c")
    with found.local() as folder:
        assert folder == tmp_path / "a"


def test_the_hash_names_the_content_and_not_the_time(tmp_path: Path) -> None:
    first = _make(tmp_path / "a", report={"seconds": 1})
    assert _make(tmp_path / "b", report={"seconds": 2}).hash == first.hash
    assert _make(tmp_path / "c", text="other").hash != first.hash
    assert _make(tmp_path / "d", recipe={"x": 1}).hash != first.hash
    assert _make(tmp_path / "e", kind="bundle").hash != first.hash
    assert _make(tmp_path / "f", parents={"dataset": first}).hash != first.hash


@pytest.mark.parametrize("name", ["deep/a.txt", "b.bin", MANIFEST])
def test_a_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    _make(tmp_path / "a")
    path = tmp_path / "a" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=r"altered|cannot be used"):
        open_artefact(tmp_path / "a")
    if name != MANIFEST:
        open_artefact(tmp_path / "a", verify=False)


@settings(max_examples=200, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_manifest_goes_unseen(manifest_bytes: bytes, at: float, bit: int) -> None:
    data = bytearray(manifest_bytes)
    data[int(at * len(data))] ^= 1 << bit
    try:
        found = manifest._read(bytes(data))
    except (ValueError, TypeError, LookupError, AttributeError):
        return
    assert found == manifest._read(manifest_bytes)  # only whitespace changed


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["kind", "files", "parents", "format", "hash"]), inner), max_leaves=8,
))  # fmt: skip
def test_any_json_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        manifest._read(json.dumps(value).encode())


@pytest.fixture(scope="module")
def manifest_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("made") / "a"
    _make(folder)
    return (folder / MANIFEST).read_bytes()


def test_missing_and_wrong_artefacts(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"is not there. give the folder of a dataset"):
        open_artefact(tmp_path / "none", "dataset")
    with pytest.raises(ArtefactError, match=r"has no manifest.json"):
        open_artefact(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtefactError, match=r"has no manifest.json"):
        open_artefact(tmp_path / "file")
    _make(tmp_path / "a")
    with pytest.raises(ArtefactError, match="is a dataset, not a checkpoint or bundle"):
        open_artefact(tmp_path / "a", "checkpoint", "bundle")
    (tmp_path / "a" / "b.bin").unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        open_artefact(tmp_path / "a")


def _sealed(folder: Path, **changes: Any) -> None:
    """A manifest whose checksum is right but whose content is not ours."""
    raw = json.loads((folder / MANIFEST).read_text())
    made = manifest._sealed(dataclasses.replace(Manifest(**raw), **changes))
    (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(made)))


def test_a_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    for at, name in enumerate(("../b.bin", "/etc/hostname", "deep/../../x")):
        folder = tmp_path / str(at)
        _make(folder)
        _sealed(folder, files={name: {"bytes": 1, "sha256": ""}})
        with pytest.raises(ArtefactError, match="outside the folder"):
            open_artefact(folder)


def test_another_format_is_told(tmp_path: Path) -> None:
    _make(tmp_path / "a")
    _sealed(tmp_path / "a", format=99)
    with pytest.raises(ArtefactError, match="format 99, this version reads 1"):
        open_artefact(tmp_path / "a")


def test_nothing_is_left_when_filling_fails(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("1")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_artefact(tmp_path / "a", "dataset", fill)
    assert list(tmp_path.iterdir()) == []


def test_the_parent_is_found_and_its_hash_checked(tmp_path: Path) -> None:
    data = _make(tmp_path / "data")
    model = _make(tmp_path / "model", "checkpoint", parents={"dataset": data})
    assert open_parent(model, "dataset") == str(tmp_path / "data")
    assert open_parent(model, "dataset", "elsewhere") == "elsewhere"
    with pytest.raises(ArtefactError, match="names no ranker"):
        open_parent(model, "ranker")
    pack = _make(tmp_path / "pack", "bundle", parents={"ranker": model})
    assert open_parent(pack, "ranker") == str(tmp_path / "model")
    _make(tmp_path / "data", text="another")
    with pytest.raises(ArtefactError, match=r"is not the dataset that .*model was made from"):
        open_parent(model, "dataset")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(ArtefactError, match="is not there"):
        open_parent(model, "dataset")


def test_lineage_goes_up_as_far_as_it_is_true(tmp_path: Path) -> None:
    data = _make(tmp_path / "data")
    model = _make(tmp_path / "model", "checkpoint", parents={"dataset": data})
    pack = _make(tmp_path / "pack", "bundle", parents={"checkpoint": model})
    rows = lineage(pack)
    assert [(row["role"], row["kind"], row["found"]) for row in rows] == [
        ("checkpoint", "checkpoint", "as named"),
        ("dataset", "dataset", "as named"),
    ]
    _make(tmp_path / "model", "checkpoint", text="another")
    assert [row["found"] for row in lineage(pack)] == ["another"]
    shutil.rmtree(tmp_path / "model")
    assert [row["found"] for row in lineage(pack)] == ["missing"]


def test_a_signature_is_asked_for_where_a_key_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(manifest.KEY_ENV, raising=False)
    assert manifest.signing_key() is None
    bare = _make(tmp_path / "bare")
    monkeypatch.setenv(manifest.KEY_ENV, "0123456789abcdef")
    key = manifest.signing_key()
    assert key is not None
    with pytest.raises(ArtefactError, match="is not signed"):
        manifest.check_signature(bare, key)
    signed = _make(tmp_path / "signed")
    assert signed.hash == bare.hash, "a signature is no content"
    manifest.check_signature(open_artefact(tmp_path / "signed"), key)
    with pytest.raises(ArtefactError, match="another key"):
        manifest.check_signature(signed, b"another-key-of-16")
    other = _make(tmp_path / "other", text="altered")
    shutil.copy(tmp_path / "signed" / manifest.SIGNATURE, tmp_path / "other" / manifest.SIGNATURE)
    with pytest.raises(ArtefactError, match="altered"):
        manifest.check_signature(other, key)
    (tmp_path / "key").write_text("short\n")
    for call in (
        lambda: manifest.signing_key(str(tmp_path / "key")),
        lambda: manifest.signing_key("/nowhere"),
    ):
        with pytest.raises(InputError):
            call()
