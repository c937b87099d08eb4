"""The log of feedback: whole lines only, finished by rename, bounded, and nothing lost with a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recray.errors import ConfigError, InputError
from recray.feedback import log
from recray.feedback.log import Limits, SegmentLog, read


def numbers(folder: Path) -> list[int]:
    return [line["n"] for line in read(folder, "events")]


def test_lines_are_there_at_once_and_finished_by_rename(tmp_path: Path) -> None:
    made = SegmentLog(tmp_path, "events")
    made.write([{"n": 1}, {"n": 2}])
    assert numbers(tmp_path) == [1, 2]
    assert list(tmp_path.glob("events-*")) == [], "an open segment is hidden"
    made.write([])
    made.close()
    (finished,) = tmp_path.iterdir()
    assert finished.suffix == ".jsonl"
    assert [json.loads(line)["n"] for line in finished.read_text().splitlines()] == [1, 2]
    assert finished.stat().st_mode & 0o077 == 0, "it names users"
    made.write([{"n": 3}])
    assert numbers(tmp_path) == [1, 2, 3]
    made.close()


def test_segments_end_by_size_and_by_age_and_the_oldest_go(tmp_path: Path) -> None:
    now = [1000.0]
    limits = Limits(segment_bytes=30, segment_s=60, total_bytes=45)
    made = SegmentLog(tmp_path, "events", limits, lambda: now[0])
    for n in range(10):  # 8 bytes each
        made.write([{"n": n}])
        now[0] += 1
    assert numbers(tmp_path)[-4:] == [6, 7, 8, 9]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= 45
    finished = len(list(tmp_path.glob("*.jsonl")))
    now[0] += 60
    made.write([{"n": 10}])
    assert numbers(tmp_path)[-1] == 10
    assert numbers(tmp_path)[0] > 0, "the oldest went"
    assert len(list(tmp_path.glob("*.jsonl"))) <= finished + 1
    made.close()


def test_old_segments_go(tmp_path: Path) -> None:
    made = SegmentLog(tmp_path, "events", Limits(total_s=60))
    made.write([{"n": 1}])
    made.close()
    (finished,) = tmp_path.iterdir()
    os.utime(finished, (0, 0))
    SegmentLog(tmp_path, "events", Limits(total_s=60)).close()
    assert list(tmp_path.iterdir()) == []


def test_another_log_in_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    first = SegmentLog(tmp_path, "impressions", Limits(total_bytes=1))
    second = SegmentLog(tmp_path, "events", Limits(total_bytes=1 << 20))
    first.write([{"n": 1}])
    second.write([{"n": 2}])
    second.close()
    assert numbers(tmp_path) == [2]
    assert [line["n"] for line in read(tmp_path, "impressions")] == [1]
    first.close()


def test_a_killed_writer_leaves_its_lines_and_the_next_one_finishes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, pathlib, sys; from recray.feedback.log import SegmentLog\n"
        "made = SegmentLog(pathlib.Path(sys.argv[1]), 'events')\n"
        "made.write([{'n': 1}]); made.write([{'n': 2}])\n"
        "os.write(made._file, b'{\"n\": 3')\n"
        "print('written', flush=True); input()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == b"written\n"
    monkeypatch.setattr(log, "FRESH_S", 0.0)
    alive = SegmentLog(tmp_path, "events")
    assert [path.suffix for path in tmp_path.iterdir()] == [".open"], "it is somebody's"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdin.close()
    child.stdout.close()
    assert numbers(tmp_path) == [1, 2], "half a line does not count"
    SegmentLog(tmp_path, "events").close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]
    assert numbers(tmp_path) == [1, 2]
    alive.close()


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    made = SegmentLog(tmp_path, "events", Limits(segment_bytes=2000))

    def write(start: int) -> None:
        for n in range(start, start + 50):
            made.write([{"n": n, "long": "x" * 50}])

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 50, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(tmp_path)) == list(range(150))
    made.close()


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        list(read(tmp_path / "nowhere", "events"))
    (tmp_path / "events-1-a.jsonl").write_text('{"n": 1}\nnonsense\n')
    with pytest.raises(InputError, match=r"events-1-a\.jsonl:2: is no JSON object"):
        numbers(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold the feedback"):
        SegmentLog(tmp_path / "file", "events")
    with pytest.raises(ConfigError, match="must be above 0"):
        Limits(total_s=0)


def test_a_write_that_fails_does_not_spoil_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = SegmentLog(tmp_path, "events"), os.write
    made.write([{"n": 1}])

    def half(file: int, data: bytes) -> int:
        return real(file, data[:4])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="cut"):
        made.write([{"n": 2}])
    monkeypatch.setattr(os, "write", real)
    made.write([{"n": 3}])
    made.close()
    assert sorted(numbers(tmp_path)) == [1, 3]  # two segments of one moment, in either order
