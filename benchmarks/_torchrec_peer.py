"""TorchRec's row-wise sharded table, run in its own environment: `python -m benchmarks._torchrec_peer WORK`.

EmbeddingCollection (or, pooled, EmbeddingBagCollection) under DistributedModelParallel, FBGEMM's kernel
with row-wise Adagrad fused into the backward pass. WORK is `_lookups.Work` as JSON; one process a rank.

With `dedup` ids are deduplicated before they are exchanged. FBGEMM 1.8.0 has no kernel for that on a CPU
(its pull request 4651), so one is put in here: torch.unique, 2 ms a step.
"""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version

import torch
from torch import Tensor

from benchmarks._lookups import START, Lookups, Work, join
from benchmarks._process import Answer, serve

warnings.simplefilter("ignore")  # the peer's own: nothing of ours runs here

KERNELS = torch.library.Library("fbgemm", "IMPL")  # what is put into it is there as long as it is


def unique_ids(sizes: Tensor, tables: Tensor, offsets: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """(lengths, offsets, unique ids, where each id is among them) of one table's ids.

    Which sample a unique id belongs to means nothing, so they are dealt out evenly, as on a GPU.
    """
    found, inverse = torch.unique(ids, return_inverse=True)
    ends = torch.linspace(0, len(found), len(offsets), dtype=torch.float64).long()
    return ends.diff(), ends, found, inverse


def start() -> tuple[Answer, Lookups]:
    """The table of one rank."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    logging.disable(logging.WARNING)
    work = Work.told()
    KERNELS.impl("jagged_unique_indices", unique_ids, "CPU")
    join(work)
    cpu, meta = torch.device("cpu"), torch.device("meta")
    about = {
        "name": "table", "num_embeddings": work.rows, "embedding_dim": work.dim, "feature_names": ["ids"],
        "init_fn": lambda weight: torch.nn.init.constant_(weight, START),
    }  # fmt: skip
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": work.lr, "eps": 1e-8}
    if work.pooled:
        plain = EmbeddingBagCollection(tables=[EmbeddingBagConfig(**about)], device=meta)
        sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    else:
        plain = EmbeddingCollection(tables=[EmbeddingConfig(**about)], device=meta)
        sharder = EmbeddingCollectionSharder(fused_params=fused, use_index_dedup=work.dedup)
    plan = construct_module_sharding_plan(
        plain, {"table": row_wise(compute_kernel="fused")}, sharder=sharder, local_size=work.ranks,
        world_size=work.ranks, device_type="cpu",
    )  # fmt: skip
    holder = torch.nn.ModuleDict({"tables": plain})
    model = DistributedModelParallel(
        holder, env=ShardingEnv.from_process_group(torch.distributed.group.WORLD), device=cpu,
        plan=ShardingPlan(plan={"tables": plan}), sharders=[sharder],
    )  # fmt: skip
    table, grad = model.module["tables"], work.gradient()

    def prepare(ids: Tensor) -> KeyedJaggedTensor:
        lengths = torch.full((len(ids),), work.per, dtype=torch.int64)
        return KeyedJaggedTensor(keys=["ids"], values=ids.flatten(), lengths=lengths)

    def read(ids: KeyedJaggedTensor) -> Tensor:
        found = table(ids)
        return found.values() if work.pooled else found["ids"].values()

    def step(ids: KeyedJaggedTensor) -> None:
        read(ids).backward(grad)  # the update is a part of it

    names = ("torchrec", "fbgemm-gpu-cpu", "torch", "numpy")
    return {"versions": {name: version(name) for name in names}}, Lookups(work, prepare, step, read)


if __name__ == "__main__":
    serve(start)
