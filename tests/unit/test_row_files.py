"""Row ranges on disk: any ranges read what any others wrote, and nothing that was altered."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from recray.errors import ArtefactError
from recray.training import row_files
from recray.training.layout import Layout
from recray.training.row_files import (
    file_name,
    parts_of,
    read_rows,
    read_tensors,
    read_weights,
    write_model,
    write_rows,
)

FLOATS = (torch.float32, torch.bfloat16)
cuts = st.integers(1, 60).flatmap(
    lambda n: st.tuples(st.just(n), *[st.sets(st.integers(1, max(1, n - 1)), max_size=4)] * 2)
)


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """Chunks of a few rows, buckets of a few chunks: every seam is crossed. No waiting for disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "CHUNK", 48)
        patch.setattr(row_files, "BUCKET", 400)
        patch.setattr("os.fsync", lambda _: None)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # on tensors this small a second thread is only waited for
        yield
        torch.set_num_threads(threads)


def table(num_rows: int, dim: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """A table in position order with the slots of Adam, random bits that are numbers."""
    made = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(num_rows, dim, generator=made).to(dtype),
        "m": torch.randn(num_rows, dim, generator=made),
        "v": torch.rand(num_rows, generator=made),
        "steps": torch.randint(0, 99, (num_rows,), generator=made).float(),
    }


def ranges(num_rows: int, inner: set[int]) -> Sequence[tuple[int, int]]:
    """[0, num_rows) cut at `inner`."""
    return list(pairwise(sorted({0, num_rows, *(at for at in inner if at < num_rows)})))


def write(folder: Path, tensors: dict[str, Tensor], where: Sequence[tuple[int, int]]) -> dict[str, str]:
    """One file a range; gives name -> sha256."""
    return {
        file_name("item", a, b): write_rows(
            folder / file_name("item", a, b), {name: tensor[a:b] for name, tensor in tensors.items()}
        )
        for a, b in where
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, str], dict[str, Tensor]]:
    """Twelve rows in three files."""
    tensors = table(12, 3, torch.float32)
    return tmp_path, write(tmp_path, tensors, [(0, 5), (5, 6), (6, 12)]), tensors


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}": torch.arange(7).reshape(7, 1).expand(7, 3).to(dtype)  # not contiguous
        for dtype in row_files._DTYPES.values()
    }
    tensors |= {"turned": torch.arange(10.0).reshape(2, 5).T, "scalar": torch.tensor(3.5), "ü": torch.ones(1)}
    tensors |= {"none": torch.empty(0, 4), "flat": torch.empty(4, 0), "wide": torch.arange(100.0)[None]}
    path = tmp_path / "x.safetensors"
    digest = write_rows(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for found in (load_file(path), read_tensors(path, digest)):
        assert sorted(found) == sorted(tensors)
        for name, value in tensors.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert torch.equal(found[name], value)
    assert read_tensors(path, write_rows(path, {})) == load_file(path) == {}


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "x",
        {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(3), "c": torch.ones(3).double()},
    )
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    sizes = {"F64": 8, "F32": 4, "BF16": 2}
    assert length % 8 == 0
    for entry in json.loads(data[8 : 8 + length]).values():
        assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        write_rows(tmp_path / "x", {"a": torch.ones(2, dtype=torch.complex64)})


@settings(deadline=None, max_examples=40)
@given(cuts, st.integers(1, 20), st.sampled_from(FLOATS))
def test_any_ranges_read_what_any_others_wrote(
    cut: tuple[int, set[int], set[int]], dim: int, dtype: torch.dtype
) -> None:
    num_rows, before, after = cut
    tensors = table(num_rows, dim, dtype)
    with TemporaryDirectory() as folder:
        files = write(Path(folder), tensors, ranges(num_rows, before))
        for start, stop in ranges(num_rows, after):
            into = {name: torch.full_like(tensor[start:stop], -1) for name, tensor in tensors.items()}
            read_rows(Path(folder), files, "item", num_rows, start, stop, into)
            assert all(torch.equal(into[name], tensors[name][start:stop]) for name in tensors)


@settings(deadline=None, max_examples=40)
@given(cuts, st.integers(1, 20), st.sampled_from(FLOATS))
def test_a_model_has_its_tables_in_order_of_rows(
    cut: tuple[int, set[int], set[int]], dim: int, dtype: torch.dtype
) -> None:
    num_rows, before, _ = cut
    tensors, dense = table(num_rows, dim, dtype), {"scale": torch.randn(3, 5), "count": torch.tensor(7)}
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder, tensors, ranges(num_rows, before))
        twice = {n: read_weights(folder, files, "item", num_rows, dim) for n in ("tables.a.weight", "b")}
        write_model(folder / "model", dense, twice)
        found = {key: value.clone() for key, value in load_file(folder / "model").items()}
    by_row = tensors["weight"][Layout(num_rows).positions(torch.arange(num_rows))].float()
    want = {"tables.a.weight": by_row, "b": by_row, **dense}
    assert sorted(found) == sorted(want)
    assert all(torch.equal(found[key], value) for key, value in want.items())


