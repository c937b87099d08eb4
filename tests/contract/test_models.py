"""Every model of MODELS keeps the promises of models/base.py, trained a little on a small log."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recray import config
from recray.data.sequences import PAD, Histories
from recray.errors import ArtefactError, ConfigError
from recray.manifest import write_artefact
from recray.models import MODELS, build_model, model_class
from recray.models.base import Catalogue, Model, Ranker, Retriever
from recray.models.embeddings import Table
from recray.models.saved import catalogue_of, catalogue_report, load_model, options_of, save_model
from recray.models.why import why, without_each
from recray.recipes import RECIPES, recipe
from tests.models_data import ring

torch.set_num_threads(1)

COLUMNS = ("day", "a.b c")
DATA = ring(40, columns=COLUMNS)
CATALOGUE = Catalogue(DATA.n_items, DATA.context_sizes)
ASKED = Histories.of([[1, 2, 3], [], [5] * 70, [PAD], [22, 0, PAD, 7], list(range(23)) * 4])
CANDIDATES = np.array([[0, 5, PAD, 22, 3]] * 6, dtype=np.int64)
CONTEXT = {"day": np.int32([0, 1, 2, 3, 4, 4]), "a.b c": np.int32([4, 3, 2, 1, 0, 0])}

every = pytest.mark.parametrize("name", MODELS)


def train(name: str, seed: int = 0) -> Model:
    model = build_model(name, CATALOGUE, {}, seed=seed)
    if not model.gradient:
        model.fit(DATA, seed=seed)
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for batch in model.train().batches(DATA, batch_size=32, epoch=1, seed=seed, rank=0, world=1):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    return model.eval()


trained = cache(train)


def scores(model: Model, some: Any = slice(None)) -> Tensor:
    """[B, N] of a retriever, [B, C] of a ranker."""
    if isinstance(model, Retriever):
        return model.score(ASKED.take(some))
    assert isinstance(model, Ranker)
    context = {column: rows[some] for column, rows in CONTEXT.items()}
    return model.score(ASKED.take(some), CANDIDATES[some], context)


@every
def test_the_same_seed_gives_the_same_model_and_another_another(name: str) -> None:
    torch.manual_seed(99)  # what happened before has no say
    again = train(name)
    assert torch.equal(scores(trained(name)), scores(again))
    if trained(name).gradient:
        assert not torch.equal(scores(trained(name)), scores(train(name, seed=1)))


@every
def test_training_changes_the_model_and_leaves_torchs_random_state(name: str) -> None:
    state = torch.get_rng_state()
    fresh = build_model(name, CATALOGUE, {})
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(scores(fresh.eval()), scores(trained(name)))


@every
def test_answers_are_finite_for_known_unknown_and_empty_histories(name: str) -> None:
    model = trained(name)
    found = scores(model)
    assert found.dtype == torch.float32
    if isinstance(model, Ranker):
        assert found.shape == CANDIDATES.shape
        assert torch.isneginf(found[:, 2]).all()
        found = found[:, [0, 1, 3, 4]]
    else:
        assert found.shape == (len(ASKED), CATALOGUE.n_items)
    assert torch.isfinite(found).all()


@every
def test_a_batch_of_one_is_a_batch_of_many(name: str) -> None:
    together = scores(trained(name))
    for b in range(len(ASKED)):
        torch.testing.assert_close(scores(trained(name), [b])[0], together[b], atol=1e-5, rtol=1e-5)


@every
def test_an_unknown_item_is_as_if_not_there(name: str) -> None:
    given, clean = Histories.of([[22, 0, PAD, 7], [PAD]]), Histories.of([[22, 0, 7], []])
    found = [
        model.score(h) if isinstance(model, Retriever) else model.score(h, CANDIDATES[:2])  # type: ignore
        for model in [trained(name)]
        for h in (given, clean)
    ]
    torch.testing.assert_close(*found)


@every
def test_no_users_is_no_error(name: str) -> None:
    assert len(scores(trained(name), [])) == 0


@every
def test_vectors_are_the_scores(name: str) -> None:
    model = trained(name)
    if isinstance(model, Ranker):
        assert model.network is not None
        outputs = model.network(*model.inputs(ASKED, np.maximum(CANDIDATES, 0), CONTEXT))
        torch.testing.assert_close(outputs[:, [0, 1, 3, 4]].detach(), scores(model)[:, [0, 1, 3, 4]])
        return
    assert isinstance(model, Retriever)
    if not model.has_vectors:
        with pytest.raises(NotImplementedError):
            model.encode(ASKED)
        return
    queries, items = model.encode(ASKED), model.item_vectors().detach()
    assert queries.shape[::2] == (len(ASKED), items.shape[1])
    torch.testing.assert_close(torch.einsum("bkd,nd->bkn", queries, items).amax(1), scores(model))


@every
def test_tables_hold_what_grows_with_the_catalogue(name: str) -> None:
    model, larger = trained(name), build_model(name, Catalogue(50, CATALOGUE.context), {})
    assert all(isinstance(table, Table) for table in model.tables.values())
    for key, tensor in larger.state_dict().items():
        if key.startswith("network."):
            assert tensor.shape == model.state_dict()[key].shape


def score_of(model: Model, asked: Histories, row: int) -> list[float]:
    """The item's score for each history."""
    if isinstance(model, Ranker):
        return model.score(asked, np.full((len(asked), 1), row))[:, 0].tolist()
    assert isinstance(model, Retriever)
    return model.score(asked)[:, row].tolist()


