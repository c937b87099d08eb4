"""Queries a second of ours and of faiss over the same vectors, taken in turns; recall against a float64 scan.

Vectors: `gaussian`, which is hardest for a graph; `trained`, the items of iALS on lightgcn_gowalla with its
users as queries; for a million rows those items many times over, each copy moved by noise, and users moved
likewise. Every searcher gets all queries in one call and as many threads as there are cores. Of those with a
setting (beam, lists read) the quickest that reaches the wanted recall counts; where none does, the recall and
speed of the nearest stand in `given`, and there is nothing to compare with.

`RECRAY_BENCH` names a folder in which the model is kept from one run to the next.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks._sets import lightgcn_gowalla, there
from benchmarks.rows import Row, usable_cores
from recray.errors import ArtefactError
from recray.manifest import open_artefact
from recray.models.base import Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.retrieval.index import Index, build_index
from recray.training.run import train

faiss: Any = _faiss  # its stubs do not know all of it

DIM = 64
QUERIES = 2048
ROUNDS, QUICK_ROUNDS = 15, 5
NOISE = 0.5  # of a copied row, as a share of its length
BEAMS = (32, 64, 128, 256, 512, 1024, 2048)
PROBES = (4, 8, 16, 32, 64, 128, 256)
NEAR = 2.0  # how many times slower than the quickest a setting may be at its first try to be tried again
REFINES = (4, 16)
MILLION = 1_000_000
MOST = 100  # of k
KINDS = ("gaussian", "trained")

Rows = NDArray[np.int64]
Search = Callable[[], Rows]


@dataclass(frozen=True)
class World:
    """Items float32[N, D], queries float32[Q, D], and what they are called."""

    name: str
    items: Tensor
    queries: Tensor

    def best(self, k: int) -> Rows:
        """The true best k of each query, k at most `MOST`."""
        return self._best[:, :k]

    @cached_property
    def _best(self) -> Rows:
        items_ND = self.items.double()
        parts = [(part.double() @ items_ND.T).topk(MOST).indices for part in self.queries.split(64)]
        return torch.cat(parts).numpy()


@dataclass(frozen=True)
class Searcher:
    """One way to search at one setting; `find(k)` answers all queries."""

    name: str
    setting: str
    find: Callable[[int], Rows]
    recall: float = 0.0
    qps: float = 0.0


def scan_rows(quick: bool) -> Iterator[Row]:
    """50k x 64: the exact index beside faiss's flat scan, and its graph at recall .99.

    The graph's settings that miss the recall or are far behind at their first try are not tried again.
    """
    for world in worlds(50_000, quick):
        ours = [exact(world)]
        flat = [faiss_flat(world)]
        graphs = faiss_hnsw(world)
        for k in (10, 100):
            beams = near(in_turns(world, graphs, k, 1), 0.99)
            found = in_turns(world, [*ours, *flat, *beams], k, QUICK_ROUNDS if quick else ROUNDS)
            mine = found[0]
            yield row(world, k, mine, found[1])
            yield row(world, k, mine, chosen(found[2:], min(0.99, mine.recall)), at=0.99)


def million_rows(quick: bool, which: str) -> Iterator[Row]:
    """1M x 64: the best of ours beside the best of faiss at recall .95; not in --quick.

    Settings that miss the recall or are far behind at their first try are not tried again.
    """
    for world in () if quick else worlds(MILLION, quick, which):
        ours = [exact(world), *our_ivf(world)]
        theirs = [*faiss_ivf(world), *faiss_hnsw(world)]
        for k in (10, 100):
            say(f"{world.name}, k = {k}: {len(ours) + len(theirs)} settings")
            first = in_turns(world, [*ours, *theirs], k, 1)
            kept = near(first[: len(ours)], 0.95), near(first[len(ours) :], 0.95)
            found = in_turns(world, [*kept[0], *kept[1]], k, 5)
            mine, other = chosen(found[: len(kept[0])], 0.95), chosen(found[len(kept[0]) :], 0.95)
            yield row(world, k, mine, other, at=0.95)


# -- vectors ---------------------------------------------------------------------------------------
def worlds(n: int, quick: bool, which: str = "") -> Iterator[World]:
    """The vectors that are searched; `which` kind alone, or both."""
    draw = torch.Generator().manual_seed(0)
    name = f"{n // 1000}kx{DIM}"
    if which in ("", "gaussian"):
        yield World(f"{name} gaussian", normal(draw, n), normal(draw, QUERIES))
    if which in ("", "trained") and there("lightgcn_gowalla"):
        items, users = trained(quick)
        at = torch.arange(n) % len(items)
        moved = items[at] + spread(draw, items[at]) * (torch.arange(n) >= len(items)).unsqueeze(1)
        yield World(f"{name} trained", moved, users + spread(draw, users))


def normal(draw: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, DIM, generator=draw)


def spread(draw: torch.Generator, rows: Tensor) -> Tensor:
    """Noise of a share of each row's length."""
    return normal(draw, len(rows)) * (rows.norm(dim=1, keepdim=True) * NOISE * DIM**-0.5)


