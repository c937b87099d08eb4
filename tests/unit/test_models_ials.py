"""iALS against its objective: exact rows, descent to them, a falling loss, folding in."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from recray.compression.codec import encode_table
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model, ials, ials_descent, ials_solve
from recray.models.base import Catalogue
from recray.models.embeddings import replace_tables
from recray.models.ranks import Alone
from tests.models_data import SmallData, ring

torch.set_num_threads(1)


@pytest.mark.parametrize("dim", [3, 8, 40])  # fewer and more dimensions than items a row
def test_rows_solve_their_normal_equations(dim: int) -> None:
    rng = np.random.default_rng(0)
    pairs = sparse.random(50, 30, density=0.4, format="csr", random_state=1, dtype=np.float32)
    pairs.data = rng.uniform(0.5, 3, pairs.nnz).astype(np.float32)
    pairs = sparse.vstack([pairs, sparse.csr_matrix((1, 30), dtype=np.float32)], format="csr")
    vectors, other = (torch.from_numpy(rng.standard_normal((30, dim))).float() for _ in range(2))
    gram = 0.3 * other.T @ other
    ridge = torch.from_numpy(rng.uniform(0.5, 2, 51)).float()
    found = ials_solve.solve(pairs.indptr, pairs.indices, pairs.data, gram, ridge, vectors)
    for u in range(51):
        x = vectors[pairs.indices[pairs.indptr[u] : pairs.indptr[u + 1]]].double()
        c = torch.from_numpy(pairs.data[pairs.indptr[u] : pairs.indptr[u + 1]]).double()
        system = (x.T * c) @ x + gram.double() + ridge[u].double() * torch.eye(dim, dtype=torch.float64)
        want = torch.linalg.solve(system, x.T @ c).float()
        torch.testing.assert_close(found[u], want, rtol=2e-4, atol=2e-5)
    assert not found[50].any()


def test_groups_cover_every_row_that_has_items_once() -> None:
    counts = np.random.default_rng(0).integers(0, 200, 500)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    seen = []
    for rows, at, mask in ials_solve.groups(indptr, 64):
        assert (mask.sum(1) == counts[rows]).all()
        assert (at[mask] < indptr[-1]).all()
        assert at.shape[1] < 64 or counts[rows].min() >= 64  # one kind of system each
        seen += rows.tolist()
    assert sorted(seen) == np.flatnonzero(counts).tolist()


def one_side(
    dim: int, *, reg: float, weights: str
) -> tuple[ials_descent.Side, ials_descent.Fixed, torch.Tensor]:
    """60 rows of 40 vectors, some empty, the other side to solve them against, and what solves them."""
    rng = np.random.default_rng(2)
    pairs = sparse.random(60, 40, density=0.2, format="csr", random_state=3, dtype=np.float32)
    pairs.data[:] = 1 if weights == "unit" else rng.pareto(1.0, pairs.nnz) + 0.1
    pairs = sparse.vstack([pairs, sparse.csr_matrix((2, 40), dtype=np.float32)], format="csr")
    vectors = torch.from_numpy(rng.standard_normal((40, dim)) * rng.uniform(0.1, 1, dim)).float()
    other = ials_descent.Side(
        pairs.T.tocsr(), np.ones(40), 1.0, vectors, Alone()
    ).fixed()  # E needs what each vector is held by
    ridge = reg * (np.diff(pairs.indptr) + 0.3 * 40)
    start = torch.from_numpy(rng.standard_normal((62, dim))).float()
    side = ials_descent.Side(pairs, ridge, reg * 0.3 * 40, start, Alone())
    gram = 0.3 * vectors.T @ vectors
    arrays = pairs.indptr, pairs.indices, pairs.data
    want = ials_solve.solve(*arrays, gram, torch.from_numpy(ridge).float(), vectors)
    return side, other, want


@pytest.mark.parametrize("weights", ["unit", "heavy"])
@pytest.mark.parametrize("dim", [5, 48])
def test_descent_ends_at_the_exact_rows(dim: int, weights: str) -> None:
    side, other, want = one_side(dim, reg=0.1, weights=weights)
    for _ in range(10):
        side.descend(other, 0.3, 8)
    torch.testing.assert_close(side.vectors, want, rtol=1e-4, atol=1e-4)
    assert not side.vectors[60:].any()  # rows without any


def test_a_step_leaves_little_of_the_error() -> None:
    errors = []
    for steps in (1, 2, 3):
        side, other, want = one_side(8, reg=0.02, weights="unit")
        before = (side.vectors - want)[:60].norm()
        side.descend(other, 0.3, steps)
        errors.append(float((side.vectors - want).norm() / before))
    assert errors[0] < 0.4  # without preconditioner .60, .38, .24
    assert errors[1] < 0.1
    assert errors[2] < 0.03


def test_without_ridge_or_unobserved_pairs_nothing_breaks() -> None:
    data = ring()
    none = {"reg": 0.0, "unobserved": 0.0, "dim": 4}
    wide = {"reg": 0.0, "dim": 40}
    for options in (
        {"unobserved": 0.0},
        {"nu": 0.0},
        {"nu": 0.5},
        {"reg": 0.0, "dim": 4},
        {"dim": 40},
        none,
        wide,
    ):
        model = build_model("ials", Catalogue(23, {}), {"dim": 6, "sweeps": 20, **options})
        model.fit(data)
        assert model.item_vectors().isfinite().all(), options
        assert model.score(data.train).isfinite().all(), options
    with pytest.raises(ConfigError, match="steps"):
        build_model("ials", Catalogue(23, {}), {"steps": 0})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reg", -1.0),
        ("reg", float("nan")),
        ("std", -1.0),
        ("unobserved", -1.0),
        ("nu", -0.5),
        ("nu", 400.0),
        ("nu", float("nan")),
    ],
)
def test_weights_that_have_no_minimum_are_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"options.*\b{option}\b"):
        build_model("ials", Catalogue(23, {}), {option: value})


@settings(max_examples=20)
@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 64))
def test_parts_are_all_rows_in_order_and_bounded(counts: list[int], dim: int) -> None:
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
    with mock.patch.object(ials_descent, "_FLOATS", 1000):
        found = list(ials_descent.parts(indptr, dim))
    assert [row for part in found for row in range(len(counts))[part]] == list(range(len(counts)))
    for part in found:
        floats = dim * (indptr[part.stop] - indptr[part.start] + 6 * (part.stop - part.start))
        assert floats <= 1000 or part.stop - part.start == 1


def objective(model: ials.IALS, data: SmallData) -> float:
    """Equations 2-6 of the paper at the model's items and the users folded in."""
    c = model.config
    users = model.encode(data.train).squeeze(1).double()
    items = model.item_vectors().detach().double()
    seen = torch.from_numpy((data.train.to_csr(data.n_items).toarray() > 0).astype(float))
    scores = users @ items.T
    ridge_u = (seen.sum(1) + c.unobserved * data.n_items) ** c.nu
    ridge_i = (seen.sum(0) + c.unobserved * data.n_users) ** c.nu
    loss = (seen * (scores - 1) ** 2).sum() + c.unobserved * (scores**2).sum()
    loss += c.reg * ((ridge_u * (users**2).sum(1)).sum() + (ridge_i * (items**2).sum(1)).sum())
    return float(loss)


