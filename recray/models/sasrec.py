"""Self-attentive sequences (Kang & McAuley 2018, arXiv 1808.09781) with the choices that won since.

    x_t = sqrt(D) E[item_t] + P[L - 1 - t]                position counted from the newest
    x   = x + Attention(norm(x));  x = x + FFN(norm(x))    pre-norm blocks, causal
    score(i) = <norm(x_last), E[i]>                        one table for input and output

With `gates` a block decides, dimension by dimension, how much of what it found is let in, as in LiGR
(Borisyuk et al. 2025, arXiv 2502.03417); beside a gated FFN and sampled negatives of two kinds that is
the recipe `esasrec` (Tikhonovich et al. 2025, arXiv 2508.06450):

    x   = x + sigmoid(W x + b) * Attention(norm(x))        and the same of the FFN

Trained on shifted sequences with full or sampled softmax (Klenitskiy & Vasilev 2023, arXiv
2309.07602, show that the loss and not the architecture made the difference to later models).

Shapes: B users, L positions, D dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.embeddings import normal
from recray.models.sequential import Encoder, Sequential


class Block(nn.Module):
    """One pre-norm transformer block with causal attention over right-padded sequences.

    Padding comes after every real position, so causality alone keeps it out of them.
    """

    def __init__(self, c: SASRec.Config) -> None:
        super().__init__()
        dim, hidden = c.dim, c.dim * 4 if c.ffn == "gelu" else c.dim * 8 // 3  # equally many parameters
        self.heads, self.dropout = c.heads, c.dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, hidden) if c.ffn == "gated" else None
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.let_attention, self.let_ffn = (nn.Linear(dim, dim) if c.gates else None for _ in range(2))

    def forward(self, x_BLD: Tensor, causal_LL: Tensor) -> Tensor:
        b, length, dim = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).view(b, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal_LL, dropout_p=dropout)
        found = self.out(mixed.transpose(1, 2).reshape(b, length, dim))
        x_BLD = self._add(x_BLD, found, self.let_attention)
        h = self.norm_ffn(x_BLD)
        inner = (
            nn.functional.gelu(self.up(h))
            if self.gate is None
            else nn.functional.silu(self.gate(h)) * self.up(h)
        )
        return self._add(x_BLD, self.down(inner), self.let_ffn)

    def _add(self, x_BLD: Tensor, found_BLD: Tensor, let: nn.Module | None) -> Tensor:
        found_BLD = nn.functional.dropout(found_BLD, self.dropout, self.training)
        return x_BLD + (found_BLD if let is None else torch.sigmoid(let(x_BLD)) * found_BLD)


class Transformer(Encoder):
    """Positions, blocks, a last norm."""

    def __init__(self, c: SASRec.Config) -> None:
        super().__init__()
        self.scale, self.max_len, self.dropout = c.dim**0.5, c.max_len, c.dropout
        self.positions = normal(c.max_len, c.dim, std=0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        steps = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        age_BL = (lengths_B.unsqueeze(1) - 1 - steps).clamp(0, self.max_len - 1)
        x_BLD = x_BLD * self.scale + nn.functional.embedding(age_BL, self.positions)
        x_BLD = nn.functional.dropout(x_BLD, self.dropout, self.training)
        causal_LL = steps.unsqueeze(0) <= steps.unsqueeze(1)
        for block in self.blocks:
            x_BLD = block(x_BLD, causal_LL)
        states: Tensor = self.norm(x_BLD)
        return states


class SASRec(Sequential):
    """The default retriever."""

    name = "sasrec"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        blocks: int = 2
        heads: int = 2
        ffn: Literal["gelu", "gated"] = "gelu"
        gates: bool = False  # on what a block adds

    config: SASRec.Config

    def __init__(self, catalogue: Catalogue, config: SASRec.Config) -> None:
        if config.heads < 1 or config.blocks < 0:
            raise ConfigError("heads must be at least 1 and blocks at least 0", where="options")
        if config.dim % config.heads:
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {config.heads} heads")
        super().__init__(catalogue, config)
        self.network = Transformer(config)
