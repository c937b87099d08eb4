"""Lists of near rows in a few bits, by faiss: the nearest lists are read, and the best of them scored again.

The lists' centres are found by k-means; a query reads the `probes` lists whose centres score best. In them
rows are coded as their difference from the centre: `pq4` in four bits for two floats, compared many at a
time in the processor's registers (fast scan; Andre, Kermarrec & Le Scouarnec 2015), `sq8` in eight bits a
float. The best `refine` times k by code are scored exactly from the table.

Only the centres and codebooks are saved. Rows are coded anew when the index is opened, since the table has
them: seconds for a million. Made for catalogues where a scan of all is too slow; small ones are scanned.
"""

from __future__ import annotations

import math
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

FILE = "ivf.faiss"
LEAST = 1000  # rows below which everything is scanned
SCAN_SHARE = 0.05  # a filter that leaves less of the catalogue is scanned
MORE = 64  # rows that are scored again beside `refine` times k: a few bits say little of small lists
SAMPLE = 64  # rows a list that the centres are found from
SWEEPS = 10


@dataclass(frozen=True, kw_only=True)
class IvfParams(IndexParams):
    """How many `lists` (0: four times the root of the rows), and how many of them a query reads."""

    lists: int = 0
    probes: int = 32
    codes: Literal["pq4", "sq8"] = "pq4"
    refine: int = 4
    threads: int = 1  # of one search; building uses one, so that equal tables give equal lists

    def __post_init__(self) -> None:
        if self.lists < 0 or min(self.probes, self.refine, self.threads) < 1:
            raise ConfigError(f"index_params {self} are out of range", fix="lists >= 0, the rest >= 1")


class Ivf(Index):
    """Approximate; the rows found are scored again from the table, so scores are exact."""

    name = "ivf"
    Params = IvfParams

    def __init__(self, table: Table, params: IvfParams, lists: Any) -> None:
        super().__init__(table, params)
        self.lists = lists  # None: few rows, which are scanned

    @classmethod
    def over(cls, table: Table, params: IvfParams) -> Ivf:
        if table.num_rows < LEAST:
            return cls(table, params, None)
        faiss.omp_set_num_threads(1)
        dense = _even(table)
        count = min(params.lists or round(4 * math.sqrt(len(dense))), len(dense) // 8)
        found = faiss.Kmeans(
            dense.shape[1],
            count,
            niter=SWEEPS,
            seed=1,
            max_points_per_centroid=SAMPLE,
            min_points_per_centroid=1,
        )
        found.train(dense)
        lists = _empty(found.centroids, params)
        lists.train(dense)
        return cls(table, params, _filled(lists, dense))

    @classmethod
    def load(cls, folder: Path, table: Table, params: IvfParams) -> Ivf:
        if table.num_rows < LEAST:
            return cls(table, params, None)
        path = folder / FILE
        try:
            lists = faiss.read_index(str(path))
        except RuntimeError:
            raise ArtefactError("is not an index that faiss can read", where=path) from None
        if lists.d != table.dim + table.dim % 2:
            raise ArtefactError(f"is for {lists.d} dimensions, the table has {table.dim}", where=path)
        faiss.omp_set_num_threads(1)
        return cls(table, params, _filled(lists, _even(table)))

    def save(self, folder: Path) -> None:
        if self.lists is not None:
            empty = faiss.clone_index(self.lists)
            empty.reset()
            faiss.write_index(empty, str(folder / FILE))

    @property
    def nbytes(self) -> int:
        if self.lists is None:
            return 0
        centres = self.lists.nlist * self.lists.d * 4
        return int(centres + self.lists.ntotal * (self.lists.code_size + 8))

    @torch.inference_mode()
    def search(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        queries_BD = queries_BD.float().contiguous()
        n = self.table.num_rows
        left = n if allowed is None else int(np.count_nonzero(allowed))
        wanted = k * self.params.refine + MORE
        if self.lists is None or left <= max(wanted, SCAN_SHARE * n) or not len(queries_BD):
            return self._scanned(queries_BD, k, allowed)
        faiss.omp_set_num_threads(self.params.threads)
        asked = faiss.SearchParametersIVF(nprobe=self.params.probes)
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            asked.sel = faiss.IDSelectorBitmap(n, faiss.swig_ptr(bits))
        wide_BD = torch.nn.functional.pad(queries_BD, (0, self.lists.d - queries_BD.shape[1]))
        _, rows_BC = self.lists.search(wide_BD.numpy(), wanted, params=asked)
        return self._filled(queries_BD, rows_BC, k, allowed)  # the lists that were read may hold less than k


def _even(table: Table) -> NDArray[np.float32]:
    """The table's rows, with a column of zeros where their width is odd: pq4 codes two floats together."""
    dense_ND = table.dense().detach()
    return torch.nn.functional.pad(dense_ND, (0, table.dim % 2)).contiguous().numpy()


def _empty(centres_LD: NDArray[np.float32], params: IvfParams) -> Any:
    """Lists without rows around these centres."""
    count, dim = centres_LD.shape
    quantizer = _centres(centres_LD, faiss.METRIC_INNER_PRODUCT)
    if params.codes == "pq4":
        made = faiss.IndexIVFPQFastScan(quantizer, dim, count, dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    else:
        kind = faiss.ScalarQuantizer.QT_8bit
        made = faiss.IndexIVFScalarQuantizer(quantizer, dim, count, kind, faiss.METRIC_INNER_PRODUCT)
    quantizer.this.own(False)
    made.own_fields = True
    return made


def _filled(lists: Any, dense_ND: NDArray[np.float32]) -> Any:
    """The lists with every row in that of its nearest centre; queries go by inner product later."""
    near = lists.quantizer
    centres_LD = faiss.rev_swig_ptr(faiss.downcast_index(near).get_xb(), lists.nlist * lists.d).reshape(
        -1, lists.d
    )
    by_distance = _centres(centres_LD.copy(), faiss.METRIC_L2)
    lists.quantizer = by_distance
    lists.add(dense_ND)
    lists.quantizer = near
    return lists


def _centres(centres_LD: NDArray[np.float32], metric: int) -> Any:
    made = faiss.IndexFlat(centres_LD.shape[1], metric)
    made.add(np.ascontiguousarray(centres_LD))
    return made