def test_a_parameter_is_filled_in_place(saved: tuple[Path, dict[str, str], dict[str, Tensor]]) -> None:
    folder, files, tensors = saved
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    read_rows(folder, files, "item", 12, 3, 7, {"weight": weight})
    assert torch.equal(weight, tensors["weight"][3:7])
    read_rows(folder, files, "item", 12, 12, 12, {"weight": torch.zeros(0, 3)})


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_no_altered_byte_goes_unseen(data: st.DataObject) -> None:
    tensors = table(3, 2, torch.bfloat16)
    with TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder, tensors, [(0, 3)])
        path = folder / file_name("item", 0, 3)
        whole = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        else:
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        path.write_bytes(bytes(whole))
        with pytest.raises(ArtefactError):
            read_rows(folder, files, "item", 3, 0, 3, tensors)
        with pytest.raises(ArtefactError):
            read_tensors(path, files[path.name])


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{", "{}", '{"a": 3}', '{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"b": {"dtype": "U8", "shape": [], "data_offsets": [2, 3]}}',
        '{"a": {"dtype": "F32", "shape": [1000000000000000000000, 0], "data_offsets": [0, 0]}}',
        '{"a": {"dtype": "F32", "shape": [9000000000000], "data_offsets": [0, 36000000000000]}}',
        '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_tensors(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_what_is_missing_or_another_is_said(saved: tuple[Path, dict[str, str], dict[str, Tensor]]) -> None:
    folder, files, tensors = saved
    read_rows(folder, files, "item", 12, 0, 12, tensors)
    for into, words in [
        ({"weight": torch.zeros(12, 4)}, r"weight is torch.float32\[5, 3\], not torch.float32\[5, 4\]"),
        ({"weight": torch.zeros(12, 3).bfloat16()}, r"not torch.bfloat16\[5, 3\]"),
        ({"weight": torch.zeros(12, 3), "sum": torch.zeros(12)}, "has no sum"),
    ]:
        with pytest.raises(ArtefactError, match=words):
            read_rows(folder, files, "item", 12, 0, 12, into)
    (folder / file_name("item", 5, 6)).unlink()
    with pytest.raises(ArtefactError, match=r"item-5-6.*is missing"):
        read_rows(folder, files, "item", 12, 0, 12, tensors)
    first = {name: tensor[:5] for name, tensor in tensors.items()}
    read_rows(folder, files, "item", 12, 0, 5, first)  # what is not asked for is not read
    with pytest.raises(ValueError, match="other numbers of rows"):
        read_rows(folder, files, "item", 12, 0, 5, tensors)
    with pytest.raises(ValueError, match="positions 10 to 15 of 12"):
        read_rows(folder, files, "item", 12, 10, 15, first)


@pytest.mark.parametrize(
    ("held", "at"),
    [
        ([(0, 5), (6, 12)], 5), ([(0, 5), (4, 12)], 5), ([(0, 12), (0, 5), (5, 12)], 5), ([(5, 12)], 0),
        ([(0, 5)], 5), ([(0, 13)], 13), ([(0, 5), (5, 5), (5, 12)], 5), ([], 0),
    ],
)  # fmt: skip
def test_files_that_leave_a_gap_or_overlap_are_refused(held: list[tuple[int, int]], at: int) -> None:
    names = [file_name("item", a, b) for a, b in held] + [file_name("user", 5, 6), "dense.safetensors"]
    with pytest.raises(ArtefactError, match=f"'item' do not fit together at position {at} of 12"):
        parts_of(names, "item", 12)


def test_tables_whose_names_begin_alike_are_told_apart() -> None:
    names = [file_name("a", 0, 5), file_name("a-0", 0, 7), file_name("a.b", 0, 9)]
    assert [parts_of(names, name, n) for name, n in (("a", 5), ("a-0", 7), ("a.b", 9))] == [
        [(0, n, file)] for n, file in zip((5, 7, 9), names)
    ]


def test_memory_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 1 << 20)
    monkeypatch.setattr(row_files, "BUCKET", 4 << 20)
    rows = 400_000
    tensors = {"weight": torch.ones(rows, 64, dtype=torch.bfloat16), "sum": torch.ones(rows)}
    assert sum(tensor.nbytes for tensor in tensors.values()) > 50 << 20
    files: dict[str, str] = {}
    into = {name: torch.zeros_like(tensor).fill_(2) for name, tensor in tensors.items()}

    def put() -> None:
        files.update(write(tmp_path, tensors, [(0, rows)]))

    def get() -> None:
        read_rows(tmp_path, files, "item", rows, 0, rows, into)

    def assemble() -> None:
        weights = read_weights(tmp_path, files, "item", rows, 64)
        write_model(tmp_path / "model", {}, {"tables.item.weight": weights})

    rises = {work.__name__: rise(work) for work in (put, get, assemble)}
    assert max(rises.values()) < 20 << 20, rises
    assert torch.equal(into["weight"], tensors["weight"])


def rise(work: object) -> int:
    """By how many bytes a call raises this process's peak of resident memory over what it has before."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    before = peak()
    work()  # type: ignore[operator]
    return peak() - before


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
