"""The files around the package agree with it: dependencies, pins, make targets, README, wheel."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import recray
from recray.cli.main import VERBS, parser
from tests.house.source import ROOT, modules, third_party, tree

# A benchmark reports a missing one as missing; they live in environments of their own (tools/peers.sh).
PEERS = {"torchrec", "fbgemm_gpu", "rectools", "recbole", "pytorch_lightning", "sentence_transformers"}
SOLD_BY = {"surprise": ["scikit-surprise"]}  # under another name, and perhaps not installed
README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("cluster/**/*.md")]


def _project() -> dict[str, list[Requirement]]:
    """ "" and each extra -> what it asks for, read from pyproject.toml without a parser for TOML (3.10)."""
    text = (ROOT / "pyproject.toml").read_text()
    groups = {"": re.search(r"^dependencies = (\[.*?^\])", text, re.M | re.S)[1]}  # type: ignore[index]
    extras = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    groups |= dict(re.findall(r"^(\w+) = (\[.*?\])$", extras, re.M | re.S))
    return {name: [Requirement(word) for word in ast.literal_eval(words)] for name, words in groups.items()}


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    asked = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {_same(r.name): Version(next(iter(r.specifier)).version) for r in asked}


def _same(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(*extras: str) -> set[str]:
    return {_same(r.name) for name in ("", *extras) for r in _project()[name]}


def test_every_direct_dependency_is_pinned_inside_its_range() -> None:
    pins = _pins()
    for group in _project().values():
        for asked in group:
            assert _same(asked.name) in pins, f"{asked.name} has no pin"
            assert asked.specifier.contains(pins[_same(asked.name)]), asked


@pytest.mark.parametrize(
    ("paths", "extras"),
    [(modules(), ("redis",)), (sorted(ROOT.glob("tests/**/*.py")), ("dev",)),
     (sorted(ROOT.glob("benchmarks/**/*.py")), ("bench", "dev"))],
    ids=["recray", "tests", "benchmarks"],
)  # fmt: skip
def test_what_is_imported_is_declared(paths: list[Path], extras: tuple[str, ...]) -> None:
    sold_by = SOLD_BY | dict(metadata.packages_distributions())
    declared = _declared(*extras)
    tops = set().union(*(third_party(path) for path in paths))
    missing = {top for top in tops if not {_same(d) for d in sold_by.get(top, [top])} & declared}
    assert missing - PEERS - {"grpc"} == set()  # grpc is Ray's, and connect.py speaks to Ray


def test_what_is_declared_is_imported() -> None:
    sold_by = SOLD_BY | dict(metadata.packages_distributions())
    used = {_same(d) for path in modules() for top in third_party(path) for d in sold_by.get(top, [top])}
    indirectly = {"onnxscript", "pandas"}  # torch.onnx asks for the one, Ray Tune and Train for the other
    assert _declared() - used - indirectly == set()


def test_make_has_the_targets_we_promise() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.M))
    assert targets >= {"install", "demo", "test", "check", "bench", "soak", "clean"}
    assert set(re.findall(r"`make (\w+)", "".join(p.read_text() for p in GUIDES))) <= targets
    dry = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr


def _blocks(kind: str) -> Iterator[str]:
    for guide in GUIDES:
        yield from re.findall(rf"^```(?:{kind})\n(.*?)^```", guide.read_text(), re.M | re.S)


def _commands() -> Iterator[list[str]]:
    for block in _blocks("bash|console|sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for cut in ("|", ">", "&", "&&", "||", ";"):
                words = words[: words.index(cut)] if cut in words else words
            if words:
                yield words


def test_the_commands_of_the_readme_parse() -> None:
    ours = [words for words in _commands() if words[0] == "recray"]
    assert {words[1] for words in ours} >= {"prepare", "train", "evaluate", "compress", "bundle", "serve"}
    for words in ours:
        if words[1:] not in (["--help"], ["--version"]):
            parser().parse_args(words[1:])
    for words in _commands():
        if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            assert importlib.util.find_spec(words[2]), words


def test_the_python_of_the_readme_calls_what_is_there() -> None:
    calls = 0
    for block in _blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("recray."):
                verb = getattr(recray, ast.unparse(node.func).removeprefix("recray."))
                inspect.signature(verb).bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
                calls += 1
    assert calls >= 5


@pytest.mark.parametrize("verb", VERBS)
def test_the_example_of_a_verb_parses(verb: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as left:
        parser().parse_args([verb, "--help"])
    assert left.value.code == 0
    example = said.getvalue().split("example:\n")[1].strip()
    assert parser().parse_args(shlex.split(example)[1:]).verb == verb


def test_the_readme_lists_every_verb() -> None:
    assert [verb for verb in VERBS if f"`recray {verb}" not in README] == []


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("recray-*.whl")
    assert wheel.name == f"recray-{recray.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {path.relative_to(ROOT).as_posix() for path in modules()} | {"recray/py.typed"}
    assert inside <= names
    others = {name for name in names - inside if ".dist-info/" not in name}
    assert {name for name in others if not name.startswith("recray/")} == set()
    assert not [name for name in others if name.endswith((".pyc", ".py", ".log"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    points = next(n for n in names if n.endswith("entry_points.txt"))
    assert "recray = recray.cli.main:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_every_verb_has_its_file() -> None:
    there = {path.stem for path in (ROOT / "recray/cli").glob("*.py")}
    assert there - {"__init__", "main", "failures", "output", "parsing", "text", "words"} == set(VERBS)
    for verb in VERBS:
        body = tree(ROOT / f"recray/cli/{verb}.py").body
        assert {"options", "run"} <= {n.name for n in body if isinstance(n, ast.FunctionDef)}
