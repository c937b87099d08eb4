"""The rule of successive halving: what holds for any order of trials, any curves, any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import ConfigError
from recray.tuning.halving import Halving, Rungs, scheduled

Curves = list[list[float]]


class Search:
    """A search as the sweep drives it, with what it may check on the way."""

    def __init__(self, curves: Curves, how: Halving, workers: int, rng: np.random.Generator) -> None:
        self.curves, self.how, self.workers, self.rng = curves, how, workers, rng
        self.rungs = Rungs(how, len(curves))
        self.epochs = dict.fromkeys(map(str, range(len(curves))), 0)
        self.went: dict[int, list[str]] = {}  # rung -> those that went on, before any was run out
        self.begun, self.under_way = 0, dict[str, int]()

    def step(self) -> bool:
        """Give one worker something to do; False when there is nothing."""
        promoted = self.rungs.next()
        if promoted is not None:
            trial, until = promoted
            rung = self.epochs[trial]
            self.went.setdefault(rung, []).append(trial)
            came = [name for name, curve in self.rungs.curves.items() if len(curve) >= rung]
            assert len(self.went[rung]) <= len(came) // self.how.eta
            waited = [n for n in self.rungs.waiting if self.epochs[n] == rung]
            assert all(self.value(n) <= self.value(trial) for n in waited), "the best that waits goes first"
        elif self.begun < len(self.curves):
            trial, until = str(self.begun), self.how.after(0)
            self.begun += 1
        elif not self.under_way and (last := self.rungs.last()) is not None:
            trial, until = last
        else:
            return False
        self.under_way[trial] = min(until, len(self.curves[int(trial)]))
        return True

    def value(self, trial: str) -> float:
        return max(self.curves[int(trial)][: self.epochs[trial]])

    def come_back(self) -> None:
        """One of those under way comes to its rung, or to its end."""
        trial = list(self.under_way)[int(self.rng.integers(len(self.under_way)))]
        until = self.epochs[trial] = self.under_way.pop(trial)
        curve = self.curves[int(trial)]
        ended = until == len(curve)
        self.rungs.report(trial, curve[:until], "ended" if ended else "waits")
        for lost in self.rungs.hopeless():
            assert lost != self.leader(), "the best is not given up"
            self.rungs.report(lost, self.curves[int(lost)][: self.epochs[lost]], "stopped")

    def leader(self) -> str:
        known = self.rungs.curves
        return max(known, key=lambda name: known[name][-1])

    def run(self) -> int:
        """To the end; gives the epochs that were trained."""
        while True:
            while len(self.under_way) < self.workers and self.step():
                pass
            if not self.under_way:
                return sum(self.epochs.values())
            self.come_back()


@st.composite
def searches(draw: st.DrawFn) -> Search:
    """Curves of few values, so that ties are common; some trials end by themselves before the last epoch."""
    epochs, count = draw(st.integers(1, 30)), draw(st.integers(1, 12))
    how = Halving(epochs, draw(st.integers(1, 5)), draw(st.integers(2, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    curves = [rng.integers(0, 6, size=epochs).astype(float).tolist() for _ in range(count)]
    for curve in curves:
        del curve[epochs - draw(st.sampled_from([0, 0, 0, epochs // 3])) :]
    return Search(curves, how, draw(st.integers(1, 4)), rng)


@given(searches())
def test_a_search_ends_with_its_best_run_out_and_no_more_go_on_than_may(search: Search) -> None:
    search.run()
    assert search.begun == len(search.curves)
    assert not search.under_way
    assert search.rungs.ended, "at least one trial was run out"
    rungs, how = search.rungs, search.how
    spent = sum(search.epochs.values())
    for trial in rungs.waiting:
        rung = search.epochs[trial]
        went = [max(curve[:rung]) for curve in rungs.curves.values() if len(curve) > rung]
        if search.value(trial) > max(went, default=-1.0):
            more = min(rung * how.eta, how.epochs) - rung
            assert spent + more > len(search.curves) * how.epochs / 2, "the best of a rung goes on"


@pytest.mark.parametrize("order", ["rising", "falling", "any", "equal"])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("eta", [2, 3, 4])
def test_no_order_of_trials_trains_more_than_half_of_the_epochs(order: str, workers: int, eta: int) -> None:
    """Rising is the worst: each trial is better than all before, as of a searcher that learns."""
    rng = np.random.default_rng(0)
    for epochs in (4, 5, 8, 9, 18, 27, 30, 50):
        for count in (3, 4, 6, 9, 12, 20, 33):
            levels = {
                "rising": np.arange(count), "falling": np.arange(count)[::-1],
                "any": rng.permutation(count), "equal": np.zeros(count),
            }[order]  # fmt: skip
            curves = [[float(level + 1) * epoch for epoch in range(1, epochs + 1)] for level in levels]
            how = scheduled("asha", 0, eta, epochs)
            assert how is not None
            search = Search(curves, how, workers, rng)
            assert search.run() <= count * epochs / 2, (epochs, count)
            if order != "equal" and count >= 9 and epochs >= 9:  # fewer may not pay for two run out
                assert search.epochs[str(int(np.argmax(levels)))] == epochs


def test_the_best_of_many_is_found_at_a_third_of_the_cost() -> None:
    """Noisy curves that end in order of a true quality: what is found is near the best, in the mean."""
    lost, spent = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        quality = rng.uniform(size=27)
        rise = rng.uniform(0.1, 0.6, size=27)  # some begin slowly
        t = np.arange(1, 28)
        curves = quality[:, None] * (1 - np.exp(-rise[:, None] * t)) + rng.normal(0, 0.01, (27, 27))
        search = Search(curves.tolist(), Halving(27, 3, 3), 1, rng)
        spent.append(search.run() / 27**2)
        lost.append(quality.max() - quality[[int(name) for name in search.rungs.ended]].max())
    assert np.mean(lost) < 0.03
    assert np.mean(spent) < 0.35


def test_nobody_goes_on_before_eta_have_come_and_then_the_best_does() -> None:
    rungs = Rungs(Halving(9, 1, 3), 9)
    rungs.report("a", [0.5], "waits")
    rungs.report("b", [0.7], "waits")
    assert rungs.next() is None
    rungs.report("c", [0.6], "waits")
    assert rungs.next() == ("b", 3)
    assert rungs.next() is None, "one of three has gone on"
    rungs.report("b", [0.7, 0.8, 0.9], "waits")
    rungs.report("d", [0.9], "waits")
    rungs.report("e", [0.1], "waits")
    rungs.report("f", [0.2], "waits")
    assert rungs.next() == ("d", 3)
    rungs.report("d", [0.9, 0.9, 0.9], "waits")
    rungs.report("g", [0.0], "waits")
    assert rungs.next() is None
    assert rungs.hopeless() == ["a", "e", "f", "g"], "three of nine may go on"


def test_the_highest_rung_is_served_first() -> None:
    rungs = Rungs(Halving(27, 1, 2), 8)
    for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4)):
        rungs.report(name, [value] * 2, "waits")
    rungs.report("e", [0.9], "waits")
    assert rungs.next() == ("d", 4)
    assert rungs.next() == ("c", 4)
    assert rungs.next() is None, "two of four have gone on from the second rung, four of five from the first"


def test_a_trial_that_failed_is_compared_with_nobody() -> None:
    rungs = Rungs(Halving(9, 1, 3), 9)
    for name, value in (("a", 0.9), ("b", 0.5), ("c", 0.4)):
        rungs.report(name, [value], "waits")
    assert rungs.next() == ("a", 3)
    rungs.forget("a")
    rungs.report("d", [0.1], "waits")
    assert rungs.next() == ("b", 3)


def test_of_losses_the_least_is_best() -> None:
    rungs = Rungs(Halving(9, 2, 2), 4, "min")
    rungs.report("a", [0.5, 0.4], "waits")
    rungs.report("b", [0.2, 0.9], "waits")
    assert rungs.best([0.2, 0.9, 0.1]) == 0.2
    assert rungs.next() == ("b", 4), "its best epoch counts, which is what it would leave"


def test_rungs() -> None:
    how = Halving(30, 2, 3)
    assert [how.rung(epoch) for epoch in range(8)] == [0, 0, 2, 2, 2, 2, 6, 6]
    assert [how.after(epoch) for epoch in range(8)] == [2, 2, 6, 6, 6, 6, 18, 18]


@pytest.mark.parametrize("grace, eta, said", [(0, 3, "grace is 0"), (1, 1, "eta is 1")])
def test_numbers_that_halve_nothing_are_refused(grace: int, eta: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Halving(9, grace, eta)


def test_schedulers_have_names() -> None:
    assert scheduled("none", 1, 3, 30) is None
    assert scheduled("asha", 2, 4, 30) == Halving(30, 2, 4)
    found = [scheduled("asha", 0, 3, epochs) for epochs in (1, 17, 30)]
    assert [how and how.grace for how in found] == [1, 2, 5]
    with pytest.raises(ConfigError, match="did you mean 'asha'"):
        scheduled("asah", 1, 3, 30)
