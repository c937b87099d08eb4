"""Tables in fewer bytes: each codec beside plain int8, faiss's product quantization and a narrower table.

The retriever is iALS on lightgcn_gowalla at the width that its recipe has, 256. What is lost is the mean over
all test users of their NDCG@20 with the table as trained less that with the decoded one, as a share of the
former; its bound is the upper end of the 95 % interval of that paired difference. Users are folded in from
decoded rows, as a bundle does. Bytes are those of the stored arrays, codebooks included. Codecs with `fit`
choose their codes for the users of the training file and what they would be shown; `seconds` is what encoding
took.

Settings were chosen on a fifth of each user's training items, with a table trained on the others (all
users; the interval is +-.3 %): tiers with a head of int8, a middle of 3 floats a code and a tail of 6 lost
.97 % with the lengths of least error, .46 % with those that keep a row's score along itself, .32 % with users
outside of S counting .005 and not .02, .54 % without `fit`. A part of that is no merit of codes: the exact
table gains .69 % where its middle is made 2 % and its tail 8 % longer.

`RECRAY_BENCH` names a folder in which the models are kept from one run to the next.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

from benchmarks._sets import lightgcn_gowalla, there
from benchmarks.rows import Row, usable_cores
from recray.compression.askers import Askers
from recray.compression.codec import encode_table
from recray.data.dataset import Dataset
from recray.errors import ArtefactError
from recray.evaluation import Report, evaluate, model_top_k
from recray.manifest import open_artefact
from recray.models.base import Retriever
from recray.models.embeddings import DenseTable, replace_tables
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.training.run import train

WORK = "lightgcn_gowalla"
RECIPE = "ials@lightgcn_gowalla"
METRIC = "ndcg@20"
ALLOWED = 0.005  # of NDCG, by the bound
CODECS = (
    "tiers:head=int4:fit=1,head_share=0.08,middle=pq:width=4+fit=2,middle_share=0.32,tail=pq:width=6+fit=2",
    "tiers:head=int8,head_share=0.02,middle=pq:width=3+fit=2,middle_share=0.26,tail=pq:width=6+fit=2",
    "tiers:head=int4:fit=1,head_share=0.025,middle=pq:width=8+fit=2,middle_share=0.15,tail=pq:width=32+fit=2",
    "int8",
    "int4",
    "int4:fit=1",
    "pq:width=4",
    "pq:width=4,fit=2",
    "low-rank:share=0.5,values=int8",
    "sparse:share=0.25",
)
FEW = ("int8", "tiers")  # of --quick
PARTS = 64  # of faiss's codes: as many bytes a row as 16 times less than 256 floats
NARROWER = (64, 16)
QUICK_USERS = 3000


@dataclass(frozen=True)
class Asked:
    """The model, what its users got from the table as trained, and who asks for which items how often."""

    data: Dataset
    model: Retriever
    vectors: Tensor  # float32[N, D]
    popularity: Tensor  # float32[N]
    askers: Askers
    whole: Report
    users: int

    @property
    def bytes(self) -> int:
        return self.vectors.numel() * 4

    def measured(self, model: Retriever) -> Report:
        cases = self.data.cases("test")
        return evaluate(model_top_k(model), cases.take(np.arange(min(self.users, len(cases)))), ks=(20,))

    def lost(self, report: Report) -> tuple[float, float]:
        """The share of NDCG that a report is below the table's own, and the upper end of its interval."""
        base = self.whole.means[METRIC]
        lost = self.whole.against(report, METRIC)
        return lost.mean / base, lost.high / base

    def decoded(self, table_ND: Tensor) -> Report:
        """What users get from another table of the same shape."""
        model = copy.deepcopy(self.model)
        replace_tables(model, {"item": DenseTable.of(table_ND)})
        return self.measured(model)


def table_rows(quick: bool) -> Iterator[Row]:
    """Bytes of the retriever's table by codec, and what of NDCG@20 each costs."""
    if not there(WORK):
        return
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        folder = Path(os.environ.get("RECRAY_BENCH", scratch))
        data = lightgcn_gowalla(Path(scratch) / "data")
        asked = ask(data, _model(data, folder, quick), QUICK_USERS if quick else len(data.cases("test")))
        for codec in FEW if quick else CODECS:
            started = time.perf_counter()
            coded = encode_table(codec, asked.vectors, asked.popularity, asked.askers)
            took = time.perf_counter() - started
            yield _row(asked, codec, coded.nbytes, asked.decoded(coded.dense()), took)
        found, size = faiss_pq(asked.vectors, PARTS)
        yield _row(asked, f"peer: faiss PQ{PARTS}", size, asked.decoded(found))
        for dim in () if quick else NARROWER:
            model = _model(data, folder, quick, dim)
            yield _row(asked, f"peer: f32 at d = {dim}", asked.bytes * dim // 256, asked.measured(model))


def ask(data: Dataset, model: Retriever, users: int) -> Asked:
    """Measure the model as it was trained."""
    known = data.histories("train")
    counts = np.bincount(known.items, minlength=data.n_items)
    parts = [model.encode(known.take(some))[:, 0] for some in np.array_split(np.arange(len(known)), 16)]
    nothing, vectors = Report({}, np.empty(0, np.int32)), model.item_vectors().detach()
    askers = Askers.of(torch.cat(parts), known.offsets, known.items, data.n_items, vectors)
    made = Asked(data, model, vectors, torch.from_numpy(counts).float(), askers, nothing, users)
    return replace(made, whole=made.measured(model))


def faiss_pq(table_ND: Tensor, parts: int) -> tuple[Tensor, int]:
    """The table as faiss's product quantization of 8 bits gives it back, and its bytes with codebooks."""
    quantizer = faiss.ProductQuantizer(table_ND.shape[1], parts, 8)
    values = table_ND.numpy()
    quantizer.train(values)
    codes = quantizer.compute_codes(values)
    book = faiss.vector_to_array(quantizer.centroids)
    return torch.from_numpy(quantizer.decode(codes)), codes.nbytes + book.nbytes


def _model(data: Dataset, folder: Path, quick: bool, dim: int = 256) -> Retriever:
    changes = ["train.seed=0", f"options.dim={dim}", *(["options.sweeps=4"] if quick else [])]
    place = folder / f"ials-{dim}{'-quick' if quick else ''}"
    try:
        made = open_artefact(place, "checkpoint")
    except ArtefactError:
        say(f"fitting {RECIPE} at d = {dim}")
        made = train(data, recipe(RECIPE, changes), out=place)
    model = load_model(made)
    assert isinstance(model, Retriever)
    return model


def _row(asked: Asked, name: str, size: int, report: Report, took: float | None = None) -> Row:
    loss, bound = asked.lost(report)
    given = {
        "ndcg_loss": round(loss, 5),
        "ndcg_loss_bound": round(bound, 5),
        "within": bound <= ALLOWED,
        METRIC: round(report.means[METRIC], 5),
        "f32": round(asked.whole.means[METRIC], 5),
        "users": len(report.user_rows),
        "recipe": RECIPE,
        "threads": usable_cores(),
        **({} if took is None else {"seconds": round(took, 1)}),
    }
    return Row(
        name=name, work=WORK, metric="bytes", value=size, unit="bytes", peer="f32 table",
        peer_value=asked.bytes, given=given, seeds=(0,),
    )  # fmt: skip