@every
def test_it_says_why(name: str) -> None:
    model = trained(name)
    for asked in (ASKED.take([0]), ASKED.take([4]), ASKED.take([1])):
        told = why(model, asked, 7)  # type: ignore[arg-type]
        (score,) = score_of(model, asked, 7)
        assert told.score == pytest.approx(score, abs=1e-5)
        assert np.isfinite(told.weights).all()
        if told.additive:
            assert told.base + told.weights.sum() == pytest.approx(score, abs=1e-5)
        if told.kind == "history":
            assert set(told.rows) <= set(asked.items[asked.items >= 0])


@every
def test_without_its_first_reason_a_score_falls_more_than_without_another(name: str) -> None:
    model, draw, better, asked = trained(name), np.random.default_rng(0), 0, 0
    for u in range(DATA.n_users):
        history, row = DATA.histories().take([u]).last(6), int(draw.integers(DATA.n_items))
        told = why(model, history, row)  # type: ignore[arg-type]
        if told.kind != "history" or len(np.unique(told.weights.round(6))) < 3:
            continue  # nothing to choose between
        others = told.rows[[0, draw.integers(1, len(told.rows))]]
        first, other = score_of(model, without_each(history, others), row)
        asked += 1
        better += first <= other
    assert better >= 0.7 * asked


@every
def test_saving_and_loading_changes_nothing(name: str, tmp_path: Path) -> None:
    made = write(trained(name), tmp_path / "checkpoint")
    back = load_model(made)
    assert not back.training
    assert catalogue_of(made) == CATALOGUE
    assert torch.equal(scores(back), scores(trained(name)))


@every
def test_the_state_is_everything(name: str) -> None:
    other = build_model(name, CATALOGUE, {}, seed=7).eval()
    other.load_state_dict(trained(name).state_dict())
    assert torch.equal(scores(other), scores(trained(name)))
    learned = {id(t) for t in (*other.parameters(), *other.buffers())}
    loose = [
        key
        for module in other.modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and id(value) not in learned
    ]
    assert not loose


@every
def test_a_state_of_another_shape_or_name_is_refused(name: str, tmp_path: Path) -> None:
    trained_for_more = build_model(name, Catalogue(50, CATALOGUE.context), {})
    with pytest.raises(ArtefactError, match="not torch"):
        load_model(write(trained_for_more, tmp_path / "larger", catalogue=CATALOGUE))
    extra = train(name)
    extra.register_buffer("stray", torch.zeros(1))
    with pytest.raises(ArtefactError, match="stray"):
        load_model(write(extra, tmp_path / "extra"))


@every
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lerning_rate"):
        build_model(name, CATALOGUE, {"lerning_rate": 1})


@every
def test_there_is_a_recipe_for_it(name: str) -> None:
    made = [recipe(r) for r in RECIPES if recipe(r).model == name]
    assert made
    for one in made:
        config.build(model_class(one.model).Config, one.options)


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="sasrec"):
        build_model("sasrek", CATALOGUE, {})


@pytest.mark.parametrize(
    ("recipe_of", "report", "said"),
    [
        ({"model": "popularity", "options": {}}, {}, "catalogue"),
        ({"options": {}}, None, "names no model"),
        ({"model": "popularity", "options": {"colour": 1}}, None, "colour"),
        ({"model": "nothing"}, None, "nothing"),
    ],
)
def test_a_manifest_that_does_not_fit_is_told(
    recipe_of: dict[str, Any], report: dict[str, Any] | None, said: str, tmp_path: Path
) -> None:
    known = {"catalogue": {"n_items": 23, "context": {}}} if report is None else report
    made = write_artefact(
        tmp_path / "odd",
        "checkpoint",
        lambda folder: save_model(folder, trained("popularity")),
        recipe=recipe_of,
        report=known,
    )
    with pytest.raises(ArtefactError, match=said):
        load_model(made)


def write(model: Model, where: Path, catalogue: Catalogue | None = None) -> Any:
    about = catalogue or model.catalogue
    return write_artefact(
        where,
        "checkpoint",
        lambda folder: save_model(folder, model),
        recipe={"model": model.name, "options": options_of(model)},
        report={"catalogue": catalogue_report(about)},
    )
