"""What the house tests read: the files of this project and their syntax trees, parsed once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "recray"


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`recray.data.ids` for recray/data/ids.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything a file imports anywhere, `from a import b` as a.b."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_at_once(path: Path) -> set[str]:
    """Dotted names of the modules that importing a file imports: those outside of its functions."""
    found, waiting = set(), list(tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.With, ast.Try)):
            waiting += node.body
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def third_party(path: Path) -> set[str]:
    """Top names of what a file imports from outside the standard library and this project."""
    ours = {"recray", "tests", "benchmarks"} | {p.stem for p in ROOT.glob("tests/**/*.py")}
    tops = {name.partition(".")[0] for _, name in imports(path)}
    return {top for top in tops if top not in sys.stdlib_module_names and top not in ours}


def tracked() -> list[Path]:
    """Every file of the project that git knows or would add."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]