def trained(quick: bool) -> tuple[Tensor, Tensor]:
    """Items and users of iALS with 64 dimensions; fewer sweeps in --quick."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        folder = Path(os.environ.get("RECRAY_BENCH", scratch))
        data = lightgcn_gowalla(Path(scratch) / "data")
        place = folder / f"ials-{DIM}{'-quick' if quick else ''}"
        try:
            made = open_artefact(place, "checkpoint")
        except ArtefactError:
            say("fitting iALS")
            changes = ["train.seed=0", f"options.dim={DIM}", *(["options.sweeps=4"] if quick else [])]
            made = train(data, recipe("ials@lightgcn_gowalla", changes), out=place)
        model = load_model(made)
        assert isinstance(model, Retriever)
        users = np.random.default_rng(0).permutation(data.n_users)[:QUERIES]
        queries = model.encode(data.histories("train").take(np.sort(users)))[:, 0]
        return model.item_vectors().detach().clone(), queries


# -- searchers -------------------------------------------------------------------------------------
def exact(world: World) -> Searcher:
    index = build_index("exact", world.items, {"threads": usable_cores()})
    return Searcher("exact", "", partial(_ours, index, world.queries))


def our_ivf(world: World) -> list[Searcher]:
    """One index, with several numbers of lists that are read."""
    index: Any = build_index("ivf", world.items, {"threads": usable_cores()})
    made = []
    for probes in PROBES:
        for refine in REFINES:
            same = type(index)(index.table, replace(index.params, probes=probes, refine=refine), index.lists)
            setting = f"probes={probes} refine={refine}"
            made.append(Searcher("ivf", setting, partial(_ours, same, world.queries)))
    return made


def _ours(index: Index, queries: Tensor, k: int) -> Rows:
    return index.search(queries, k)[1]


def faiss_flat(world: World) -> Searcher:
    flat = faiss.IndexFlatIP(DIM)
    flat.add(world.items.numpy())
    return Searcher("faiss-flat", "", lambda k: _faiss_rows(flat, world, k))


def faiss_hnsw(world: World) -> list[Searcher]:
    graph = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 100
    faiss.omp_set_num_threads(usable_cores())
    graph.add(world.items.numpy())
    return [
        Searcher("faiss-hnsw", f"efSearch={beam}", partial(_graph_rows, graph, world, beam)) for beam in BEAMS
    ]


def _graph_rows(graph: Any, world: World, beam: int, k: int) -> Rows:
    return _faiss_rows(graph, world, k, faiss.SearchParametersHNSW(efSearch=max(beam, k)))


def faiss_ivf(world: World) -> list[Searcher]:
    """Its own product quantization by fast scan, refined from float32, as its factory makes it."""
    lists = round(4 * len(world.items) ** 0.5)
    made = faiss.index_factory(DIM, f"IVF{lists},PQ{DIM // 2}x4fs,RFlat", faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(usable_cores())
    values = world.items.numpy()
    made.train(values[: lists * 64])
    made.add(values)
    return [
        Searcher("faiss-ivf", f"nprobe={p} k_factor={r}", partial(_refined_rows, made, world, p, r))
        for p in PROBES
        for r in REFINES
    ]


def _refined_rows(made: Any, world: World, probes: int, refine: int, k: int) -> Rows:
    inner = faiss.SearchParametersIVF(nprobe=probes)
    asked = faiss.IndexRefineSearchParameters(k_factor=refine, base_index_params=inner)
    return _faiss_rows(made, world, k, asked)


def _faiss_rows(index: Any, world: World, k: int, params: Any = None) -> Rows:
    faiss.omp_set_num_threads(usable_cores())
    found: Rows = index.search(world.queries.numpy(), k, params=params)[1]
    return found


# -- measuring -------------------------------------------------------------------------------------
def in_turns(world: World, searchers: Sequence[Searcher], k: int, rounds: int) -> list[Searcher]:
    """The searchers with their recall and the median of their speed."""
    torch.set_num_threads(usable_cores())
    wanted = world.best(k)
    recalls = [recall(searcher.find(k), wanted) for searcher in searchers]  # and warms up
    times: list[list[float]] = [[] for _ in searchers]
    for _ in range(rounds):
        for searcher, taken in zip(searchers, times):
            started = time.perf_counter()
            searcher.find(k)
            taken.append(time.perf_counter() - started)
    speeds = [len(wanted) / statistics.median(taken) for taken in times]
    return [replace(s, recall=r, qps=q) for s, r, q in zip(searchers, recalls, speeds)]


def recall(found: Rows, wanted: Rows) -> float:
    """The share of the true best that were found."""
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, wanted))
    return hits / wanted.size


def near(searchers: Sequence[Searcher], least: float) -> list[Searcher]:
    """Those that reach the recall and are not far behind the quickest of them; where none does, the best."""
    best = chosen(searchers, least)
    reaching = [s for s in searchers if s.recall >= least and s.qps * NEAR >= best.qps]
    return reaching or [best]


def chosen(searchers: Sequence[Searcher], least: float) -> Searcher:
    """The quickest that reaches the recall, else the one of the highest."""
    reaching = [s for s in searchers if s.recall >= least]
    return max(reaching, key=lambda s: s.qps) if reaching else max(searchers, key=lambda s: s.recall)


def row(world: World, k: int, mine: Searcher, peer: Searcher, at: float | None = None) -> Row:
    """One of ours beside one peer; no ratio where the peer misses the recall that is asked for."""
    given = {
        f"recall@{k}": round(mine.recall, 5),
        f"peer_recall@{k}": round(peer.recall, 5),
        "k": k,
        "batch": len(world.queries),
        "threads": usable_cores(),
        "setting": mine.setting,
        "peer_setting": peer.setting,
    }
    if at is not None:
        given["at_recall"] = at
    compared = at is None or peer.recall >= at
    if not compared:
        given["peer_qps"] = peer.qps
    return Row(
        name=f"{mine.name}, k = {k}", work=world.name, metric="qps", value=mine.qps, unit="queries/s",
        peer=peer.name, peer_value=peer.qps if compared else None, given=given,
    )  # fmt: skip
