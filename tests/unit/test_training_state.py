"""States that are opened: refused where they do not fit or are not whole, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from recray.errors import ArtefactError
from recray.manifest import digest
from recray.training import row_files
from recray.training.checkpoint import (
    Position,
    State,
    assemble_model,
    open_state,
    read_optimizer,
    write_optimizer,
)
from recray.training.layout import Layout
from tests.training_states import (
    IDENTITY,
    on_ranks,
    position,
    quickly,
    read,
    state,
    table,
)

one_thread = pytest.fixture(autouse=True, scope="module")(quickly)


def test_another_recipe_code_or_dataset_is_named(tmp_path: Path) -> None:
    at = state({"item": table(5, 2)}, position(0.1)).save(tmp_path)
    assert open_state(at).position == open_state(at, IDENTITY).position == position(0.1)
    with pytest.raises(ArtefactError, match=r"state-00001-00000003: was written by another dataset\. delete"):
        open_state(at, {**IDENTITY, "dataset": "c" * 64})
    with pytest.raises(ArtefactError, match="by another code version and another recipe"):
        open_state(at, {"dataset": IDENTITY["dataset"], "recipe": "other"})


def test_a_state_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tables = {"item": table(6, 2)}
    at = on_ranks(
        2, lambda rank, gather: state(tables, position(0.1), 2, rank, gather=gather).save(tmp_path)
    )[0]
    shard = at / row_files.file_name("item", 3, 6)
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ArtefactError, match=r"table-item-3-6.safetensors: is missing"):
        open_state(at)
    shard.write_bytes(kept[:-1])
    read(at, "item", 2, 0, tables["item"])  # the other half is sound
    with pytest.raises(ArtefactError, match=r"table-item-3-6.*cut short"):
        read(at, "item", 2, 1, tables["item"])
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    for read_it in (
        lambda: read(at, "item", 1, 0, tables["item"]),
        lambda: assemble_model(at, tmp_path / "model"),
    ):
        with pytest.raises(ArtefactError, match=r"table-item-3-6.*altered"):
            read_it()
    shard.write_bytes(kept)
    for name, load in (
        ("dense", lambda: open_state(at).dense()),
        ("optimizer", lambda: open_state(at).optimizer()),
    ):
        path = at / f"{name}.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ArtefactError, match=f"{name}.*altered"):
            load()
    with pytest.raises(ArtefactError, match="no table 'user'"):
        open_state(at).rows("user", 0, 1, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": 3}, "cannot be read"), ({"format": 9}, "format 9, this version reads 1"),
        ({"tables": {"item": {"rows": 7, "dim": 2, "slots": []}}}, "do not fit together at position 6 of 7"),
        ({"files": {"../x": "0"}}, "cannot be read"), ({"files": {}}, "list of files"),
        ({"identity": None}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_state_json_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    at = state({"item": table(6, 2)}, position(0.1)).save(tmp_path)
    path = at / "state.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match="altered" if "format" not in change else words):
        open_state(at)
    del raw["checksum"]
    path.write_text(json.dumps(raw | {"checksum": digest(raw)}))
    with pytest.raises(ArtefactError, match=words):
        open_state(at, IDENTITY)
    for text in ("", "[]", "{}", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ArtefactError, match="cannot be read"):
            open_state(at)
    path.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        open_state(at)


def test_a_model_is_made_of_a_state(tmp_path: Path) -> None:
    tables = {"item": table(11, 3, torch.bfloat16), "user": table(4, 2)}
    at = on_ranks(
        3, lambda rank, gather: state(tables, position(0.1), 3, rank, gather=gather).save(tmp_path)
    )[0]
    assemble_model(at, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert sorted(found) == ["layer.weight", "seen", "tables.item.weight", "tables.user.weight"]
    assert found["seen"] == 3
    for name, tensors in tables.items():
        rows = torch.arange(len(tensors["weight"]))
        want = tensors["weight"].float()[Layout(len(rows)).positions(rows)]
        assert torch.equal(found[f"tables.{name}.weight"], want)


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = made()
    for _ in range(3):
        step(layer, optimizer)
    State(Position(), layer.state_dict(), read_optimizer(optimizer), {}).write(tmp_path)
    step(layer, optimizer)
    other, again = made()
    saved = open_state(tmp_path)
    other.load_state_dict(saved.dense())
    write_optimizer(again, saved.optimizer())
    step(other, again)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
