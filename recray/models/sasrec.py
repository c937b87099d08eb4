"""Self-attentive sequences (Kang & McAuley 2018, arXiv 1808.09781) with the choices that won since.

    x_t = sqrt(D) E[item_t] + P[L - 1 - t]                position counted from the newest
    n   = norm(x);  x = n + Attention(n)                   causal; what is added to is the normed,
    n   = norm(x);  x = n + FFN(n)                         as in the authors' code
    score(i) = <norm(x_last), E[i]>                        one table for input and output

With `gates` a block decides, dimension by dimension, how much of what it found is let in, as in LiGR
(Borisyuk et al. 2025, arXiv 2502.03417); beside a gated FFN and sampled negatives of two kinds that is
the recipe `esasrec` (Tikhonovich et al. 2025, arXiv 2508.06450):

    x   = x + sigmoid(W x + b) * Attention(norm(x))        pre-norm, and the same of the FFN

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
    """One transformer block with causal attention over right-padded sequences.

    Padding comes after every real position, so causality alone keeps it out of them.
    """

    def __init__(self, c: SASRec.Config) -> None:
        super().__init__()
        dim, self.heads, self.dropout = c.dim, c.heads, c.dropout
        usual = dim * 4 if c.ffn == "gelu" else dim * 8 // 3  # equally many parameters
        self.part, hidden = c.head_dim or dim // c.heads, c.ffn_width or usual
        inner = self.heads * self.part
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * inner), nn.Linear(inner, dim)
        self.gate = nn.Linear(dim, hidden) if c.ffn == "gated" else None
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.let_attention, self.let_ffn = (nn.Linear(dim, dim) if c.gates else None for _ in range(2))

    def forward(self, x_BLD: Tensor, causal_LL: Tensor) -> Tensor:
        b, length, _ = x_BLD.shape
        h = self.norm_attention(x_BLD)
        qkv = self.qkv(h).view(b, length, 3, self.heads, self.part)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self._rest(x_BLD, h, self._mixed(q, k, v, causal_LL))

    def last(self, x_BLD: Tensor, last_B1D: Tensor, seen_B11L: Tensor) -> Tensor:
        """The block's output at one position of each user, [B, 1, D]: only that one asks, all answer.

        last int64, the position, expanded over D; seen: which positions are not after it.
        """
        b, length, _ = x_BLD.shape
        h = self.norm_attention(x_BLD)
        inner = self.out.in_features
        weight, bias = self.qkv.weight, self.qkv.bias
        h_B1D = h.gather(1, last_B1D)
        asked = nn.functional.linear(h_B1D, weight[:inner], bias[:inner])
        kv = nn.functional.linear(h, weight[inner:], bias[inner:]).view(b, length, 2, self.heads, self.part)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        q = asked.view(b, 1, self.heads, self.part).transpose(1, 2)
        return self._rest(x_BLD.gather(1, last_B1D), h_B1D, self._mixed(q, k, v, seen_B11L))

    def idle(self, x_BLD: Tensor) -> Tensor:
        """What the block makes of its input if it finds nothing."""
        found: Tensor = self.norm_ffn(self.norm_attention(x_BLD)) if self.let_ffn is None else x_BLD
        return found

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """What each position that asks is told, [B, L, heads * head_dim]. q, k, v [B, heads, L, head_dim]."""
        if torch.compiler.is_exporting():  # a graph's own attention guards every step against empty rows
            found = torch.softmax((q * self.part**-0.5) @ k.transpose(2, 3) + seen, dim=-1) @ v
        else:
            dropout = self.dropout if self.training else 0.0
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
        return found.transpose(1, 2).flatten(2)

    def _rest(self, x_BLD: Tensor, h: Tensor, mixed_BLI: Tensor) -> Tensor:
        """The block after its attention. h: the normed x."""
        x_BLD = self._add(x_BLD, h, self.out(mixed_BLI), self.let_attention)
        h = self.norm_ffn(x_BLD)
        inner = (
            nn.functional.gelu(self.up(h))
            if self.gate is None
            else nn.functional.silu(self.gate(h)) * self.up(h)
        )
        return self._add(x_BLD, h, self.down(inner), self.let_ffn)

    def _add(self, x_BLD: Tensor, h_BLD: Tensor, found_BLD: Tensor, let: nn.Module | None) -> Tensor:
        found_BLD = nn.functional.dropout(found_BLD, self.dropout, self.training)
        return h_BLD + found_BLD if let is None else x_BLD + torch.sigmoid(let(x_BLD)) * found_BLD


class Transformer(Encoder):
    """Positions, blocks, a last norm."""

    def __init__(self, c: SASRec.Config) -> None:
        super().__init__()
        self.scale, self.max_len, self.dropout = c.dim**0.5, c.max_len, c.dropout
        self.positions = normal(c.max_len, c.dim, std=0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        x_BLD, steps = self._placed(x_BLD, lengths_B)
        causal_LL = _mask(steps.unsqueeze(0) <= steps.unsqueeze(1))
        for block in self.blocks:
            x_BLD = block(x_BLD, causal_LL)
        states: Tensor = self.norm(x_BLD)
        return states

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """As `Encoder.forward` has it; what only other positions' states need is not computed."""
        x_BLD, steps = self._placed(x_BLD, lengths_B)
        last_B1D = (lengths_B - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, x_BLD.shape[2])
        causal_LL = _mask(steps.unsqueeze(0) <= steps.unsqueeze(1))
        for block in self.blocks[:-1]:
            x_BLD = block(x_BLD, causal_LL)
        if len(self.blocks):
            seen_BL = _mask(steps < lengths_B.clamp(min=1).unsqueeze(1))
            found_B1D = self.blocks[-1].last(x_BLD, last_B1D, seen_BL[:, None, None])  # type: ignore[operator]
        else:
            found_B1D = x_BLD.gather(1, last_B1D)
        query_B1D: Tensor = self.norm(found_B1D)
        return query_B1D * (lengths_B > 0).to(query_B1D.dtype).view(-1, 1, 1)

    def _placed(self, x_BLD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """(items with their positions, the positions int64[L])."""
        steps = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        age_BL = (lengths_B.unsqueeze(1) - 1 - steps).clamp(0, self.max_len - 1)
        x_BLD = x_BLD * self.scale + nn.functional.embedding(age_BL, self.positions)
        return nn.functional.dropout(x_BLD, self.dropout, self.training), steps


def _mask(seen: Tensor) -> Tensor:
    """As attention takes it; in a graph that is being exported what is added to its logits."""
    return torch.where(seen, 0.0, -1e9) if torch.compiler.is_exporting() else seen


class SASRec(Sequential):
    """The default retriever."""

    name = "sasrec"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        blocks: int = 2
        heads: int = 2
        ffn: Literal["gelu", "gated"] = "gelu"
        gates: bool = False  # on what a block adds
        head_dim: int = 0  # 0 = dim / heads
        ffn_width: int = 0  # neurons of a block; 0 = 4 dim, or 8/3 dim if gated

    config: SASRec.Config

    def __init__(self, catalogue: Catalogue, config: SASRec.Config) -> None:
        if config.heads < 1 or config.blocks < 0:
            raise ConfigError("heads must be at least 1 and blocks at least 0", where="options")
        if min(config.head_dim, config.ffn_width) < 0:
            raise ConfigError("head_dim and ffn_width must be 0, which is as usual, or more", where="options")
        if not config.head_dim and config.dim % config.heads:
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {config.heads} heads")
        super().__init__(catalogue, config)
        self.network = Transformer(config)
