"""Caser: convolutions over the newest items as over a picture (Tang & Wang 2018, arXiv 1809.07426).

With X the W newest items' vectors, [W, D], oldest first and zeros where a history is shorter:

    o_k   = max_t relu(<F_k, X[t : t + h]> + b_k)      horizontal filters F_k of every height h = 1 ... W
    o~_k  = sum_l w_k[l] X[l]                          vertical filters w_k: weighted sums
    z     = relu(W_1 [o; o~] + b_1)
    score(i) = <W_2 [z; p] + b_2, E[i]>                p = mean of the history

The paper has a user table; here p, the mean of the history's vectors, is what is known of a user in the
long run, so that anyone gets an answer. One table for input and output.

Trained on shifted sequences, not on windows: the convolutions slide once over a whole history, and the
maximum over a window is a maximum over their last outputs. So all positions cost what one window cell
each costs, and a state is what the formulas give for the window that ends there.

Shapes: B users, L positions, D dims, W window, F filters of a height, V vertical filters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.sequential import Encoder, Sequential


class Convolutions(Encoder):
    """Horizontal and vertical filters that end at each position, and the mean up to it."""

    def __init__(self, c: Caser.Config) -> None:
        super().__init__()
        self.scale, self.window, self.dropout = c.dim**0.5, c.window, c.dropout
        self.horizontal = nn.ModuleList(nn.Conv1d(c.dim, c.filters, h + 1) for h in range(c.window))
        self.vertical = nn.Linear(c.window, c.vertical, bias=False)
        self.hidden = nn.Linear(c.window * c.filters + c.vertical * c.dim, c.units)
        self.out = nn.Linear(c.units + c.dim, c.dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        length = x_BLD.shape[1]
        x_BLD = x_BLD * self.scale
        before_BMD = nn.functional.pad(x_BLD, (0, 0, self.window - 1, 0))  # M = L + W - 1
        x_BDM = before_BMD.transpose(1, 2)
        found = []
        for h, filters in enumerate(self.horizontal):
            each_BFM = torch.relu(filters(x_BDM))  # M = L + W - 1 - h
            # in two dimensions, since torch.export takes the length of a max_pool1d for fixed
            best_BF1L = nn.functional.max_pool2d(each_BFM.unsqueeze(2), (1, self.window - h), stride=1)
            found.append(best_BF1L.squeeze(2).transpose(1, 2))
        places = [before_BMD[:, at : at + length] for at in range(self.window)]
        sums_BLDV = self.vertical(torch.stack(places, dim=3))
        mixed = torch.cat([*found, sums_BLDV.flatten(2)], dim=2)
        hidden = torch.relu(self.hidden(nn.functional.dropout(mixed, self.dropout, self.training)))
        count_L1 = torch.arange(1, length + 1, device=x_BLD.device).unsqueeze(1)
        mean_BLD = x_BLD.cumsum(dim=1) / count_L1
        states: Tensor = self.out(torch.cat([hidden, mean_BLD], dim=2))
        return states


class Caser(Sequential):
    """The convolutional classic."""

    name = "caser"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        window: int = 5
        filters: int = 16  # horizontal ones of each height
        vertical: int = 4
        units: int = 64

    config: Caser.Config

    def __init__(self, catalogue: Catalogue, config: Caser.Config) -> None:
        if min(config.window, config.filters, config.vertical, config.units) < 1:
            raise ConfigError("window, filters, vertical and units must be at least 1", where="options")
        super().__init__(catalogue, config)
        self.network = Convolutions(config)
