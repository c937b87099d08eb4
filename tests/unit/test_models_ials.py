"""iALS against its objective: exact rows, a falling loss, folding in equals training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_data import SmallData, ring
from scipy import sparse

from recray.compression.codec import encode_table
from recray.data.sequences import Histories
from recray.models import build_model, ials
from recray.models.base import Catalogue
from recray.models.embeddings import replace_tables

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
    found = ials.solve(pairs.indptr, pairs.indices, pairs.data, gram, ridge, vectors)
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
    for rows, at, mask in ials.groups(indptr, 64):
        assert (mask.sum(1) == counts[rows]).all()
        assert (at[mask] < indptr[-1]).all()
        assert at.shape[1] < 64 or counts[rows].min() >= 64  # one kind of system each
        seen += rows.tolist()
    assert sorted(seen) == np.flatnonzero(counts).tolist()


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


def test_more_sweeps_never_raise_the_objective() -> None:
    data = ring()
    values = []
    for sweeps in (1, 2, 4, 8):
        model = build_model("ials", Catalogue(23, {}), {"dim": 6, "sweeps": sweeps, "reg": 0.05})
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
