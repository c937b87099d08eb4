"""BPR trained under attack beside the same trained plainly, on MovieLens-100K and -1M, leave-one-out.

An attack moves all vectors that are served by a share `epsilon` of their length, by fast gradient signs
(`recray.training.adversarial.attacked`); `ndcg_loss` is the share of NDCG@10 that is gone, on the test split.
The peer of a row is the plain model under the same attack; `gained` is their paired difference.

Chosen on the validation split; NDCG@10 clean and what is lost with epsilon .3 and .5, means of three seeds
(one on the larger set):

    100K  plain                  .0686   25 %   51 %
          adversarial .25        .0809   10 %   25 %
          adversarial .3         .0754    5 %   13 %
          with reg .03           .0770    8 %   25 %      the best of reg .01 (the recipe's) to .05
          and adversarial .1     .0775    5 %   12 %      .15: .0771, 4 %, 13 %; .2: .0757, 5 %, 6 %
          reg .02, adv. .2       .0803    6 %   12 %
    1M    plain                  .0429   31 %   63 %
          adversarial .1         .0426   16 %   38 %
          adversarial .3         .0382    6 %   11 %
          with reg .02           .0444   13 %   36 %
          and adversarial .05    .0434   15 %   31 %

So regularization alone does much of it, and the larger set is measured with both; with .1, too, which was
the first choice, before .05 was tried. Perturbations along the gradient, not its signs, defended against
themselves and hardly against signs; those of an absolute length shrank all vectors to nothing, and, begun
after 30 plain epochs, defended less. SASRec's loss is not halved: see LOG.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks._lines import mean_of
from benchmarks._sets import ml1m, ml100k, there
from benchmarks.rows import Row
from recray.data.dataset import Dataset
from recray.evaluation import Report, evaluate, model_top_k
from recray.models.base import Retriever
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training.adversarial import attacked
from recray.training.run import train

METRIC = "ndcg@10"
EPSILONS = (0.3, 0.5)


class Side(NamedTuple):
    """One way to train; the first of a set is the peer of the others."""

    name: str
    changes: tuple[str, ...] = ()


WORKS: dict[str, tuple[Callable[[Path], Dataset], int, tuple[Side, ...]]] = {  # ..., seeds, sides
    "ml100k": (
        ml100k,
        3,
        (
            Side("bpr plain"),
            Side("bpr with reg .03", ("options.reg=0.03",)),
            Side("bpr adversarial .25", ("options.adversarial=0.25",)),
            Side("bpr adversarial .3", ("options.adversarial=0.3",)),
            Side("bpr adversarial .2, reg .02", ("options.adversarial=0.2", "options.reg=0.02")),
        ),
    ),
    "ml1m": (
        ml1m,
        1,
        (
            Side("bpr plain"),
            Side("bpr with reg .02", ("options.reg=0.02",)),
            Side("bpr adversarial .05, reg .02", ("options.adversarial=0.05", "options.reg=0.02")),
            Side("bpr adversarial .1, reg .02", ("options.adversarial=0.1", "options.reg=0.02")),
        ),
    ),
}


def adversarial_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Clean and attacked NDCG@10 of each side; --quick takes one seed of the small set."""
    for work, (prepared, seeds, sides) in WORKS.items():
        if only not in work or not there(work) or (quick and work != "ml100k"):
            continue
        data, drawn = prepared(scratch / work), tuple(range(1 if quick else seeds))
        first: dict[float, Report] = {}
        for side in sides:
            each = [under_attack(data, (*side.changes, f"train.seed={seed}")) for seed in drawn]
            reports = {epsilon: mean_of([one[epsilon] for one in each]) for epsilon in each[0]}
            yield from side_rows(work, side, reports, first, drawn)
            first = first or reports


def under_attack(data: Dataset, changes: tuple[str, ...], split: str = "test") -> dict[float, Report]:
    """Epsilon -> what is measured of a model that is trained once; 0 is without an attack."""
    cases = data.cases(split)
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        model = load_model(train(data, recipe("bpr", changes), out=Path(scratch) / "checkpoint"))
    made = {}
    for epsilon in (0.0, *EPSILONS):
        asked = attacked(model, data, epsilon) if epsilon else model
        assert isinstance(asked, Retriever)
        made[epsilon] = evaluate(model_top_k(asked), cases, ks=(10,))
    return made


def side_rows(
    work: str,
    side: Side,
    reports: dict[float, Report],
    first: dict[float, Report],
    seeds: tuple[int, ...],
) -> Iterator[Row]:
    """One row an epsilon; the peer's loss stands in `given`."""
    for epsilon, report in reports.items():
        mean = report.interval(METRIC)
        given = {"users": len(report.user_rows), "set": list(side.changes), "epsilon": epsilon}
        if epsilon:
            given["ndcg_loss"] = lost(reports, epsilon)
            given |= {"peer_ndcg_loss": lost(first, epsilon)} if first else {}
        if first:
            gained = report.against(first[epsilon], METRIC)
            given["gained"] = [round(value, 5) for value in (gained.mean, gained.low, gained.high)]
        yield Row(
            name=side.name,
            work=work,
            metric=METRIC,
            value=mean.mean,
            unit="mean over users",
            peer="plain" if first else None,
            peer_value=first[epsilon].means[METRIC] if first else None,
            given=given,
            seeds=seeds,
            interval=(mean.low, mean.high),
        )


def lost(reports: dict[float, Report], epsilon: float) -> float:
    """The share of the clean value that is gone under the attack."""
    return round(1 - reports[epsilon].means[METRIC] / reports[0.0].means[METRIC], 4)
