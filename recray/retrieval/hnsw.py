"""A navigable small-world graph (Malkov and Yashunin 2018) by faiss, searched by inner product.

Only the links are saved: vectors come from the table, as float32 or rounded to eight bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.errors import ArtefactError, ConfigError
from recray.models.embeddings import Table
from recray.retrieval.index import Found, Index, IndexParams

faiss: Any = _faiss  # its stubs do not know all of it

FILE = "hnsw.faiss"
SCAN_SHARE = 0.1  # a filter that leaves less of the catalogue is scanned, not walked


@dataclass(frozen=True, kw_only=True)
class HnswParams(IndexParams):
    """`links` a node (M), beam widths while building and searching, and how vectors are held."""

    links: int = 32
    ef_construction: int = 100
    ef_search: int = 128
    vectors: Literal["f32", "sq8"] = "f32"
    threads: int = 1  # of one search; building uses one, so that equal tables give equal graphs

    def __post_init__(self) -> None:
        if min(self.links - 1, self.ef_construction, self.ef_search, self.threads) < 1:
            raise ConfigError(f"index_params {self} are out of range", fix="links >= 2, the rest >= 1")


class Hnsw(Index):
    """Approximate; the rows found are scored again from the table, so scores are exact."""

    name = "hnsw"
    Params = HnswParams

    def __init__(self, table: Table, params: HnswParams, graph: Any, storage: Any) -> None:
        super().__init__(table, params)
        self.graph, self.storage = graph, storage  # the storage is kept alive here

    @classmethod
    def over(cls, table: Table, params: HnswParams) -> Hnsw:
        graph = faiss.IndexHNSWFlat(table.dim, params.links, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = params.ef_construction
        dense = table.dense().detach().contiguous().numpy()
        faiss.omp_set_num_threads(1)
        graph.add(dense)
        return cls(table, params, graph, _hold(graph, dense, params))

    @classmethod
    def load(cls, folder: Path, table: Table, params: HnswParams) -> Hnsw:
        path = folder / FILE
        try:
            graph = faiss.read_index(str(path))
        except RuntimeError:
            raise ArtefactError("is not an index that faiss can read", where=path) from None
        if (graph.ntotal, graph.d) != (table.num_rows, table.dim):
            raise ArtefactError(f"links {graph.ntotal} rows, the table has {table.num_rows}", where=path)
        dense = table.dense().detach().contiguous().numpy()
        return cls(table, params, graph, _hold(graph, dense, params))

    def save(self, folder: Path) -> None:
        faiss.write_index(self.graph, str(folder / FILE), faiss.IO_FLAG_SKIP_STORAGE)

    @property
    def nbytes(self) -> int:
        return int(self.graph.hnsw.neighbors.size() * 4 + self.storage.ntotal * self.storage.sa_code_size())

    @torch.inference_mode()
    def search(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        queries_BD = queries_BD.float().contiguous()
        left = self.table.num_rows if allowed is None else int(np.count_nonzero(allowed))
        if left <= max(k, SCAN_SHARE * self.table.num_rows) or not len(queries_BD):
            return self._scanned(queries_BD, k, allowed)
        faiss.omp_set_num_threads(self.params.threads)
        asked = faiss.SearchParametersHNSW(efSearch=max(self.params.ef_search, k))
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            asked.sel = faiss.IDSelectorBitmap(self.table.num_rows, faiss.swig_ptr(bits))
        _, rows_Bk = self.graph.search(queries_BD.numpy(), k, params=asked)
        return self._filled(queries_BD, rows_Bk, k, allowed)  # a filter may cut the graph: the beam runs dry


def _hold(graph: Any, dense: NDArray[np.float32], params: HnswParams) -> Any:
    """Give the graph its vectors and return them; faiss does not own them then."""
    if params.vectors == "sq8":
        kind = faiss.ScalarQuantizer.QT_8bit
        storage = faiss.IndexScalarQuantizer(dense.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        storage.train(dense)
    else:
        storage = faiss.IndexFlat(dense.shape[1], faiss.METRIC_INNER_PRODUCT)
    storage.add(dense)
    if graph.storage is not None and graph.own_fields:
        graph.storage.this.own(False)
    graph.storage, graph.own_fields = storage, False
    return storage
