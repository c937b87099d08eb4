"""The command line: what it prints where, and how it exits. Verbs are stood in for here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from recray import api
from recray.cli.main import VERBS, main, parser
from recray.errors import BudgetError, InputError
from recray.manifest import Artefact, write_artefact

HEAVY = ("torch", "ray", "numpy", "pandas", "pyarrow")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    def fill(folder: Path) -> Mapping[str, Any]:
        (folder / "a.txt").write_text("x")
        return {"rows": 3, "ratio": float("nan")}

    return write_artefact(tmp_path / "made", "checkpoint", fill, recipe={"train": {"lr": 0.1}, "list": [[1]]})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, dict[str, Any]]]]:
    """Puts a function in the place of a verb; returns the calls it got."""

    def put(verb: str, does: Callable[[], Any]) -> list[tuple[Any, dict[str, Any]]]:
        calls: list[tuple[Any, dict[str, Any]]] = []

        def called(*given: Any, **named: Any) -> Any:
            calls.append((given, named))
            return does()

        monkeypatch.setattr(api, verb, called)
        return calls

    return put


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        said = subprocess.run([sys.executable, "-m", "recray", "--help"], capture_output=True, text=True)
        spent.append(time.perf_counter() - start)
        assert said.returncode == 0
        assert all(verb in said.stdout for verb in VERBS)
    assert min(spent) < 0.3
    script = f"import sys, recray.cli.main as m; m.parser(); print(*(set({HEAVY!r}) & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.split() == []


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.split()[0] == "recray"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: VERB"),
        (["prepair"], "invalid choice: 'prepair'"),
        (["train"], "train: the following arguments are required: DATASET"),
        (["train", "x", "--worker", "2"], "unrecognized arguments: --worker 2"),
        (["train", "x", "--workers", "-1"], "'-1' is neither a number of workers nor a range"),
        (["train", "x", "--workers", "two"], "'two' is neither a number of workers nor a range"),
        (["train", "x", "--workers", "4-2"], "'4-2' is neither a number of workers nor a range"),
        (["train", "x", "--workers", "0-2"], "'0-2' is neither a number of workers nor a range"),
        (["train", "x", "--workers", "1-2-3"], "'1-2-3' is neither a number of workers nor a range"),
        (["train", "x", "--workers", "2-"], "'2-' is neither a number of workers nor a range"),
        (["prepare", "x", "--workers", "2-4"], "'2-4' is not a whole number of at least 0"),
        (["prepare", "x", "--columns", "user"], "cannot read 'user'"),
        (["prepare", "x", "--columns", "user=a,user=b"], "'user' is given twice"),
        (["prepare", "x", "--event-weights", "view=much"], "write for example view=1,buy=5"),
        (["recommend", "b", "--user", "u", "-k", "0"], "'0' is not a whole number of at least 1"),
        (["recommend", "b"], "one of the arguments --user --history --users is required"),
        (["recommend", "b", "--user", "u", "--history", "a"], "not allowed with argument"),
        (["compress", "c", "--size", "1MB"], "required: --p99"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(words: list[str], said: str, capsys: Capture) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recray: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert "--help" in err


def test_an_artefact_prints_its_path_and_nothing_else(
    artefact: Artefact, stand_in: Any, capsys: Capture
) -> None:
    def noisy() -> Artefact:
        print("a library talks")
        return artefact

    calls = stand_in("train", noisy)
    assert (
        main(["train", "data", "--recipe", "ials", "--set", "train.lr=1", "--set", "a=b", "--workers", "2"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == f"{artefact.place}\n"
    assert "a library talks" in err
    named = {"recipe": "ials", "workers": 2, "gpu": False, "set": ["train.lr=1", "a=b"], "out": None}
    assert calls == [(("data",), {**named, "retriever": None})]


@pytest.mark.parametrize(("given", "meant"), [("0", 0), ("3", 3), ("2-4", (2, 4)), ("2-2", 2)])
def test_workers_of_train_may_be_a_range(
    given: str, meant: Any, artefact: Artefact, stand_in: Any, capsys: Capture
) -> None:
    calls = stand_in("train", lambda: artefact)
    assert main(["train", "data", "--workers", given]) == 0
    assert calls[0][1]["workers"] == meant


def test_json_is_strict(artefact: Artefact, stand_in: Any, capsys: Capture) -> None:
    stand_in("train", lambda: artefact)
    assert main(["train", "data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {
        "path": str(artefact.place),
        "kind": "checkpoint",
        "hash": artefact.hash,
        "report": {"rows": 3, "ratio": None},
    }


def test_prepare_hands_every_option_on(artefact: Artefact, stand_in: Any) -> None:
    calls = stand_in("prepare", lambda: type("Made", (), {"artefact": artefact}))
    words = "prepare a b --columns user=c,item=1 --context day,hour --event-weights view=1,buy=5"
    assert main([*words.split(), "--split", "time", "--dedupe", "--min-weight", "2", "--out", "o"]) == 0
    ((given, named),) = calls
    assert given == (["a", "b"],)
    assert named["columns"] == {"user": "c", "item": "1"}
    assert named["context"] == ["day", "hour"]
    assert named["event_weights"] == {"view": 1.0, "buy": 5.0}
    assert (named["split"], named["dedupe"], named["min_weight"], named["out"]) == ("time", True, 2.0, "o")
    assert set(named) == {
        "items", "users", "links", "columns", "context", "event_weights", "valid", "test", "split", "dedupe",
        "min_weight", "workers", "out",
    }  # fmt: skip


def test_compress_and_show_hand_their_options_on(artefact: Artefact, stand_in: Any, capsys: Capture) -> None:
    calls = stand_in("compress", lambda: artefact)
    words = (
        "compress c --p99 10ms --size 1MB --rps 50 --cost-per-1k 0.001 --price hour=0.2,cores=4 --http 2ms"
    )
    assert main(words.split()) == 0
    ((given, named),) = calls
    assert given == ("c",)
    assert (named["p99"], named["size"], named["http"]) == ("10ms", "1MB", "2ms")
    assert (named["rps"], named["cost_per_1k"], named["price"]) == (50, 0.001, {"hour": 0.2, "cores": 4.0})
    asked = stand_in("show", lambda: {"trial": "ab", "metrics": {"p99": 0.01}})
    assert main(["show", "search", "--trial", "3"]) == 0
    assert asked == [(("search",), {"trial": "3"})]
    assert "metrics.p99  0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("no such column", where="log.csv", fix="look"), 2, "log.csv: no such column. look"),
        (BudgetError("nothing fits"), 1, "nothing fits"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "ZeroDivisionError: division by zero (RECRAY_TRACEBACK=1",
        ),
        (FileNotFoundError(2, "No such file", "x.csv"), 2, "x.csv: No such file"),
        (PermissionError(13, "Permission denied", "x.csv"), 2, "x.csv: Permission denied"),
    ],
)
def test_failures_are_one_line(
    error: BaseException, code: int, said: str, stand_in: Any, capsys: Capture
) -> None:
    def fail() -> None:
        raise error

    stand_in("train", fail)
    assert main(["train", "data"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"recray: error: {said}")


def test_the_traceback_is_shown_on_request(
    stand_in: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("train", lambda: 1 // 0)
    monkeypatch.setenv("RECRAY_TRACEBACK", "1")
    assert main(["train", "data"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "recray: error: ZeroDivisionError: integer division or modulo by zero"


def test_a_reader_that_leaves_early_is_no_accident(artefact: Artefact) -> None:
    command = f"{sys.executable} -m recray show {artefact.place} --json | head -c 1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("{", "")


def test_a_reader_that_is_gone_already(artefact: Artefact) -> None:
    gone, to = os.pipe()
    os.close(gone)
    try:
        ran = subprocess.run(
            [sys.executable, "-m", "recray", "show", str(artefact.place)], stdout=to, stderr=subprocess.PIPE
        )
    finally:
        os.close(to)
    assert (ran.returncode, ran.stderr) == (1, b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_first(tmp_path: Path, number: signal.Signals, code: int) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from recray import api, storage\n"
        "from recray.cli.main import main\n"
        "def train(*given, **named):\n"
        f"    with storage.staged({str(tmp_path / 'out')!r}):\n"
        "        print('ready', file=sys.stderr, flush=True)\n"
        "        time.sleep(60)\n"
        "api.train = train\n"
        "sys.argv = ['recray', 'train', 'data']\n"
        "sys.exit(main())\n"
    )
    ran = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    assert ran.stderr is not None
    assert ran.stderr.readline() == "ready\n"
    ran.send_signal(number)
    assert ran.wait(20) == code
    said = ran.stderr.read()
    ran.stderr.close()
    assert said == (
        "recray: error: interrupted\n" if number == signal.SIGINT else "recray: error: terminated\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


def test_show_prints_the_manifest_and_lineage(artefact: Artefact, tmp_path: Path, capsys: Capture) -> None:
    child = write_artefact(tmp_path / "child", "bundle", lambda _: None, parents={"checkpoint": artefact})
    assert main(["show", str(child.place)]) == 0
    out = capsys.readouterr().out
    assert f"({artefact.hash[:12]}, as named)" in out
    assert main(["show", str(artefact.place), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["train"]["lr"] == 0.1
    assert found["files"]["a.txt"]["bytes"] == 1
    (tmp_path / "made" / "a.txt").write_text("y")
    assert main(["show", str(artefact.place)]) == 2
    assert "a.txt: was altered" in capsys.readouterr().err


def test_doctor_looks_at_this_machine(capsys: Capture) -> None:
    code = main(["doctor", "--json"])
    checks = {c["name"]: c["verdict"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert {"python", "torch", "cores", "memory", "disk", "gpu", "port 8000"} <= set(checks)
    assert code == int("fail" in checks.values())


@pytest.mark.parametrize("verb", VERBS)
def test_options_never_shorten(verb: str) -> None:
    with pytest.raises(InputError):
        parser().parse_args([verb, "x", "--jso"])


def test_a_name_too_long_is_bad_input(stand_in: Callable[..., Any], capsys: Capture, tmp_path: Path) -> None:
    stand_in("show", lambda: (tmp_path / ("x" * 300)).stat())
    assert main(["show", "somewhere"]) == 2
    assert capsys.readouterr().err.startswith("recray: error: ")


def test_control_characters_do_not_reach_the_terminal(stand_in: Callable[..., Any], capsys: Capture) -> None:
    def fail() -> None:
        raise InputError("has \x1b[2J\0 in it")

    stand_in("show", fail)
    assert main(["show", "somewhere"]) == 2
    assert capsys.readouterr().err == "recray: error: has ?[2J? in it\n"
