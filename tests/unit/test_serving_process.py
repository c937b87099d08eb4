"""What a server process does with its garbage and with its threads."""

from __future__ import annotations

import gc
import sys

from recray.serving import process


def test_what_is_there_is_left_out_of_later_collections() -> None:
    before = gc.get_threshold()
    held = [[] for _ in range(1000)]  # type: list[list[int]]
    try:
        process.freeze()
        assert gc.get_freeze_count() >= len(held)
        assert not any(one is held for one in gc.get_objects())
        assert gc.get_threshold() == (process.YOUNG, *before[1:])
        new: list[object] = []
        assert any(one is new for one in gc.get_objects())
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_threads_take_turns_sooner_than_python_has_it() -> None:
    before = sys.getswitchinterval()
    try:
        process.take_turns()
        assert sys.getswitchinterval() < before
    finally:
        sys.setswitchinterval(before)
