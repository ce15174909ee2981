"""How much each step of a history counts for the candidate: scorers, and weights made of their scores.

Legend: ``B`` rows, ``T`` padded steps, ``N`` real steps of the batch (packed), ``S`` width of a state, ``V``
candidate, ``Q`` query, ``H`` hidden width.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.modelling import ModelConfig
from couponflow.models import kernels
from couponflow.models.layers import Activation, Packing, ScoreMlp, masked_softmax

# A sigmoid starts low, so that a step has to earn its weight: attentional cells forget what they write over.
_SIGMOID_START = -1.0


class AttentionScorer(nn.Module):
    """score = MLP([q, h, q - h, q h, more]), where a state is [h, more] and h has the query's width.

    The first layer is split, which is exact: (W_q + W_d) q once per row, (W_h - W_d) h + W_p (q h) per step.
    Source: DIN's activation unit (arXiv 1706.06978) as DIEN's code uses it.
    """

    def __init__(
        self, width: int, dims: Sequence[int], num_more: int = 0, activation: Activation = "sigmoid"
    ) -> None:
        """Queries of ``width``, states of ``width + num_more``; ``dims`` are the hidden widths."""
        super().__init__()
        self.width, self.activation = width, activation
        self.first = nn.Linear(4 * width + num_more, dims[0])
        self.rest = ScoreMlp(dims, last_bias=False, activation=activation)  # a softmax ignores constants

    def forward(self, query_BQ: Tensor, state_NS: Tensor, row_N: Tensor) -> Tensor:
        """Raw scores [N] of packed states, each against the query of its row."""
        shared, by_more = self.first.weight.tensor_split([4 * self.width], dim=1)
        by_query, by_state, by_difference, by_product = shared.chunk(4, dim=1)
        by_step = torch.cat([by_state - by_difference, by_more], dim=1)
        if self.activation == "sigmoid":
            with torch.autocast(state_NS.device.type, enabled=False):
                query, state = (value.to(self.first.weight.dtype) for value in (query_BQ, state_NS))
                per_row = F.linear(query, by_query + by_difference, self.first.bias)
                tail = self.rest.tail()
                return kernels.attention_scores(per_row, query, state, row_N, by_step, by_product, tail)
        per_row = F.linear(query_BQ, by_query + by_difference, self.first.bias)
        product = F.linear(query_BQ[row_N] * state_NS[:, : self.width], by_product)
        return cast(Tensor, self.rest(per_row[row_N] + F.linear(state_NS, by_step) + product))


class BilinearScorer(nn.Module):
    """score = h . q / sqrt(H); with q = W v it is the form of the DIEN paper but for the scale."""

    def forward(self, query_BH: Tensor, state_NH: Tensor, row_N: Tensor) -> Tensor:
        """Raw scores [N] of packed states, each against the query of its row."""
        return (query_BH[row_N] * state_NH).sum(1) / math.sqrt(max(state_NH.shape[1], 1))


class Attention(nn.Module):
    """Weight of every step for the candidate: a score, then softmax, sigmoid or nothing.

    Scores, with v the candidate and h a state::

        mlp       MLP([q, h, q - h, q h]), q = PReLU(W v + b); q = v where a state starts in v's space
        bilinear  h . W v / sqrt(S)

    Source: DIN (arXiv 1706.06978) and DIEN (arXiv 1809.03672).
    """

    def __init__(self, config: ModelConfig, state_dim: int, candidate_dim: int, shares_space: bool) -> None:
        """``shares_space``: the first ``candidate_dim`` channels of a state lie in the candidate's space."""
        super().__init__()
        dims, activation = config.attention_dims, config.attention_activation
        self.query: nn.Module
        self.scorer: nn.Module
        if config.attention == "bilinear":
            self.query = nn.Linear(candidate_dim, state_dim, bias=False)
            self.scorer = BilinearScorer()
        elif shares_space:
            self.query = nn.Identity()
            self.scorer = AttentionScorer(candidate_dim, dims, state_dim - candidate_dim, activation)
        else:
            self.query = nn.Sequential(nn.Linear(candidate_dim, state_dim), nn.PReLU())
            self.scorer = AttentionScorer(state_dim, dims, activation=activation)
        self.normalise = config.normalise
        self.offset: nn.Parameter | None = None  # a softmax ignores it
        if config.normalise != "softmax":
            start = _SIGMOID_START if config.normalise == "sigmoid" else 0.0
            self.offset = nn.Parameter(torch.full((1,), start))

    def forward(
        self, query_BQ: Tensor, states_NS: Tensor, layout: Packing, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights [N] and raw scores [N] of packed states; ``query_BQ`` is ``query`` of the candidates."""
        score_N = cast(Tensor, self.scorer(query_BQ, states_NS, layout.row))
        if self.offset is not None:
            score_N = score_N + self.offset
        match self.normalise:
            case "softmax":
                return layout.pack(masked_softmax(layout.unpack(score_N), mask_BT)), score_N
            case "sigmoid":
                return torch.sigmoid(score_N), score_N
            case "sum":
                return score_N, score_N
