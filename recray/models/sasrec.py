"""Self-attentive sequences (Kang & McAuley 2018, arXiv 1808.09781) with the choices that won since.

    x_t = sqrt(D) E[item_t] + P[L - 1 - t]                position counted from the newest
    x   = x + Attention(norm(x));  x = x + FFN(norm(x))    pre-norm blocks, causal
    score(i) = <norm(x_last), E[i]>                        one table for input and output

Trained on shifted sequences with full or sampled softmax (Klenitskiy & Vasilev 2023, arXiv
2309.07602, show that the loss and not the architecture made the difference to later models).

Shapes: B users, L positions, D dims, H heads, P real positions of a batch, S negatives, N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from recray.data import feed
from recray.data.batches import Negatives, Sampling, SequenceBatch, sequence_batches
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever, seeded
from recray.models.embeddings import DenseTable, normal
from recray.models.losses import sampled_softmax

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class Block(nn.Module):
    """One pre-norm transformer block with causal attention over right-padded sequences.

    Padding comes after every real position, so causality alone keeps it out of them.
    """

    def __init__(self, dim: int, heads: int, ffn: str, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, hidden) if ffn == "gated" else None
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor, causal_LL: Tensor) -> Tensor:
        b, length, dim = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).view(b, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal_LL, dropout_p=dropout)
        x_BLD = x_BLD + self._drop(self.out(mixed.transpose(1, 2).reshape(b, length, dim)))
        h = self.norm_ffn(x_BLD)
        inner = (
            nn.functional.gelu(self.up(h))
            if self.gate is None
            else nn.functional.silu(self.gate(h)) * self.up(h)
        )
        return x_BLD + self._drop(self.down(inner))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Embedded histories -> query vectors: the dense part, exportable with dynamic B and L."""

    def __init__(self, dim: int, blocks: int, heads: int, max_len: int, ffn: str, dropout: float) -> None:
        super().__init__()
        self.scale, self.max_len, self.dropout = dim**0.5, max_len, dropout
        self.positions = normal(max_len, dim, std=0.02)
        hidden = dim * 4 if ffn == "gelu" else dim * 8 // 3  # equally many parameters
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, hidden, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The state after every position, [B, L, D]; padding positions hold nothing of use."""
        steps = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        age_BL = (lengths_B.unsqueeze(1) - 1 - steps).clamp(0, self.max_len - 1)
        x_BLD = x_BLD * self.scale + nn.functional.embedding(age_BL, self.positions)
        x_BLD = nn.functional.dropout(x_BLD, self.dropout, self.training)
        causal_LL = steps.unsqueeze(0) <= steps.unsqueeze(1)
        for block in self.blocks:
            x_BLD = block(x_BLD, causal_LL)
        states: Tensor = self.norm(x_BLD)
        return states

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """x float32[B, L, D] item vectors oldest first, lengths int64[B] -> queries float32[B, 1, D].

        A user of length 0 gets zeros. L is at least 1 and at most max_len.
        """
        states_BLD = self.states(x_BLD, lengths_B)
        last_B11 = (lengths_B - 1).clamp(min=0).view(-1, 1, 1)
        query_B1D = states_BLD.gather(1, last_B11.expand(-1, 1, states_BLD.shape[2]))
        return query_B1D * (lengths_B > 0).to(query_B1D.dtype).view(-1, 1, 1)


class SASRec(Retriever):
    """The default retriever."""

    name = "sasrec"
    gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 64
        blocks: int = 2
        heads: int = 2
        max_len: int = 50
        dropout: float = 0.2
        ffn: Literal["gelu", "gated"] = "gelu"
        loss: Literal["softmax", "sampled"] = "softmax"
        sampling: Sampling = "popularity"  # where the negatives of the sampled softmax come from
        negatives: int = 256  # shared by the positions of a step

    config: SASRec.Config
    network: Encoder

    def __init__(self, catalogue: Catalogue, config: SASRec.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.dim, config.heads, config.max_len, config.negatives) < 1 or config.blocks < 0:
            raise ConfigError("dim, heads, max_len and negatives must be at least 1", where="options")
        if config.dim % config.heads:
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {config.heads} heads")
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim, std=0.02)
        self.network = Encoder(
            config.dim, config.blocks, config.heads, config.max_len, config.ffn, config.dropout
        )

    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[SequenceBatch]:
        c = self.config
        return sequence_batches(
            feed.histories(data),
            self.n_items,
            max_len=c.max_len,
            batch_size=batch_size,
            epoch=epoch,
            seed=seed,
            rank=rank,
            world=world,
            negatives=Negatives(c.negatives, c.sampling) if c.loss == "sampled" else None,
            skip=skip,
        )

    def lookups(self, batch: SequenceBatch) -> dict[str, list[Tensor]]:
        rows = [torch.from_numpy(batch.inputs)]
        if self.config.loss == "sampled":
            rows += [torch.from_numpy(batch.targets[batch.targets >= 0]), torch.from_numpy(batch.negatives)]
        return {"item": rows}

    def loss(self, batch: SequenceBatch) -> Tensor:
        device, table = self.device, self.tables["item"]
        targets_BL = torch.from_numpy(batch.targets).to(device)
        with seeded(batch.seed):
            states_BLD = self.network.states(
                table(torch.from_numpy(batch.inputs).to(device)), torch.from_numpy(batch.lengths).to(device)
            )
        real = targets_BL >= 0
        states_PD, targets_P = states_BLD[real], targets_BL[real]
        if self.config.loss == "softmax":
            summed = table.full_softmax(states_PD, targets_P)  # type: ignore[operator]
        else:
            negatives_S = torch.from_numpy(batch.negatives).to(device)
            summed = sampled_softmax(
                (states_PD * table(targets_P)).sum(-1),
                states_PD @ table(negatives_S).T,
                targets_P,
                negatives_S,
                torch.from_numpy(batch.log_q).to(device),
            )
        mean: Tensor = summed / batch.positions
        return mean

    def inputs(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """What the network eats: item vectors float32[B, L, D] oldest first, and lengths int64[B]."""
        histories = histories.known()
        longest = int(histories.lengths.max(initial=0))
        rows, lengths = histories.padded(max(1, min(longest, self.config.max_len)))
        return self.tables["item"](torch.from_numpy(rows).to(self.device)), torch.from_numpy(lengths).to(
            self.device
        )

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        queries: Tensor = self.network(*self.inputs(histories))
        return queries
