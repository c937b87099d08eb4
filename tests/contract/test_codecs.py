"""Every codec of CODECS keeps its word: the error it states, the bytes it claims, exact files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recray.compression.codec import CODECS, CodedTable, codec_named, encode_table
from recray.errors import ArtefactError, ConfigError, InputError

CASES = [
    *CODECS,
    "pq:width=5,bits=4",
    "low-rank:share=0.3,values=int4",
    "tiers:head=f16,head_share=0.3,middle=pq:width=3+bits=4,middle_share=0.4,tail=int4",
    "tiers:head_share=0,middle_share=1",
    "sparse:share=0.6",
]
codecs = pytest.mark.parametrize("name", CASES)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """Rows of very different magnitudes, some constant, some zero; also no rows at all."""
    n, dim = draw(st.integers(0, 12)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = draw(st.sampled_from([(0, 0), (-6, 3), (-30, 4), (2, 4)]))
    table = rng.standard_normal((n, dim)) * 10.0 ** rng.uniform(low, high, (n, 1))
    kind = rng.integers(0, 5, n)
    table[kind == 0] = 0.0
    table[kind == 1] = table[kind == 1, :1]
    return torch.from_numpy(table.astype(np.float32).clip(-6e4, 6e4))


@codecs
@settings(max_examples=60, deadline=None)
@given(table=tables())
def test_error_is_within_the_stated_bound(name: str, table: Tensor) -> None:
    made = encode_table(name, table)
    error = (made.dense().double() - table.double()).abs()
    assert made.dense().shape == table.shape
    assert bool((error <= codec_named(name).error_bound(table).double()).all())


@codecs
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 9), dim=st.integers(1, 70))
def test_bytes_are_as_claimed(name: str, n: int, dim: int) -> None:
    assert encode_table(name, torch.randn(n, dim)).nbytes == codec_named(name).bytes_of(n, dim)


@codecs
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (300, 64)])
def test_files_are_exact(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    made = encode_table(name, torch.randn(shape))
    made.save(tmp_path / "table.safetensors")
    back = CodedTable.load(tmp_path / "table.safetensors")
    assert (back.num_rows, back.dim, back.codec.text) == (*shape, codec_named(name).text)
    assert made.arrays.keys() == back.arrays.keys()
    assert all(torch.equal(made.arrays[a], back.arrays[a]) for a in made.arrays)
    assert torch.equal(made.dense(), back.dense())
    assert (tmp_path / "table.safetensors").stat().st_size < made.nbytes + 400 + 100 * len(made.arrays)


@codecs
def test_forward_reads_rows_of_any_shape_and_padding_as_zeros(name: str) -> None:
    made = encode_table(name, torch.randn(40, 37))
    rows = torch.tensor([[3, -1, 39], [0, 3, -1]])
    found = made(rows)
    assert found.shape == (2, 3, 37)
    assert torch.equal(found[rows >= 0], made.dense()[rows[rows >= 0]])
    assert not found[rows < 0].any()
    assert made(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 37)
    assert encode_table(name, torch.empty(0, 4))(torch.tensor([-1])).tolist() == [[0.0] * 4]


@codecs
def test_decoding_does_not_change_the_table(name: str) -> None:
    made = encode_table(name, torch.randn(9, 8))
    before = made.dense().clone()
    made(torch.tensor([-1, 2, -1]))
    made(torch.tensor([1, 2]))
    assert torch.equal(made.dense(), before)


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    table = torch.zeros(5, 4)
    table[3, 1] = bad
    with pytest.raises(InputError, match="row 3"):
        encode_table(name, table)


@pytest.mark.parametrize(("name", "value"), [("f16", 7e4), ("int8", 3e38), ("int4", 3e38), ("pq", 1e31)])
def test_what_is_too_large_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="too large"):
        encode_table(name, torch.full((2, 4), value))


@pytest.mark.parametrize("name", ["f32", "int8", "int4"])
def test_a_table_of_huge_values_of_both_signs_passes(name: str) -> None:
    table = torch.tensor([[9e37, -9e37], [1.0, 0.0]])
    error = (encode_table(name, table).dense() - table).abs()
    assert bool((error <= codec_named(name).error_bound(table)).all())


def test_smaller_codecs_are_smaller() -> None:
    sizes = [encode_table(name, torch.randn(64, 64)).nbytes for name in ("f32", "f16", "int8", "int4")]
    assert [round(sizes[0] / size, 1) for size in sizes] == [1.0, 2.0, 3.8, 7.1]


@codecs
def test_an_altered_shape_is_refused(name: str, tmp_path: Path) -> None:
    made = encode_table(name, torch.randn(6, 8))
    made.num_rows = 7
    made.save(tmp_path / "t")
    with pytest.raises(ArtefactError):
        CodedTable.load(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtefactError):
        CodedTable.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int9", "did you mean 'int8'"),
        ("int8:bits=3", "unknown setting 'int8.bits'"),
        ("pq:with=3", "did you mean 'width'"),
        ("pq:width=0", "at least 1"),
        ("pq:bits=5", "choose one of 4, 8"),
        ("low-rank:share=0", "above 0"),
        ("sparse:share=1.5", "up to 1"),
        ("pq:fit=-1", "0 or more"),
        ("low-rank:values=int9", "did you mean 'int8'"),
        ("tiers:head_share=0.9,middle_share=0.2", "at most 1 together"),
    ],
)
def test_an_unknown_codec_or_parameter_is_named(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        codec_named(name)


@codecs
def test_a_codec_is_read_as_it_is_written(name: str) -> None:
    text = codec_named(name).text
    assert codec_named(text).text == text
    assert codec_named(text).bytes_of(100, 16) == codec_named(name).bytes_of(100, 16)


@codecs
def test_scores_are_those_of_the_decoded_rows(name: str) -> None:
    made = encode_table(name, torch.randn(300, 24), torch.rand(300))
    queries = torch.randn(7, 24)
    torch.testing.assert_close(made.scores(queries), queries @ made.dense().T, rtol=1e-4, atol=1e-4)
    assert encode_table(name, torch.empty(0, 24)).scores(queries).shape == (7, 0)


@codecs
def test_encoding_twice_gives_the_same_arrays(name: str) -> None:
    table, weights = torch.randn(400, 16), torch.rand(400)
    one, two = (encode_table(name, table, weights).arrays for _ in range(2))
    assert all(torch.equal(one[a], two[a]) for a in one)
