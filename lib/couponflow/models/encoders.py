"""Encoders: from the states of a history and the candidate to one interest vector per row.

Legend: ``B`` rows, ``T`` padded steps, ``N`` real steps of the batch (packed), ``S`` width of a state, ``R``
width of the interest, ``V`` candidate, ``Q`` query, ``H`` hidden width. A state is a step's input for
``mean_pool``, ``static`` and ``din``, and the state of the first GRU after that step for ``gru``, ``gru_att``
and ``dien``. Everything before an encoder is free of the candidate.
Every encoder gives a row the same vector whatever its padding and, in eval mode, its batch mates.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from couponflow.modelling import ModelConfig
from couponflow.models.attention import Attention
from couponflow.models.layers import GruCell, Packing, masked_max

_STATIC_WIDTH = 128
_NUM_MATCHES = 2
# States start near zero. The usual 1e-5 would blow their differences up to unit size before they mean
# anything, and a small training set is then memorised within a few epochs; grown states are well above this.
_FINAL_NORM_EPS = 1e-2


class Encoded(NamedTuple):
    """``interest`` [B,R]; ``match`` [B,M], how interest and candidate agree, M = ``Encoder.num_matches``."""

    interest: Tensor
    match: Tensor


class Encoder(nn.Module, ABC):
    """Base of the encoders: ``width`` R of the interest, ``num_matches`` M (0 without attention)."""

    width: int
    num_matches: int = 0

    @abstractmethod
    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """Encode packed states; rows without a step and batches without a row are legal."""

    def _with_match(
        self, query_BQ: Tensor, interest_BR: Tensor, score_BT: Tensor, mask_BT: Tensor
    ) -> Encoded:
        """Add, where wanted, query times interest (its channels in the query's space) and the top score."""
        if not self.num_matches:
            return _without_match(interest_BR)
        product_B = (query_BQ * interest_BR[:, : query_BQ.shape[1]]).sum(1)
        top_B = masked_max(score_BT, mask_BT).to(product_B.dtype)
        return Encoded(interest_BR, torch.stack([product_B, top_B], dim=1))


def recurrent(config: ModelConfig) -> bool:
    """Whether the encoder reads the states of a first GRU."""
    return config.encoder in ("gru", "gru_att", "dien")


def build_encoder(config: ModelConfig, state_dim: int, candidate_dim: int) -> Encoder:
    """The encoder that ``config.encoder`` names.

    The first ``candidate_dim`` channels of a step's input lie in the candidate's embedding space.
    """
    match config.encoder:
        case "mean_pool":
            return MeanPool(state_dim)
        case "static":
            return Static(state_dim)
        case "din":
            return Din(config, state_dim, candidate_dim)
        case "gru":
            return LastState(config)
        case "gru_att":
            return GruAttention(config, candidate_dim)
        case "dien":
            return Evolution(config, candidate_dim)


class MeanPool(Encoder):
    """The mean of the states; zeros for an empty history."""

    def __init__(self, state_dim: int) -> None:
        """States of ``state_dim``."""
        super().__init__()
        self.width = state_dim

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        return _without_match(layout.mean(states_NS))


class Static(Encoder):
    """An MLP of the mean: one vector per user, whatever the candidate."""

    def __init__(self, state_dim: int) -> None:
        """States of ``state_dim``."""
        super().__init__()
        self.width = state_dim
        self.mlp = nn.Sequential(
            nn.Linear(state_dim, _STATIC_WIDTH),
            nn.PReLU(),
            nn.Linear(_STATIC_WIDTH, state_dim),
            nn.PReLU(),
        )

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        return _without_match(self.mlp(layout.mean(states_NS)))


class Din(Encoder):
    """Steps summed with the attention of the candidate; zeros for an empty history.

    ``normalise = "sum"`` is the paper's form: it keeps how strongly a history speaks for the candidate.
    Source: DIN, arXiv 1706.06978.
    """

    def __init__(self, config: ModelConfig, state_dim: int, candidate_dim: int) -> None:
        """States of ``state_dim`` that start in the candidate's space."""
        super().__init__()
        self.width = state_dim
        self.num_matches = _NUM_MATCHES if config.match_features else 0
        self.attention = Attention(config, state_dim, candidate_dim, shares_space=True)

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        query_BQ = self.attention.query(candidate_BV)
        weight_N, score_N = self.attention(query_BQ, states_NS, layout, mask_BT)
        interest_BR = layout.unpack(weight_N[:, None] * states_NS).sum(1)
        return self._with_match(query_BQ, interest_BR, layout.unpack(score_N), mask_BT)


class LastState(Encoder):
    """The state of the first GRU after the newest event."""

    def __init__(self, config: ModelConfig) -> None:
        """States of ``config.hidden_dim``."""
        super().__init__()
        self.width = config.hidden_dim
        self.final_norm = _final_norm(config)

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        return _without_match(self.final_norm(layout.final(states_NS)))


class GruAttention(Encoder):
    """A second GRU whose states are summed with the attention of the candidate.

    Source: "two layer GRU attention" of DIEN, arXiv 1809.03672.
    """

    def __init__(self, config: ModelConfig, candidate_dim: int) -> None:
        """States of ``config.hidden_dim``."""
        super().__init__()
        hidden = config.hidden_dim
        self.width = hidden
        self.num_matches = _NUM_MATCHES if config.match_features else 0
        self.second = GruCell(hidden, hidden, "gru")
        self.attention = Attention(config, hidden, candidate_dim, shares_space=False)
        self.final_norm = _final_norm(config)

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        second_NH = self.second(states_NS, layout)
        query_BH = self.attention.query(candidate_BV)
        weight_N, score_N = self.attention(query_BH, second_NH, layout, mask_BT)
        interest_BR = self.final_norm(layout.unpack(weight_N[:, None] * second_NH).sum(1))
        return self._with_match(query_BH, interest_BR, layout.unpack(score_N), mask_BT)


class Evolution(Encoder):
    """A second recurrent layer whose gates read the attention of the candidate; its last state.

    Cell ``gru`` ignores the candidate and has no attention parameters.
    Source: DIEN, arXiv 1809.03672, section "interest evolving layer".
    """

    def __init__(self, config: ModelConfig, candidate_dim: int) -> None:
        """States of ``config.hidden_dim``."""
        super().__init__()
        hidden = config.hidden_dim
        self.width = hidden
        self.attention: Attention | None = None
        if config.cell != "gru":
            self.attention = Attention(config, hidden, candidate_dim, shares_space=False)
            self.num_matches = _NUM_MATCHES if config.match_features else 0
        self.evolution = GruCell(hidden, hidden, config.cell)
        self.final_norm = _final_norm(config)

    def forward(self, states_NS: Tensor, candidate_BV: Tensor, layout: Packing, mask_BT: Tensor) -> Encoded:
        """As in ``Encoder``."""
        if self.attention is None:
            evolved_NH = self.evolution(states_NS, layout)
            return _without_match(self.final_norm(layout.final(evolved_NH)))
        query_BH = self.attention.query(candidate_BV)
        weight_N, score_N = self.attention(query_BH, states_NS, layout, mask_BT)
        evolved_NH = self.evolution(states_NS, layout, weight_N)
        interest_BR = self.final_norm(layout.final(evolved_NH))
        return self._with_match(query_BH, interest_BR, layout.unpack(score_N), mask_BT)


def _final_norm(config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(config.hidden_dim, eps=_FINAL_NORM_EPS) if config.final_norm else nn.Identity()


def _without_match(interest_BR: Tensor) -> Encoded:
    return Encoded(interest_BR, interest_BR.new_zeros(len(interest_BR), 0))
