"""What the models of a next item share: shifted sequences in, a state a position, a softmax over items.

    L = - sum_{u, t} log softmax_i(<s_ut, v_i>)[item_{u, t + 1}]        s_ut: the state after t items

Every position of a history is an example, so an encoder is run once a history and not once an example
(Hidasi et al. 2016; Kang & McAuley 2018). The softmax is full, or over sampled negatives shared by the
positions of a step. A model is an `Encoder`, and says what else differs.

Shapes: B users, L positions, D dims, P real positions of a batch, S negatives, N items.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data import feed
from recray.data.batches import Negatives, Sampling, SequenceBatch, owned, sequence_batches
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever, seeded
from recray.models.embeddings import DenseTable
from recray.models.losses import sampled_softmax, window_softmax

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


AT_ONCE = 16  # histories encoded at a time: what is worked on then fits a core's cache


class Encoder(nn.Module):
    """Embedded histories -> query vectors: the dense part, exportable with dynamic B and L.

    Sequences are right-padded: padding comes after every real position, so an encoder in which no
    state sees what comes after it needs no mask.
    """

    @abstractmethod
    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The state after every position, [B, L, ...]; padding positions hold nothing of use."""

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """x float32[B, L, D] item vectors oldest first, lengths int64[B] -> queries float32[B, 1, D].

        A user of length 0 gets zeros. L is at least 1 and at most max_len.
        """
        states_BLD = self.states(x_BLD, lengths_B)
        last_B11 = (lengths_B - 1).clamp(min=0).view(-1, 1, 1)
        query_B1D = states_BLD.gather(1, last_B11.expand(-1, 1, states_BLD.shape[2]))
        return query_B1D * (lengths_B > 0).to(query_B1D.dtype).view(-1, 1, 1)


