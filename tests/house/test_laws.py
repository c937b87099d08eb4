"""The four laws: imports point down, Ray has its doors, one wing knows torch.distributed, no pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT, imports, modules, tree

DOORS = ("data/on_ray", "training/on_ray", "tuning/on_ray", "serving/on_ray", "connect")
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
UNSAFE_CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "eval", "exec", "compile",
}  # fmt: skip


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def unsafe(source: ast.Module) -> list[tuple[int, str]]:
    """(line, what) of everything that could run what it reads."""
    found = []
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        given = {k.arg: k.value for k in node.keywords}
        if called in UNSAFE_CALLS or called.endswith((".to_pickle", ".read_pickle")):
            found.append((node.lineno, called))
        for word, bad in (("allow_pickle", True), ("shell", True), ("trust_remote_code", True)):
            value = given.get(word)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is not bad):
                found.append((node.lineno, f"{called}({word}=...)"))
    return found


def test_imports_point_down() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_ray_is_imported_only_by_its_doors() -> None:
    found = []
    for path in modules():
        if not path.relative_to(PACKAGE).as_posix().startswith(DOORS):
            found += [(path.name, *at) for at in imports(path) if at[1].split(".")[0] == "ray"]
    assert found == []


def test_torch_distributed_is_known_only_to_training() -> None:
    found = []
    for path in modules():
        if path.relative_to(PACKAGE).parts[0] != "training":
            found += [(path.name, *at) for at in imports(path) if at[1].startswith("torch.distributed")]
            attributes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)]
            found += [(path.name, n.lineno) for n in attributes if _dotted(n) == "torch.distributed"]
    assert found == []


def test_nothing_unsafe_is_read_or_run() -> None:
    found = []
    for path in [*modules(), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("cluster/**/*.py")]:
        found += [(path.name, *at) for at in imports(path) if at[1].split(".")[0] in UNSAFE_MODULES]
        found += [(path.name, *at) for at in unsafe(tree(path))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=flag)", "torch.load(x)", "eval(x)",
        "frame.to_pickle(x)", "subprocess.run(x, shell=True)", "yaml.load(x)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_looks_for(text: str) -> None:
    assert unsafe(ast.parse(text))


@pytest.mark.parametrize("text", ["model.eval()", "np.load(x, allow_pickle=False)", "yaml.safe_load(x)"])
def test_the_walk_lets_sound_calls_pass(text: str) -> None:
    assert unsafe(ast.parse(text)) == []
