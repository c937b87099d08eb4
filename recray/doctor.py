"""Look at a machine: would recray work here? Facts come in as arguments where a test must vary them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from recray.errors import RecrayError
from recray.memory import free_memory

GIB = 1 << 30
LEAST_PYTHON = (3, 10)
LEAST_MEMORY, GOOD_MEMORY = 2 * GIB, 6 * GIB
LEAST_DISK, GOOD_DISK = 1 * GIB, 5 * GIB
PACKAGES = ("ray", "torch", "numpy", "pandas", "pyarrow", "scipy", "faiss-cpu", "onnxruntime", "optuna")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what to do about it where it is not well."""

    verdict: Literal["ok", "warn", "fail"]
    name: str
    found: str


def examine(*, ray: bool, port: int) -> list[Check]:
    """Every check, in the order a person would ask."""
    checks = [python(sys.version_info[:3]), *packages(), cores(_cores()), memory(free_memory())]
    checks += [disk(shutil.disk_usage(os.getcwd()).free), gpu(), listening(port)]
    if ray:
        checks.append(ray_starts())
    return checks


def python(version: tuple[int, int, int]) -> Check:
    """The interpreter's version."""
    words = ".".join(map(str, version))
    if version < LEAST_PYTHON:
        return Check("fail", "python", f"{words}; install 3.10 or newer")
    return Check("ok", "python", words)


def packages() -> Iterator[Check]:
    """Whether what the path needs is installed, and which version."""
    for name in PACKAGES:
        try:
            yield Check("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check("fail", name, f"is not installed; pip install {name}")


def cores(count: int) -> Check:
    """Cores this process may use."""
    if count < 2:
        return Check("warn", "cores", f"{count}; two or more let workers run beside each other")
    return Check("ok", "cores", str(count))


def memory(free: int) -> Check:
    """Bytes of memory that are free."""
    words = f"{free / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        return Check("fail", "memory", f"{words}; Ray needs {LEAST_MEMORY // GIB}")
    return Check("warn" if free < GOOD_MEMORY else "ok", "memory", words)


def disk(free: int) -> Check:
    """Bytes of disk that are free in this folder."""
    words = f"{free / GIB:.1f} GiB free here"
    if free < LEAST_DISK:
        return Check("fail", "disk", f"{words}; artefacts and Ray's object store need {LEAST_DISK // GIB}")
    return Check("warn" if free < GOOD_DISK else "ok", "disk", words)


def gpu() -> Check:
    """What the NVIDIA driver says; recray works without one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Check("ok", "gpu", "none; everything runs on the CPU")
    return Check("ok", "gpu", "; ".join(said.strip().splitlines()) or "none")


def listening(port: int) -> Check:
    """Whether a server could listen on 127.0.0.1:port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            return Check("warn", f"port {port}", f"cannot be used ({error}); serve with another --port")
    return Check("ok", f"port {port}", "free")


def ray_starts() -> Check:
    """Start a cluster on this machine (or reach $RAY_ADDRESS) and stop it again."""
    from recray import connect

    try:
        with connect.session() as address:
            return Check("ok", "ray starts", f"answered at {address}")
    except (RecrayError, OSError, RuntimeError, ValueError) as error:
        return Check("fail", "ray starts", " ".join(str(error).split()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
