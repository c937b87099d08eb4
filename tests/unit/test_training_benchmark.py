"""What the training benchmark counts and shares out, and the processes it talks to."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _sasrec as sasrec
from benchmarks import _tables as tables
from benchmarks._lookups import Lookups, Work
from benchmarks._process import PeerError, Worker
from recray.data.batches import sequence_batches
from recray.data.dataset import Dataset, open_dataset
from recray.data.prepare import prepare
from recray.evaluation import evaluate

SMALL = {"rows": 500, "dim": 4, "samples": 9, "per": 3, "batches": 2}


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Five users of 3 to 7 items."""
    lines = [f"{u} " + " ".join(str((u * i) % 11) for i in range(1, u + 3)) for u in range(1, 6)]
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    return open_dataset(prepare(tmp_path / "log.txt", out=tmp_path / "data"))


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_ranks_share_the_work_of_one(kind: str) -> None:
    (whole, grads) = (Work(**SMALL).ids(kind), Work(**SMALL).gradient())
    parts = [Work(rank=rank, ranks=2, **SMALL) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert torch.equal(batch, torch.cat([part.ids(kind)[number] for part in parts]))
        assert batch.min() >= 0
        assert batch.max() < 500
    assert torch.equal(grads, torch.cat([part.gradient() for part in parts]))


def test_zipf_has_popular_rows_and_scatters_them() -> None:
    work = Work(rows=1000, samples=2000, batches=1)
    counts = {kind: work.ids(kind)[0].flatten().bincount(minlength=1000) for kind in ("uniform", "zipf")}
    assert counts["zipf"].max() > 20 * counts["uniform"].max()
    popular = counts["zipf"].argsort(descending=True)[:20]
    assert 200 < popular.float().mean() < 800


def test_steps_walk_the_batches_in_a_circle() -> None:
    seen: list[int] = []
    work = Work(kinds=("uniform",), **SMALL)
    side = Lookups(work, lambda ids: int(ids[0, 0]), seen.append, lambda _: torch.ones(2, 3))
    seen.clear()
    side.at = 0
    assert side("uniform", steps=5)["seconds"] > 0
    firsts = [int(ids[0, 0]) for ids in work.ids("uniform")]
    assert seen == [firsts[0], firsts[1], firsts[0], firsts[1], firsts[0]]
    assert side("uniform", check=True) == {"sum": 6.0}


def _worker(code: str) -> Worker:
    return Worker([[sys.executable, "-c", f"from benchmarks._process import serve\n{code}"]])


def test_a_process_answers_and_what_it_prints_is_no_answer() -> None:
    code = "def start():\n  print('noise')\n  return {'is': 'warm'}, lambda n: {'twice': 2 * n}\nserve(start)"
    with _worker(code) as worker:
        assert worker.ready == {"is": "warm"}
        assert worker.ask(n=4) == [{"twice": 8}]


def test_a_process_that_dies_tells_why() -> None:
    with pytest.raises(PeerError, match="no such library"):
        assert _worker("raise SystemExit('no such library')").ready


def test_predictions_are_the_positions_of_an_epoch(data: Dataset) -> None:
    batches = sequence_batches(
        data.histories("train"), data.n_items, max_len=2, batch_size=2, epoch=1, seed=0
    )
    assert sasrec.predictions(data) == sum(batch.positions for batch in batches)


def test_a_peers_lists_are_measured_like_ours(data: Dataset, tmp_path: Path) -> None:
    sasrec.write_files(data, tmp_path)
    cases = data.cases("test")
    known = np.loadtxt(tmp_path / "known.tsv", dtype=int)
    for user, history in zip(cases.user_rows, [cases.histories[b] for b in range(len(cases))]):
        rows = known[known[:, 0] == user]
        assert rows[:, 1].tolist() == history.tolist()
        assert rows[:, 2].tolist() == list(range(len(history)))
    asked = [int(line) for line in (tmp_path / "asked.txt").read_text().split()]
    assert asked == cases.user_rows.tolist()
    lists = [f"{cases.targets[b][0]}" if b else "" for b in range(len(cases))]  # the first user gets none
    (tmp_path / "top").write_text("".join(f"{line}\n" for line in lists))
    report = evaluate(sasrec.listed(tmp_path / "top", cases), cases, ks=(10,), batch=2)
    assert report.means["ndcg@10"] == pytest.approx(1 - 1 / len(cases))


def test_two_ranks_are_compared_round_by_round() -> None:
    speeds = {"ours 1": [1.0, 2.0, 4.0], "ours 2": [2.0, 3.0, 4.0], "ours 2 bf16": [1.0, 2.0, 4.0]}
    speeds[tables.APART] = [2.0, 4.0, 8.0]
    f32, bf16 = tables.scaling(speeds, "zipf")
    assert (f32.ratio, f32.value, bf16.ratio) == (1.5, 3.0, 1.0)
    assert (f32.given["apart"], "missed_by" in f32.given, bf16.given["missed_by"]) == (2.0, False, 0.286)
