"""Every module imports first and alone: on a Ray worker the first import is wherever a function lives."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.house.source import ROOT, imported_at_once, modules, name_of

# A clean interpreter imports what is not ours once, then forks: each child imports one module of ours.
FORKER = """
import importlib, json, os, sys, traceback, warnings
names, others = json.loads(sys.stdin.read())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for other in others:
        importlib.import_module(other)
assert not any(n.partition(".")[0] == "recray" for n in sys.modules)
broken = {}
for name in names:
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        try:
            importlib.import_module(name)
            said = b""
        except BaseException:
            said = traceback.format_exc().encode()[-4000:]
        os.write(theirs, said)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    if said:
        broken[name] = said
print(json.dumps(broken))
"""

LIGHT = ["", ".cli.main", ".api", ".errors", ".config", ".storage", ".manifest", ".progress", ".recipes"]
LIGHT = [f"recray{name}" for name in (*LIGHT, ".connect", ".doctor")]
HEAVY = {"torch", "ray", "numpy", "pandas", "pyarrow", "scipy", "faiss", "onnxruntime", "onnx", "optuna"}


def test_every_module_imports_first_and_alone() -> None:
    names = [name_of(path) for path in modules() if path.name != "__main__.py"]
    at_once = set().union(*(imported_at_once(path) for path in modules()))
    others = sorted(name for name in at_once if name.partition(".")[0] not in ("recray", "__future__"))
    ran = subprocess.run(
        [sys.executable, "-c", FORKER],
        input=json.dumps([names, others]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    broken = json.loads(ran.stdout.splitlines()[-1])
    assert broken == {}, "\n".join(broken.values())


def test_light_modules_import_nothing_heavy() -> None:
    script = f"import sys, {', '.join(LIGHT)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == []
