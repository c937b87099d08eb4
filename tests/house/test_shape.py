"""What a reader may rely on: small files, short functions, docstrings, a listing that is true."""

from __future__ import annotations

import ast
import importlib
import re

import recray
from tests.house.source import PACKAGE, ROOT, modules, name_of, tracked, tree

LONGEST_FILE, LONGEST_VERB, LONGEST_FUNCTION = 400, 60, 60
Function = (ast.FunctionDef, ast.AsyncFunctionDef)

# Kept in pieces, so that this file does not hold what it looks for: hosts of package registries,
# and absolute paths of the machine somebody happened to write on.
NEVER = [
    "pypi" + r"\.org", "python" + r"hosted\.org", "npm" + r"js\.(org|com)", "deb" + r"ian\.org",
    "download\\." + r"pytorch\.org", "crates" + r"\.io", "proxy" + r"\.golang", r"(?<![\w.])/wo" + "rk/",
    "/opt/" + "wheels", "/tmp/" + "plan", r"/root/" + r"\.",
]  # fmt: skip
BINARY = {".png", ".parquet", ".onnx", ".npy", ".xz", ".gz", ".zst", ".safetensors", ".ico"}


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    doc = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


def test_a_file_can_be_read_in_one_sitting() -> None:
    long = []
    for path in modules():
        lines = len(path.read_text().splitlines())
        if lines > (LONGEST_VERB if path.parent.name == "cli" else LONGEST_FILE):
            long.append((name_of(path), lines))
    assert long == []


def test_a_function_fits_a_screen() -> None:
    long = []
    for path in modules():
        functions = [node for node in ast.walk(tree(path)) if isinstance(node, Function)]
        long += [(name_of(path), n.name, lines_of(n)) for n in functions if lines_of(n) > LONGEST_FUNCTION]
    assert long == []


def test_what_is_public_is_documented() -> None:
    bare = [name_of(path) for path in modules() if not ast.get_docstring(tree(path))]
    for path in modules():
        public = [n for n in tree(path).body if isinstance(n, (*Function, ast.ClassDef)) and n.name[0] != "_"]
        bare += [f"{name_of(path)}.{node.name}" for node in public if not ast.get_docstring(node)]
    assert bare == []


def test_the_listing_of_the_package_is_true() -> None:
    lines = re.findall(r"^    \w[\w ]*?\s{2,}(\S+)\s{2,}\S", recray.__doc__ or "", re.MULTILINE)
    assert len(lines) >= 12
    assert [name for name in lines if not (PACKAGE / name).exists()] == []
    assert all((PACKAGE / name).is_dir() for name in lines if name.endswith("/"))


def test_the_public_names_are_there() -> None:
    api, domains = (importlib.import_module(f"recray.{name}") for name in ("api", "domains"))
    verbs = {name: domains if name == "build" else api for name in recray.__all__ if name != "__version__"}
    assert [name for name, home in verbs.items() if getattr(recray, name) is not getattr(home, name)] == []
    missing = [n for n, home in verbs.items() if "Example" not in (getattr(home, n).__doc__ or "")]
    assert missing == [], "each verb shows an example"


def test_registries_lead_to_classes() -> None:
    from recray.compression.codec import CODECS
    from recray.models import MODELS
    from recray.recipes import RECIPES
    from recray.retrieval.index import INDEXES

    for registry in (CODECS, INDEXES, MODELS):
        for target in registry.values():
            module, _, attribute = target.partition(":")
            found = importlib.import_module(module)
            assert not attribute or callable(getattr(found, attribute)), target
    assert {make().model for make in RECIPES.values()} <= set(MODELS)
    assert [name for name, make in RECIPES.items() if make().name != name] == []


def test_no_file_names_a_registry_or_a_path_of_its_author() -> None:
    found = []
    for path in tracked():
        if path.suffix not in BINARY:
            text = path.read_text(encoding="utf-8")
            found += [(path.relative_to(ROOT).as_posix(), p) for p in NEVER if re.search(p, text)]
    assert found == []
