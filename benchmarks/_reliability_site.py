"""A server to be hurt: two replicas of every deployment, on one node or cluster/local, and its processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from recray import connect
from recray.bundles.bundle import Bundle
from recray.serving.process import check_free

ROOT = Path(__file__).parents[1]
SPLIT = ("Ingress", "Retriever", "Ranker")


@dataclass(frozen=True)
class Site:
    """One running application: where it listens, who may change it, and the processes it consists of."""

    url: str
    token: str
    name: str
    roots: tuple[int, ...]  # processes whose descendants are the cluster; none: it may be any of this machine

    def pids(self, words: str) -> list[int]:
        """The processes of this cluster whose name begins with `words`, as Ray names its workers."""
        found = [] if self.roots else list(psutil.process_iter())
        for root in self.roots:
            with contextlib.suppress(psutil.Error):
                found += psutil.Process(root).children(recursive=True)
        return sorted({one.pid for one in found if _title(one).startswith(words)})

    def replicas(self, deployment: str) -> list[int]:
        """The replicas of a deployment."""
        return self.pids(f"ray::ServeReplica:{self.name}:{deployment}")

    def memory(self) -> int:
        """Bytes that all replicas hold and share with nobody else."""
        total = 0
        for pid in self.pids(f"ray::ServeReplica:{self.name}:"):
            with contextlib.suppress(psutil.Error):
                total += psutil.Process(pid).memory_full_info().uss
        return total


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def site(
    bundle: Bundle, layout: str, state: str | None = None, cluster: Cluster | None = None
) -> Iterator[Site]:
    """Serve a bundle for the block, two replicas of each deployment; on `cluster`, else on a cluster of its
    own (or at $RAY_ADDRESS)."""
    names = SPLIT if layout == "split" else SPLIT[:1]
    token, name = secrets.token_hex(16), f"reliability-{layout}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recray-site-")))
        (folder / "token").write_text(token)
        args = {"layout": layout, "access_log": False, "admin_token_file": str(folder / "token")}
        options = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
        app = {"args": args, "deployments": [{"name": one, **options} for one in names]}
        config = folder / "serve.yaml"
        config.write_text(yaml.safe_dump({"applications": [app]}))
        stack.enter_context(connect.session(None if cluster is None else cluster.address, num_cpus=4))
        from recray.serving.on_ray import serving

        where = state or str(folder / "state")
        uri = bundle.artefact.place.uri
        url = stack.enter_context(serving(uri, config=str(config), port=0, name=name, state=where))
        own = () if os.environ.get("RAY_ADDRESS") else (os.getpid(),)
        roots = own if cluster is None else tuple(cluster.pids)
        yield Site(url, token, name, roots)


class Cluster:
    """cluster/local in a folder of its own, so that nobody else's is touched."""

    def __init__(self, workers: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="rr-", dir="/tmp")
        self._env = {"RECRAY_CLUSTER": f"{self._folder}/c", "WORKERS": str(workers), "CPUS": "2"}
        self._before: dict[str, str | None] = {}
        self.address = ""

    @property
    def pids(self) -> list[int]:
        """The head's process, then the workers'; each leads a group."""
        file = Path(self._env["RECRAY_CLUSTER"]) / "pids"
        return [int(line) for line in file.read_text().split()]

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def up(self) -> None:
        """Start it, or start it anew where a node of it has ended; this process then speaks to it."""
        told = self._run("up.sh").splitlines()[-1]
        for line in Path(told).read_text().splitlines():
            name, _, value = line.removeprefix("export ").partition("#")[0].strip().partition("=")
            self._before.setdefault(name, os.environ.get(name))
            os.environ[name] = value
        self.address = os.environ["RAY_ADDRESS"]

    def __exit__(self, *_: object) -> None:
        self._run("down.sh")
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill_head(self) -> None:
        """kill -9 of the head node and all that runs on it."""
        os.killpg(self.pids[0], signal.SIGKILL)

    def kill_worker(self) -> None:
        """kill -9 of the newest worker node and all that runs on it."""
        os.killpg(self.pids[-1], signal.SIGKILL)

    def _run(self, script: str) -> str:
        done = subprocess.run(
            [str(ROOT / "cluster" / "local" / script)], env={**os.environ, **self._env}, check=True,
            stdout=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
        return done.stdout.strip()


class Redis:
    """A Redis server that may be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self._port = check_free("127.0.0.1", 0)
        self.url, self._folder = f"redis://127.0.0.1:{self._port}/0", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers. Raises FileNotFoundError where there is no redis-server."""
        words = ["redis-server", "--port", str(self._port), "--bind", "127.0.0.1", "--appendonly", "yes"]
        words += ["--appendfsync", "always", "--dir", str(self._folder), "--save", ""]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                with socket.create_connection(("127.0.0.1", self._port), timeout=1) as line:
                    line.sendall(b"PING\r\n")
                    if line.recv(7) == b"+PONG\r\n":
                        return
            time.sleep(0.02)
        raise TimeoutError("redis-server does not answer")

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


def all_back(site: Site, deployments: Sequence[str], within_s: float = 120) -> bool:
    """Wait until two replicas of each run again."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if all(len(site.replicas(name)) >= 2 for name in deployments):
            return True
        time.sleep(0.2)
    return False