class Sequential(Retriever):
    """Base of the models that encode a history by `network`; a subclass sets it after this `__init__`."""

    gradient = True
    ordered = True  # whether a target is told from what came before it, and not from half of its window
    reads_targets: ClassVar[bool] = False  # whether the full softmax reads the targets' vectors too

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 64
        max_len: int = 50
        dropout: float = 0.2
        loss: Literal["softmax", "sampled"] = "softmax"
        sampling: Sampling = "popularity"  # where the negatives of the sampled softmax come from
        negatives: int = 256  # shared by the positions of a step
        power: float = 1.0  # of the frequency, where sampling is by popularity
        uniform_share: float = 0.0  # of the negatives, drawn uniformly instead

    config: Sequential.Config
    network: Encoder

    def __init__(self, catalogue: Catalogue, config: Sequential.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.dim, config.max_len, config.negatives) < 1:
            raise ConfigError("dim, max_len and negatives must be at least 1", where="options")
        if not (0 <= config.uniform_share <= 1 and 0 <= config.dropout < 1):
            raise ConfigError("uniform_share must lie in [0, 1] and dropout in [0, 1)", where="options")
        if config.power < 0:
            raise ConfigError(f"power is {config.power}, below 0", where="options")
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim, std=0.02)

    # -- training --------------------------------------------------------------------------------
    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[SequenceBatch]:
        c = self.config
        drawn = Negatives(c.negatives, c.sampling, c.power, c.uniform_share)
        return sequence_batches(
            feed.histories(data),
            self.n_items,
            max_len=c.max_len,
            batch_size=batch_size,
            epoch=epoch,
            seed=seed,
            rank=rank,
            world=world,
            negatives=drawn if c.loss == "sampled" else None,
            skip=skip,
            ordered=self.ordered,
        )

    def lookups(self, batch: SequenceBatch) -> dict[str, list[Tensor]]:
        rows = [torch.from_numpy(_real(batch.inputs))]
        if self.reads_targets or self.config.loss == "sampled":
            rows.append(torch.from_numpy(batch.targets[batch.targets >= 0]))
        if self.config.loss == "sampled":
            rows.append(torch.from_numpy(batch.negatives))
        if self.lesson is not None:
            rows.append(self._listed(batch))
        return {"item": rows}

    def loss(self, batch: SequenceBatch) -> Tensor:
        device = self.device
        targets_BL = torch.from_numpy(batch.targets).to(device)
        real = targets_BL >= 0
        targets_P = targets_BL[real]
        with seeded(batch.seed):
            states = self.states(batch)
        told_P = slice(None) if self.ordered else real.nonzero()[:, 0]  # which state each is told from
        others_PS = None
        if self.config.loss == "softmax":
            summed = self.full_softmax(states[told_P], targets_P)
        else:
            negatives_S = torch.from_numpy(batch.negatives).to(device)
            log_q_S = torch.from_numpy(batch.log_q).to(device)
            positive_P, negative_RS = self.scores(states, told_P, targets_P, negatives_S)
            if self.ordered:
                summed = sampled_softmax(positive_P, negative_RS, targets_P, negatives_S, log_q_S)
                if self.lesson is not None:
                    others_PS = negative_RS - log_q_S
            else:
                own_BL = positive_P.new_full(real.shape, -torch.inf).masked_scatter(real, positive_P)
                shut_BS = torch.from_numpy(owned(batch)).to(device)
                others_BS = (negative_RS - log_q_S).masked_fill(shut_BS, -torch.inf)
                summed = window_softmax(own_BL, others_BS)[real].sum()
                if self.lesson is not None:  # as wide as the targets, of which a window has many
                    others_PS = others_BS[told_P]
        if self.lesson is not None:
            summed = self._taught(summed, batch, states[told_P], others_PS)
        return summed / batch.positions

    # -- what a model may do in its own way ------------------------------------------------------
    def states(self, batch: SequenceBatch) -> Tensor:
        """The state at every target of a batch, [P, ...], without an order one of each window, [B, ...].

        They are made a part at a time, as little of it is padding.
        """
        x_RD = self.embedded(torch.from_numpy(_real(batch.inputs)).to(self.device))  # ranks read alike
        made, start = [], 0
        for part in batch.parts():
            rows_BL = part.inputs
            places_R = torch.from_numpy(np.flatnonzero(rows_BL >= 0)).to(self.device)
            stop = start + len(places_R)
            x_BLD = x_RD.new_zeros(rows_BL.size, x_RD.shape[1]).index_copy(0, places_R, x_RD[start:stop])
            states = self.part_states(part, x_BLD.view(*rows_BL.shape, -1))
            made.append(states[torch.from_numpy(part.targets >= 0)] if self.ordered else states)
            start = stop
        return torch.cat(made)

    def embedded(self, rows: Tensor) -> Tensor:
        """What the network is told of items, float32[..., D]."""
        found: Tensor = self.tables["item"](rows)
        return found

    def part_states(self, batch: SequenceBatch, x_BLD: Tensor) -> Tensor:
        """The state at every place of a batch, [B, L, ...], or without an order of each window, [B, ...].

        x: what `embedded` gave for its inputs.
        """
        return self.network.states(x_BLD, torch.from_numpy(batch.lengths).to(self.device))

    def vectors(self, rows: Tensor) -> Tensor:
        """float32[..., D]: some rows of `item_vectors()`, for rows int64[...]."""
        found: Tensor = self.tables["item"](rows)
        return found

    def scores(
        self, states: Tensor, told_P: Tensor | slice, targets_P: Tensor, negatives_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Scores of the targets by states[told_P], float32[P]; by each state of the negatives [R, S])."""
        positive_P = (states[told_P] * self.vectors(targets_P)).sum(-1)
        return positive_P, states @ self.vectors(negatives_S).T

    def full_softmax(self, states: Tensor, targets_P: Tensor) -> Tensor:
        """Summed cross-entropy of each state's target against all items."""
        summed: Tensor = self.tables["item"].full_softmax(states, targets_P)  # type: ignore[operator]
        return summed

    def _listed(self, batch: SequenceBatch) -> Tensor:
        """The items that the teacher speaks of at the real positions, int64[P, M]."""
        assert self.lesson is not None
        real = batch.targets >= 0
        return torch.from_numpy(self.lesson.rows(batch.at[real], batch.targets[real]))

    def _taught(
        self, summed: Tensor, batch: SequenceBatch, states_PD: Tensor, others_PS: Tensor | None
    ) -> Tensor:
        """The summed loss with the teacher's share of it."""
        assert self.lesson is not None
        rows_PM = self._listed(batch).to(self.device)
        listed_PM = (self.tables["item"](rows_PM) @ states_PD.unsqueeze(2)).squeeze(2)
        if others_PS is not None and rows_PM.shape[1]:  # a negative that the teacher lists counts there
            listed = rows_PM[:, 1:].sort(dim=1).values
            drawn_PS = torch.from_numpy(batch.negatives).to(self.device).repeat(len(listed), 1)
            found = torch.searchsorted(listed, drawn_PS).clamp(max=listed.shape[1] - 1)
            others_PS = others_PS.masked_fill(listed.gather(1, found) == drawn_PS, -torch.inf)
        return self.lesson.loss(summed, batch.at[batch.targets >= 0], states_PD, listed_PM, others_PS)

    # -- answering -------------------------------------------------------------------------------
    def inputs(self, histories: Histories) -> tuple[Tensor, ...]:
        """What the network eats: item vectors float32[B, L, D] oldest first, and lengths int64[B]."""
        rows_BL, lengths_B = self.padded(histories)
        return self.embedded(rows_BL), lengths_B

    def padded(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """The newest `max_len` known items of each, right-padded: (rows int64[B, L], lengths int64[B])."""
        histories = histories.known()
        longest = int(histories.lengths.max(initial=0))
        rows, lengths = histories.padded(max(1, min(longest, self.config.max_len)))
        device = self.device
        return torch.from_numpy(rows).to(device), torch.from_numpy(lengths).to(device)

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        if len(histories) <= AT_ONCE:
            queries: Tensor = self.network(*self.inputs(histories))
            return queries
        order = np.argsort(histories.lengths, kind="stable")  # alike in length, so that little is padding
        parts = [order[start : start + AT_ONCE] for start in range(0, len(order), AT_ONCE)]
        found = torch.cat([self.network(*self.inputs(histories.take(part))) for part in parts])
        return found[torch.from_numpy(np.argsort(order)).to(found.device)]


def _real(rows_BL: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those that are no padding, int64[R], row by row."""
    return rows_BL[rows_BL >= 0]
