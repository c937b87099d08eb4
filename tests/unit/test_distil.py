"""A student's loss is what the formulas say, and a student that is taught ends nearer its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recray.compression.distil import Lesson, Taught, check, teach
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.manifest import Artefact
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training import beginning
from recray.training.run import train
from tests.models_data import fitted, ring, ring_dataset

torch.set_num_threads(1)

N, K = 23, 6
DATA = ring(120)
TEACHER: dict[str, Any] = {"dim": 16, "blocks": 1, "max_len": 30, "dropout": 0.0}
STUDENT: dict[str, Any] = {"dim": 8, "blocks": 1, "max_len": 30, "dropout": 0.0}


def model_of(options: dict[str, Any], seed: int = 0) -> Any:
    return build_model("sasrec", Catalogue(N, {}), options, seed=seed)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return fitted(model_of(TEACHER), DATA, 12)


@pytest.fixture(scope="module")
def taught(teacher: Any, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("answers")
    teach(teacher, DATA, folder, top=K, temperature=2.0)
    return Taught.load(folder)


def test_answers_are_the_teachers_best_before_each_interaction(teacher: Any, taught: Taught) -> None:
    log = DATA.train
    for u in range(len(log)):
        first, last = log.offsets[u], log.offsets[u + 1] - 1
        if last > first:
            assert (taught.items[first] == -1).all(), "nothing comes before the first"
            assert (taught.items[first + 1 : last + 1] >= 0).all()
            # places are counted from the newest of a window, so the last is what is asked when it serves
            found = teacher.score(Histories.of([log.items[first:last].tolist()]))[0]
            best = found.topk(K).values
            np.testing.assert_allclose(taught.scores[last], best, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(taught.log_z[last], (found / 2.0).logsumexp(0), rtol=1e-3)
            np.testing.assert_allclose(found[taught.items[last].tolist()], best, rtol=1e-3, atol=1e-3)


def batch_of(model: Any) -> Any:
    return next(iter(model.batches(DATA, batch_size=8, epoch=0, seed=0, rank=0, world=1)))


def pieces(model: Any, batch: Any) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(the student's scores of all items at real positions, their places, their targets)."""
    real = batch.targets >= 0
    with torch.no_grad():
        states = model.states(batch)
        return states @ model.tables["item"].weight.T, batch.at[real], torch.from_numpy(batch.targets[real])


def test_soft_targets_of_a_full_softmax(taught: Taught) -> None:
    model = model_of(STUDENT).eval()
    model.lesson = Lesson(taught, "scores", weight=0.3, temperature=2.0)
    batch = batch_of(model)
    scores, at, targets = pieces(model, batch)
    wanted = torch.zeros_like(scores)
    soft = torch.from_numpy(np.exp(taught.scores[at] / 2.0 - taught.log_z[at][:, None]))
    assert (soft.sum(1) < 1).all()
    wanted.scatter_(1, torch.from_numpy(taught.items[at]).long(), 0.3 * soft)
    wanted.scatter_add_(1, targets[:, None], 1 - 0.3 * soft.sum(1, keepdim=True))
    torch.testing.assert_close(wanted.sum(1), torch.ones(len(at)))
    naive = -(wanted * scores.log_softmax(1)).sum() / batch.positions
    torch.testing.assert_close(model.loss(batch).detach(), naive, rtol=1e-4, atol=1e-4)


def test_soft_targets_beside_sampled_negatives(taught: Taught) -> None:
    model = model_of({**STUDENT, "loss": "sampled", "negatives": 40, "sampling": "uniform"}).eval()
    batch = batch_of(model)
    plain = float(model.loss(batch).detach()) * batch.positions
    model.lesson = Lesson(taught, "scores", weight=0.25, temperature=2.0)
    scores, at, _ = pieces(model, batch)
    chances = torch.from_numpy(np.exp(taught.scores[at] / 2.0 - taught.log_z[at][:, None]))
    summed = (1 - 0.25 * float(chances.sum(1).mean())) * plain
    for p, place in enumerate(at):
        listed = taught.items[place].tolist()
        logits = [scores[p, i] for i in listed]
        pairs = zip(batch.negatives.tolist(), batch.log_q.tolist())
        logits += [scores[p, j] - q for j, q in pairs if j not in listed]
        log_z = torch.stack(logits).logsumexp(0)
        summed += 0.25 * float((chances[p] * (log_z - scores[p, listed])).sum())
    assert float(model.loss(batch).detach()) == pytest.approx(summed / batch.positions, rel=1e-4)


def test_the_likelihood_of_the_teachers_order(taught: Taught) -> None:
    model = model_of(STUDENT).eval()
    batch = batch_of(model)
    plain = float(model.loss(batch).detach()) * batch.positions
    model.lesson = Lesson(taught, "list", weight=0.5)
    scores, at, _ = pieces(model, batch)
    summed = 0.5 * plain
    for p, place in enumerate(at):
        s = scores[p, taught.items[place].tolist()]
        summed += 0.5 * float(torch.stack([s[k:].logsumexp(0) - s[k] for k in range(K)]).mean())
    assert float(model.loss(batch).detach()) == pytest.approx(summed / batch.positions, rel=1e-4)


