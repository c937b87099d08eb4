"""DCN-V2 against the paper's equations: cross layers are polynomials, of full and of low rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue

torch.set_num_threads(1)

CATALOGUE = Catalogue(23, {"day": 4}, {"kind": 5}, 2)
SMALL: dict[str, Any] = {"dim": 8, "hidden": (12, 6), "max_len": 7}


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize(("rank", "norm"), [(0, "each"), (3, "each"), (3, "pair")])
def test_the_score_is_the_papers(structure: str, rank: int, norm: str) -> None:
    options = {**SMALL, "structure": structure, "rank": rank, "norm": norm, "crosses": 3}
    model = build_model("dcn", CATALOGUE, options).eval()
    net: Any = model.network
    candidates, context = np.array([[3, 9]]), {"day": np.int32([2])}
    scores = model.score(Histories.of([[1, 2]]), candidates, context)  # type: ignore[operator]
    with torch.no_grad():
        user, rest, _ = net.fields(*model.inputs(Histories.of([[1, 2]]), candidates, context))  # type: ignore[operator]
        for c in range(2):
            first = torch.cat([user[0].flatten(), rest[0, c].flatten()])
            x = first = first / first.square().mean().sqrt() if norm == "pair" else first
            for cross in net.crosses:
                if rank:
                    assert cross[0].weight.shape == (rank, len(x))
                    mapped = cross[1].weight @ (cross[0].weight @ x) + cross[1].bias
                else:
                    mapped = cross.weight @ x + cross.bias
                x = first * mapped + x
            deep = net.deep((first if structure == "parallel" else x)[None])[0]
            assert (deep >= 0).all()
            found = torch.cat([x, deep]) if structure == "parallel" else deep
            torch.testing.assert_close(net.out(found)[0], scores[0, c])


@pytest.mark.parametrize("changes", [{"crosses": -1}, {"rank": -1}, {"structure": "both"}], ids=str)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        build_model("dcn", CATALOGUE, {**SMALL, **changes})
