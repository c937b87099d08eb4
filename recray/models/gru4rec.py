"""GRU4Rec: a recurrent network over the history (Hidasi et al. 2016, arXiv 1511.06939).

    z_t = sigmoid(W_z x_t + U_z h_{t-1} + b_z)      r_t = sigmoid(W_r x_t + U_r h_{t-1} + b_r)
    h_t = z_t * h_{t-1} + (1 - z_t) * tanh(W x_t + b + r_t * (U h_{t-1} + b'))
    score(i) = <W_o h_t + b_o, E[i]>,               x_t = sqrt(D) E[item_t]

One table for input and output ("constrained embedding"), and instead of the paper's session-parallel
batches and pairwise losses whole sequences and a softmax, as Hidasi & Karatzoglou 2018 (arXiv
1706.03847) and Petrov & Macdonald 2022 found better.

Shapes: B users, L positions, D dims, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.sequential import Encoder, Sequential


class Recurrent(Encoder):
    """Layers of gated recurrent units, and a linear map back to the items' dimensions."""

    def __init__(self, c: GRU4Rec.Config) -> None:
        super().__init__()
        self.scale, self.dropout = c.dim**0.5, c.dropout
        between = c.dropout if c.layers > 1 else 0.0
        self.gru = nn.GRU(c.dim, c.units, c.layers, batch_first=True, dropout=between)
        self.out = nn.Linear(c.units, c.dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        h_BLH, _ = self.gru(self._drop(x_BLD * self.scale))
        states: Tensor = self.out(self._drop(h_BLH))
        return states

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class GRU4Rec(Sequential):
    """The recurrent classic."""

    name = "gru4rec"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        units: int = 128
        layers: int = 1

    config: GRU4Rec.Config

    def __init__(self, catalogue: Catalogue, config: GRU4Rec.Config) -> None:
        if min(config.units, config.layers) < 1:
            raise ConfigError("units and layers must be at least 1", where="options")
        super().__init__(catalogue, config)
        self.network = Recurrent(config)