def test_states_are_compared_along_the_teachers_principal_axes(taught: Taught) -> None:
    lesson = Lesson(taught, "states", weight=1.0)
    at = np.flatnonzero(taught.items[:, 0] >= 0)[:7]
    theirs = torch.from_numpy(taught.states[at].astype(np.float32) @ np.array(taught.axes))
    nothing = torch.zeros(())
    none = torch.empty(7, 0)
    assert float(lesson.loss(nothing, at, 3 * theirs[:, :8], none, None)) == pytest.approx(0, abs=1e-4)
    assert float(lesson.loss(nothing, at, -theirs[:, :8], none, None)) == pytest.approx(14, abs=1e-3)
    wide = torch.cat([theirs, torch.zeros(7, 4)], 1)  # a student wider than its teacher
    assert float(lesson.loss(nothing, at, wide, none, None)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("how", ["scores", "list", "states"])
@pytest.mark.parametrize("loss", ["softmax", "sampled"])
def test_every_lesson_has_a_gradient_and_asks_for_what_it_looked_up(
    how: Any, loss: str, taught: Taught
) -> None:
    model = model_of({**STUDENT, "loss": loss, "negatives": 16})
    model.lesson = Lesson(taught, how, weight=0.5)
    batch = batch_of(model)
    asked: list[torch.Tensor] = []
    read = model.tables["item"].forward
    model.tables["item"].forward = lambda rows: asked.append(rows) or read(rows)
    told = model.lookups(batch)["item"]
    value = model.loss(batch)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    listed = [rows for rows in told if rows.ndim == 2 and rows.shape[1] in (0, K + 1)]
    assert any(torch.equal(rows, each) for rows in listed for each in asked if rows.shape == each.shape)


def test_a_taught_student_ends_nearer_its_teacher(teacher: Any, tmp_path: Path) -> None:
    little = ring(12, seed=9)  # the teacher has seen ten times as much
    teach(teacher, little, tmp_path, top=K)
    asked = Histories.of([[(s + i) % N for i in range(6)] for s in range(N)])
    wanted = teacher.score(asked).softmax(1)

    def away(lesson: Any) -> float:
        student = model_of(STUDENT, seed=5)
        student.lesson = lesson
        found = fitted(student, little, 40).score(asked).log_softmax(1)
        return float((wanted * (wanted.log() - found)).sum(1).mean())  # KL divergence

    assert away(Lesson(Taught.load(tmp_path), "scores", weight=0.9)) < 0.85 * away(None)


def test_a_model_of_several_queries_or_towers_is_refused() -> None:
    for name in ("mind", "two-tower", "popularity", "neumf"):
        with pytest.raises(ConfigError, match="cannot be a teacher"):
            check(build_model(name, Catalogue(N, {}), {}), "teacher")


WORDS = ["train.threads=1", "train.batch_size=32", "train.epochs=1", "options.heads=2", "options.max_len=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ring_dataset(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def large(data: Dataset) -> Artefact:
    words = [*WORDS, "options.dim=16", "options.blocks=2", "train.epochs=3"]
    return train(data, recipe("sasrec", words), out=data.artefact.place.local.parent / "large")


def test_a_student_is_pruned_from_its_teacher_and_taught(
    data: Dataset, large: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = large.place.uri
    words = [*WORDS, "options.dim=16", "options.blocks=1", "options.ffn_width=8"]
    asked = recipe("sasrec", [*words, f"train.start={uri}", f"train.teacher={uri}", "train.teach_top=5"])
    made = train(data, asked, out=tmp_path / "small")
    assert {role: made.manifest.parents[role]["hash"] for role in ("start", "teacher")} == {
        "start": large.hash,
        "teacher": large.hash,
    }
    assert load_model(made).config.ffn_width == 8  # type: ignore[attr-defined]
    folder = beginning.answers(large, data, 5)
    assert folder.is_relative_to(tmp_path / "cache")
    assert Taught.load(folder).items.shape == (len(data.histories("train").items), 5)
    monkeypatch.setattr(beginning.distil, "teach", lambda *a, **b: pytest.fail("was worked out already"))
    assert beginning.answers(large, data, 5) == folder


def test_a_model_of_the_same_shape_goes_on_from_the_weights(data: Dataset, large: Artefact) -> None:
    words = [*WORDS, "options.dim=16", "options.blocks=2", f"train.start={large.place.uri}"]
    begun, before = beginning.begun(recipe("sasrec", words), data), load_model(large)
    assert all(torch.equal(v, before.state_dict()[k]) for k, v in begun.state_dict().items())
    assert begun.lesson is None


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("gru4rec", ["options.dim=16"], "is a sasrec"),
        ("sasrec", ["options.dim=16", "options.blocks=3"], "blocks is 3"),
        ("sasrec", ["options.dim=16", "options.blocks=2", "options.max_len=9"], "cannot be made"),
        ("ease", [], "closed form"),
    ],
)
def test_a_start_that_does_not_fit_is_told(
    name: str, words: list[str], said: str, data: Dataset, large: Artefact
) -> None:
    usual = WORDS if name == "sasrec" else []
    with pytest.raises(ConfigError, match=said):
        beginning.begun(recipe(name, [*usual, *words, f"train.start={large.place.uri}"]), data)


def test_a_teacher_of_another_dataset_is_refused(data: Dataset, large: Artefact, tmp_path: Path) -> None:
    rows = [f"u{u},i{(u + t) % 20},{t}" for u in range(30) for t in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time", *rows]))
    other = prepare([str(tmp_path / "log.csv")], out=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="another dataset"):
        beginning.begun(recipe("sasrec", [f"train.teacher={large.place.uri}"]), other)
