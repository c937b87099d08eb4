"""AUC and log loss against their definitions, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from recray.metrics.binary import auc, logloss, losses

EXAMPLES = st.lists(
    st.tuples(st.booleans(), st.sampled_from([-3.0, -0.5, 0.0, 0.25, 2.0])), min_size=2, max_size=30
)


@given(EXAMPLES)
def test_auc_is_the_share_of_pairs_in_order(examples: list[tuple[bool, float]]) -> None:
    labels, logits = (list(x) for x in zip(*examples))
    assume(len(set(labels)) == 2)
    above = [
        1.0 if a > b else 0.5 if a == b else 0.0 for y, a in examples for z, b in examples if y and not z
    ]
    assert auc(labels, logits) == pytest.approx(sum(above) / len(above))
    assert auc(labels, [-x for x in logits]) == pytest.approx(1 - auc(labels, logits))


@given(EXAMPLES)
def test_logloss_is_the_mean_of_minus_log_likelihoods(examples: list[tuple[bool, float]]) -> None:
    labels, logits = (list(x) for x in zip(*examples))
    one_by_one = [-math.log(1 / (1 + math.exp(-x if y else x))) for y, x in examples]
    np.testing.assert_allclose(losses(labels, logits), one_by_one)
    assert logloss(labels, logits) == pytest.approx(np.mean(one_by_one))


def test_extreme_logits_stay_finite() -> None:
    assert losses([True, False, True], [-800.0, 800.0, 800.0]).tolist() == [800.0, 800.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "logits"), [([True, True], [0.0, 1.0]), ([True, False], [0.0, float("nan")]), ([True], [0, 1])]
)
def test_what_has_no_auc_is_refused(labels: list[bool], logits: list[float]) -> None:
    with pytest.raises(ValueError):
        auc(labels, logits)
