"""The loop in one process: it learns, stops, resumes as if never interrupted, and refuses what is broken."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from recray.errors import ArtefactError, ConfigError, InputError
from recray.recipes import Train
from recray.training.checkpoint import EpochReport, Saved, State, best_state, last_state, open_state
from recray.training.loop import TrainingError, epoch_words, fit, pick_device
from recray.training.tables import gathered
from tests.unit.training_fakes import FakeData, Tiny

TRAIN = Train(epochs=6, batch_size=16, lr=0.02, warmup_steps=4, patience=0, device="cpu", threads=1)


def new() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def run(
    train: Train, folder: Path | None = None, resume: Path | None = None, model: Tiny | None = None
) -> Any:
    model = model or new()
    reports: list[EpochReport] = []

    def keep(report: EpochReport | None, state: State) -> None:
        if report is not None:
            reports.append(report)
        if folder:
            folder.mkdir(exist_ok=True)
            state.save(folder)

    result = fit(model, FakeData(), train, report=keep, resume=resume)  # type: ignore[arg-type]
    return model, reports, result


def kept(folder: Path) -> Saved:
    found = last_state(folder)
    assert found
    return open_state(found)


def weights(model: Tiny) -> dict[str, torch.Tensor]:
    """Everything learned, the tables whole."""
    with gathered(model):
        return {name: value.clone() for name, value in model.state_dict().items()}


def test_loss_falls_and_the_metric_rises() -> None:
    model, reports, result = run(replace(TRAIN, epochs=25))
    assert reports[-1].loss < 0.6 * reports[0].loss
    assert result.position.best_value > 0.3
    assert not model.training


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_reports, _ = run(TRAIN)
    run(replace(TRAIN, epochs=3), tmp_path / "state")
    resumed, reports, result = run(TRAIN, resume=last_state(tmp_path / "state"))
    assert [r.epoch for r in reports] == [4, 5, 6]
    assert [r.loss for r in reports] == [r.loss for r in whole_reports[3:]]
    assert [r.loss for r in result.position.history] == [r.loss for r in whole_reports]
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value)


def test_the_last_step_of_an_epoch_leaves_one_state() -> None:
    told: list[tuple[bool, int, int]] = []

    def keep(report: EpochReport | None, state: State) -> None:
        told.append((report is not None, state.position.epoch, state.position.batch))

    fit(new(), FakeData(), replace(TRAIN, epochs=2, save_steps=2), report=keep)  # type: ignore[arg-type]
    assert told == [(False, 0, 2), (True, 1, 0), (False, 1, 2), (True, 2, 0)], "four steps an epoch"


def test_the_best_state_is_kept_beside_the_last_also_after_a_resume(tmp_path: Path) -> None:
    patient = replace(TRAIN, epochs=60, patience=3, lr=0.3)
    _, _, result = run(patient, tmp_path / "state")
    best, last = result.position.best_epoch, result.position.epoch
    assert last == best + 3 < 60, "this rate must overshoot, or the test shows nothing"
    assert len(list((tmp_path / "state").iterdir())) == 2
    kept_best = best_state(tmp_path / "state", result.position)
    assert open_state(kept_best).position.epoch == best
    run(replace(patient, epochs=best + 1), tmp_path / "again")
    *_, again = run(patient, tmp_path / "again", resume=last_state(tmp_path / "again"))
    assert again.position.best_epoch == best
    for name, digest in open_state(kept_best).files.items():
        assert open_state(best_state(tmp_path / "again", again.position)).files[name] == digest


def test_without_validation_the_last_weights_stay() -> None:
    model = new()
    result = fit(model, FakeData(valid=False), replace(TRAIN, patience=1))  # type: ignore[arg-type]
    assert result.position.epoch == TRAIN.epochs
    assert result.position.best_epoch == 0
    assert result.position.history[-1].value is None


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = new()
    model.poison_at = 4 * 2 + 3  # four steps an epoch
    with pytest.raises(TrainingError, match=r"nan at epoch 3, batch 3 \(step 11\)"):
        run(TRAIN, tmp_path / "state", model=model)
    assert kept(tmp_path / "state").position.epoch == 2
    assert all(torch.isfinite(v).all() for v in weights(model).values())


def test_an_unknown_metric_is_refused_before_the_first_step() -> None:
    model = new()
    with pytest.raises(ConfigError, match=r"ndgc@10.*ndcg@10"):
        run(replace(TRAIN, metric="ndgc@10"), model=model)
    assert model.calls == 0


def test_a_dataset_without_batches_is_refused() -> None:
    with pytest.raises(InputError, match="learn from"):
        fit(new(), FakeData(users=0), TRAIN)  # type: ignore[arg-type]


def test_the_validation_sample_is_the_same_each_epoch_and_run() -> None:
    small = replace(TRAIN, epochs=2, valid_users=7, lr=1e-12)
    first, second = (run(small)[1] for _ in range(2))
    assert first[0].value == first[1].value == second[0].value != run(TRAIN)[1][0].value


def test_clipping_and_warmup_act() -> None:
    plain = weights(run(replace(TRAIN, epochs=1, lr=0.1))[0])
    for change in ({"warmup_steps": 1000}, {"clip_norm": 1e-9}):
        other = weights(run(replace(TRAIN, epochs=1, lr=0.1, **change))[0])  # type: ignore[arg-type]
        assert any(not torch.equal(plain[k], other[k]) for k in plain), change


def test_a_cosine_starts_at_the_rates_and_ends_near_nothing() -> None:
    slowing = replace(TRAIN, schedule="cosine", epochs=8)
    model, after, losses = new(), [], []

    def keep(report: EpochReport | None, state: State) -> None:
        if report is not None:
            losses.append(report.loss)
            after.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))

    fit(model, FakeData(), slowing, report=keep)  # type: ignore[arg-type]
    _, constant, _ = run(replace(slowing, schedule="constant"))
    assert losses[0] == constant[0].loss
    assert losses[2:] != [report.loss for report in constant[2:]]
    moved = [float((late - early).abs().max()) for early, late in pairwise(after)]
    assert moved[-1] < 0.2 * moved[0]


def test_bf16_learns_and_keeps_f32_weights() -> None:
    model, reports, _ = run(replace(TRAIN, precision="bf16"))
    assert reports[-1].loss < reports[0].loss
    assert all(v.dtype == torch.float32 for v in model.state_dict().values())


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(replace(TRAIN, epochs=1, threads=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_batches_an_update_are_one_of_twice_the_size() -> None:
    small = replace(TRAIN, epochs=2, batch_size=10, accumulate=5, warmup_steps=0)
    model, reports, result = run(small)
    assert result.position.step == 2 * 1
    large, large_reports, _ = run(replace(small, batch_size=50, accumulate=1))
    assert [r.loss for r in reports] == pytest.approx([r.loss for r in large_reports], rel=1e-5)
    for name, value in weights(large).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
def test_every_optimizer_of_tables_learns_in_f32_and_bf16(kind: str) -> None:
    rate = {"adam": 0.02, "adagrad": 0.1, "sgd": 2.0}[kind]
    for dtype in ("f32", "bf16"):
        change = replace(TRAIN, epochs=12, table_optimizer=kind, table_lr=rate, table_dtype=dtype)  # type: ignore[arg-type]
        model, reports, _ = run(change)
        assert reports[-1].loss < 0.8 * reports[0].loss, (kind, dtype)
        assert model.tables["item"].weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)


def test_a_table_that_overflows_stops_the_run_before_its_state_is_kept(tmp_path: Path) -> None:
    huge = replace(TRAIN, table_optimizer="sgd", table_lr=1e38, warmup_steps=0, batch_size=50, epochs=3)
    with pytest.raises(TrainingError):
        run(huge, tmp_path / "state")
    assert not (tmp_path / "state").exists() or kept(tmp_path / "state").position.epoch < 3


def test_an_altered_state_is_refused(tmp_path: Path) -> None:
    run(replace(TRAIN, epochs=1), tmp_path / "state")
    state = last_state(tmp_path / "state")
    assert state
    (victim,) = state.glob("table-item-*")
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match="altered"):
        run(TRAIN, resume=state)
    victim.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        run(TRAIN, resume=state)


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    identity = {"recipe": "a", "version": "1"}
    fit(
        new(),
        FakeData(),
        replace(TRAIN, epochs=1),
        identity=identity,
        report=lambda _, state: _save(state, tmp_path),
    )  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="another recipe"):
        fit(new(), FakeData(), TRAIN, identity={**identity, "recipe": "b"}, resume=last_state(tmp_path))  # type: ignore[arg-type]


def _save(state: State, folder: Path) -> None:
    state.save(folder)


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="cuda"):
            pick_device("cuda")


def test_epoch_words() -> None:
    report = EpochReport(epoch=2, loss=1.5, metric="ndcg@10", value=0.25, best=True, seconds=3.04, batches=4)
    assert epoch_words(report, 9) == "epoch 2/9: loss 1.5000, ndcg@10 0.2500 (best), 3.0 s"