@pytest.mark.parametrize("steps", [1, 2])
def test_more_sweeps_never_raise_the_objective(steps: int) -> None:
    data = ring()
    values = []
    for sweeps in (1, 2, 4, 8):
        options = {"dim": 6, "sweeps": sweeps, "steps": steps, "reg": 0.05}
        model = build_model("ials", Catalogue(23, {}), options)
        model.fit(data)
        values.append(objective(model, data))  # type: ignore[arg-type]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] * 0.999


def test_a_repeated_or_unknown_item_changes_nothing_and_weights_count_when_asked() -> None:
    data = ring()
    model = build_model("ials", Catalogue(23, {}), {"dim": 6})
    model.fit(data)
    once = model.encode(Histories.of([[1, 5]]))
    torch.testing.assert_close(once, model.encode(Histories.of([[5, -1, 1, 1, 5]])))
    strong = Histories(np.int32([1, 5]), np.int64([0, 2]), np.float32([9, 1]))
    torch.testing.assert_close(once, model.encode(strong))
    heard = build_model("ials", Catalogue(23, {}), {"dim": 6, "weighted": True})
    heard.load_state_dict(model.state_dict())
    torch.testing.assert_close(once, heard.encode(Histories.of([[1, 5]])))
    assert heard.score(strong)[0, 1] > model.score(strong)[0, 1]


def test_folding_in_reads_items_through_the_table() -> None:
    data = ring()
    model = build_model("ials", Catalogue(23, {}), {"dim": 6})
    model.fit(data)
    plain = model.encode(data.train)
    replace_tables(model, {"item": encode_table("int8", model.item_vectors().detach())})
    coded = model.encode(data.train)
    assert not torch.equal(plain, coded)
    torch.testing.assert_close(plain, coded, atol=0.02, rtol=0.05)


def test_threads_change_nothing() -> None:
    data = ring(200)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = build_model("ials", Catalogue(23, {}), {"dim": 6})
            model.fit(data)
            found.append(model.encode(data.train))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(*found)
