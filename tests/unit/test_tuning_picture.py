"""The trials shown: a table in order of merit, parallel coordinates on a page that stands alone."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from recray.tuning.picture import BOTTOM, HEIGHT, TOP, page, picture, ranked, table

AXES = [
    {"name": "train.lr", "kind": "float", "low": 1e-4, "high": 1e-2, "log": True, "choices": []},
    {"name": "options.dim", "kind": "choice", "low": 0.0, "high": 0.0, "log": False, "choices": [16, 32, 64]},
]


def row(
    number: int, lr: float, dim: int, value: float | None, epochs: int | None = 9, **more: Any
) -> dict[str, Any]:
    made = {
        "trial": f"h{number}", "number": number, "words": f"train.lr={lr} options.dim={dim}",
        "point": {"train.lr": lr, "options.dim": dim}, "metrics": {} if value is None else {"ndcg@10": value},
        "epochs": epochs, "of": 9, "stopped": epochs == 1, "error": None, "seconds": 1.25,
    }  # fmt: skip
    return {**made, **more}


@pytest.fixture
def front() -> dict[str, Any]:
    rows = [
        row(1, 1e-3, 32, 0.20),
        row(2, 1e-4, 16, 0.05, 1),
        row(3, 1e-2, 64, 0.30),
        row(4, 5e-2, 64, None, error="the loss is nan <script>", epochs=None, of=None, stopped=False),
    ]
    return {
        "search": "tune", "metric": "ndcg@10", "goal": "max", "chosen": "h3", "axes": AXES, "trials": rows,
        "epochs": {"spent": 19, "all": 27},
    }  # fmt: skip


def lines(front: dict[str, Any]) -> dict[str, tuple[list[tuple[float, float]], ElementTree.Element]]:
    """Of each trial's line: its corners, and the element."""
    drawn = ElementTree.fromstring(picture(front))
    found = {}
    for line in drawn.iter("polyline"):
        corners = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        title = line.find("title")
        assert title is not None
        found[str(title.text).split(":")[0]] = (corners, line)
    return found  # type: ignore[return-value]


def test_the_table_is_in_order_of_merit(front: dict[str, Any]) -> None:
    told = [re.split(r"\s{2,}", line) for line in table(front).splitlines()]
    assert told[0] == ["trial", "settings", "ndcg@10", "epochs", "seconds"]
    assert [line[0] for line in told[1:5]] == ["3", "1", "2", "4"]
    assert told[3] == ["2", "train.lr=0.0001 options.dim=16", "0.0500", "1/9 stopped", "1.2"]
    assert "the loss is nan" in told[4][1]
    assert told[5] == ["19 epochs were trained; every trial run out takes 27 (70%)."]


def test_a_model_without_epochs_has_none(front: dict[str, Any]) -> None:
    for each in front["trials"]:
        each.update(epochs=None, of=None, stopped=False)
    front["epochs"] = {"spent": 0, "all": 0}
    assert "epochs were" not in table(front) + page(front)
    assert all(len(corners) == 3 for corners, _ in lines(front).values())


def test_of_losses_the_least_comes_first(front: dict[str, Any]) -> None:
    assert [each["number"] for each in ranked({**front, "goal": "min"})] == [2, 1, 3, 4]


def test_each_line_runs_through_its_values(front: dict[str, Any]) -> None:
    drawn, low, high = lines(front), HEIGHT - BOTTOM, TOP
    assert set(drawn) == {"trial 1", "trial 2", "trial 3"}, "a failed trial has no line"
    ys = {name: [y for _, y in corners] for name, (corners, _) in drawn.items()}
    middle = (low + high) / 2
    assert ys["trial 1"][:2] == pytest.approx([middle, middle], abs=0.1)  # .001 of .0001..01 on the log scale
    assert ys["trial 2"] == pytest.approx([low, low, low + (high - low) / 9, low], abs=0.1)
    assert ys["trial 3"] == pytest.approx([high] * 4, abs=0.1)
    xs = [x for x, _ in drawn["trial 1"][0]]
    assert xs == sorted(xs)
    assert [name for name, (_, line) in drawn.items() if line.get("stroke-dasharray")] == ["trial 2"]
    assert [name for name, (_, line) in drawn.items() if line.get("stroke-width") == "4"] == ["trial 3"]
    assert list(drawn)[-1] == "trial 3", "the best lies on top"


def test_the_axes_are_named_and_scaled(front: dict[str, Any]) -> None:
    words = [text.text for text in ElementTree.fromstring(picture(front)).iter("text")]
    for told in ("train.lr", "options.dim", "epochs", "ndcg@10", "0.0001", "0.001", "0.01", "16", "32", "64"):
        assert told in words


def test_the_page_stands_alone_and_holds_words_as_text(front: dict[str, Any]) -> None:
    made = page(front)
    assert not re.search(r"<script|url\(|src=|href=", made)
    assert "&lt;script&gt;" in made
    assert made.count("<tr") == 5
    assert '<tr class="best"><td>3</td>' in made


def test_few_or_equal_or_foreign_values_make_a_picture_too(front: dict[str, Any]) -> None:
    for rows in ([], [row(1, 1e-3, 32, 0.2)], [row(1, 1e-3, 32, 0.2), row(2, 1e-3, 32, 0.2)]):
        assert len(lines({**front, "trials": rows})) == len(rows)
    outside = lines({**front, "trials": [row(1, 1.0, 99, 0.2), row(2, 1e-6, 16, 0.3)]})
    assert all(TOP <= y <= HEIGHT - BOTTOM for corners, _ in outside.values() for _, y in corners)
