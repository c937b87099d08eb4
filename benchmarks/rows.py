"""What every benchmark writes: rows of one shape, with the command, hardware, versions and date filled in.

    def bench(quick: bool) -> Iterator[Row]: ...
    if __name__ == "__main__":
        sys.exit(rows.main("data", bench))

A theme runs ours and the peer in the same call on the same work, interleaved, and yields one `Row` per
metric. A peer that cannot be had is yielded with `peer_value=None`: missing, never beaten.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

THEMES = ("data", "quality", "training", "retrieval", "compression", "search", "serving", "reliability")
LOWER_IS_BETTER = frozenset(
    ("seconds", "p50_ms", "p99_ms", "bytes", "rmse", "mse", "mae", "mape", "hypervolume_seconds")
)
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")  # much of a speed hangs on them
_PACKAGES = (
    "recray",
    "ray",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "scipy",
    "faiss-cpu",
    "onnxruntime",
    "optuna",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number beside a peer's, on the same work in the same run.

    `work`: a data folder's name or the shape of the work; `given`: what held in the run (threads, recall,
    memory ...); `interval`: a 95 % interval of `value`; `ratio`, unless given, is above 1 where ours is
    better and None without a peer's value.
    """

    name: str
    work: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    interval: tuple[float, float] | None = None

    def filled(self, theme: str, command: str) -> dict[str, Any]:
        """The row as it is kept, JSON values only."""
        row = dataclasses.asdict(self)
        if row["ratio"] is None and self.peer_value is not None and self.value and self.peer_value:
            lower = self.metric in LOWER_IS_BETTER
            row["ratio"] = self.peer_value / self.value if lower else self.value / self.peer_value
        return {
            "theme": theme,
            **row,
            "command": command,
            "hardware": hardware(),
            "versions": versions(_PACKAGES if self.peer is None else (*_PACKAGES, self.peer)),
            "date": dt.date.today().isoformat(),
        }


def hardware() -> dict[str, Any]:
    """Processor and its instructions for vectors, usable cores, memory, and GPU where torch sees one."""
    flags = _told("flags").split()
    made: dict[str, Any] = {
        "cpu": _told("model name") or platform.processor() or platform.machine(),
        "vectors": [flag for flag in VECTORS if flag in flags],
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
    }
    torch = sys.modules.get("torch")  # a theme that never imports it does not need it here either
    if torch is not None and torch.cuda.is_available():
        made["gpu"] = torch.cuda.get_device_name()
    return made


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(
    theme: str,
    bench: Callable[..., Iterable[Row]],
    argv: Sequence[str] | None = None,
    *,
    works: Sequence[str] = (),
    choose: bool = False,
) -> int:
    """Run a theme: a line per row on standard error, all rows as JSON on standard output or into --json.

    Rows are written as they come, so a run that is cut off keeps what it measured. With `works` there is
    an option --work NAME, and `bench(quick, work)` is called, `work` being None for all of them. With
    `choose` there is --only WORD as well, `bench`'s third argument; such a run leaves the other rows of
    the file as they are.
    """
    if theme not in THEMES:
        raise ValueError(f"unknown theme {theme!r}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{theme}", description=bench.__doc__)
    parser.add_argument("--quick", action="store_true", help="small work, within five minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into FILE")
    if works:
        parser.add_argument("--work", choices=works, help="only this one; default all")
    if choose:
        parser.add_argument("--only", default="", metavar="WORD", help="recipes whose name holds it")
    words = list(sys.argv[1:] if argv is None else argv)
    asked = parser.parse_args(words)
    command = shlex.join(["python", "-m", f"benchmarks.{theme}", *words])
    given = (asked.quick, *([asked.work] if works else []), *([asked.only] if choose else []))
    only = choose and asked.only and asked.json and asked.json.is_file()
    kept: list[dict[str, Any]] = json.loads(asked.json.read_text()) if only else []
    made: list[dict[str, Any]] = []
    for row in bench(*given):
        kept = [other for other in kept if _same(other) != (row.name, row.work, row.metric)]
        made.append(row.filled(theme, command))
        print(_line(made[-1]), file=sys.stderr, flush=True)
        if asked.json:
            _write(asked.json, kept + made)
    if not asked.json:
        print(json.dumps(made, indent=1))
    return 0


def _same(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["name"], row["work"], row["metric"]


def _line(row: Mapping[str, Any]) -> str:
    words = f"{row['name']} [{row['work']}]: {row['value']:,.6g} {row['unit']} ({row['metric']})"
    if row["peer"] is None:
        return words
    if row["peer_value"] is None:
        return f"{words}; {row['peer']} is missing"
    ratio = "" if row["ratio"] is None else f", x{row['ratio']:.2f}"
    return f"{words}; {row['peer']} {row['peer_value']:,.6g}{ratio}"


def _write(path: Path, made: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    os.replace(scratch, path)


def _told(what: str) -> str:
    """What the system says of the first processor; "" where it does not."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(what):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
