"""Building blocks of the networks: masked reductions, Dice, packed recurrent cells, scorers, auxiliary loss.

Legend: ``B`` rows, ``T`` padded steps, ``N`` real steps of the batch (packed), ``H`` hidden width, ``D``
input width, ``E`` width of the content part (item and category), ``G`` = 3H gate blocks in the order u, r, c.
Nothing here depends on padding or, in eval mode, on the other rows of the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.models import kernels

Activation = Literal["sigmoid", "prelu", "dice"]
Cell = Literal["augru_paper", "augru_official", "agru", "aigru", "gru"]

#: Of running statistics. A run on a few thousand rows takes a few hundred steps: with the usual .01 they
#: would still be near their start when the first epochs are validated.
MOMENTUM = 0.1

#: Lower edges in days of the gap buckets 1, 2, ...; bucket 0 is younger than a day. About a doubling each,
#: with the weekly and monthly rhythms of shopping on an edge.
GAP_EDGES_DAYS = (1.0, 2.0, 4.0, 7.0, 14.0, 28.0, 56.0, 91.0, 182.0)


# ------------------------------------------------------------------------------------------ masked reductions
def masked_softmax(score: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where ``mask`` is true; masked places are exactly 0.

    Shapes: ``score`` and ``mask`` alike, [..., T]. Empty: an all-masked row gives zeros.
    Numerics: computed in float32 (float64 stays), filled with the lowest finite number, never -inf,
        so half precision and empty rows give no NaN.

    Three scores, the last one padding::

        score [0 ln3 5]  mask [1 1 0]   ->  [.25 .75 0]
    """
    if score.shape[-1] == 0:
        return score
    wide = _at_least_float32(score)
    z = wide.masked_fill(~mask, torch.finfo(wide.dtype).min)
    e = torch.exp(z - z.amax(-1, keepdim=True)) * mask
    return (e / e.sum(-1, keepdim=True).clamp_min(1e-30)).to(score.dtype)


def masked_max(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Greatest value over the real steps of each row, [B]; a row without any gives zero."""
    if value_BT.shape[1] == 0:
        return value_BT.sum(1)
    lowest = value_BT.masked_fill(~mask_BT, torch.finfo(value_BT.dtype).min)
    return lowest.amax(1).masked_fill(~mask_BT.any(1), 0.0)


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


# ---------------------------------------------------------------------------------- normalisation, activation
class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of [B,C] that also takes batches of one and of zero rows while training.

    One row has no variance and no rows have no mean: such a batch is normalised by the running statistics
    and does not change them. Eval always uses the running ones, so a row scored alone = in a batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B,C]."""
        if self.training and input.shape[0] > 1:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class Dice(nn.Module):
    """y = p x + alpha (1 - p) x with p = sigmoid of the normalised x; alpha starts at 0.

    Train: batch statistics over valid positions only; eval: running ones (torch keeps the unbiased variance).
    Source: DIN, arXiv 1706.06978, equation 3.
    """

    def __init__(self, width: int, eps: float = 1e-8, momentum: float = 0.01) -> None:
        """Activate ``width`` channels."""
        super().__init__()
        self.norm = BatchNorm(width, eps=eps, momentum=momentum, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Activate [B,C], or [B,T,C] with ``mask`` [B,T]; padded positions come out as 0."""
        if mask is None:
            p = torch.sigmoid(self.norm(value))
            return p * value + self.alpha * (1 - p) * value
        return torch.zeros_like(value).index_put(tuple(mask.nonzero().unbind(1)), self(value[mask]))


def make_activation(name: Activation, width: int) -> nn.Module:
    """Hidden activation of ``width`` channels; Dice takes valid positions only, so packed ones."""
    match name:
        case "sigmoid":
            return nn.Sigmoid()
        case "prelu":
            return nn.PReLU()
        case "dice":
            return Dice(width, momentum=MOMENTUM)


# ---------------------------------------------------------------------------------------------------- packing
@dataclass(frozen=True, eq=False)
class Packing:
    """Where the N real steps of a batch lie, time-major, longest row first.

    ``row``, ``step`` [N] give row and step of each packed position; step t holds ``sizes[t]`` positions, and
    the rows alive at t are the first ``sizes[t]`` of those alive at t-1. ``last`` is the packed position of
    the last step of each non-empty row ``filled``. ``shape`` is (B, T).
    """

    row: Tensor
    step: Tensor
    sizes: tuple[int, ...]
    last: Tensor
    filled: Tensor
    shape: tuple[int, int]

    @cached_property
    def _place(self) -> Tensor:
        return self.row * self.shape[1] + self.step

    def pack(self, value_BT: Tensor) -> Tensor:
        """Real positions of a [B,T,...] tensor, [N,...]."""
        return value_BT.flatten(0, 1).index_select(0, self._place)

    def unpack(self, value_N: Tensor) -> Tensor:
        """Back to [B,T,...], zeros on padding."""
        rows, steps = self.shape
        padded = value_N.new_zeros(rows * steps, *value_N.shape[1:]).index_copy(0, self._place, value_N)
        return padded.view(rows, steps, *value_N.shape[1:])

    def previous(self, position_P: Tensor) -> Tensor:
        """Packed position of the step before, of positions that are no first step."""
        sizes = torch.tensor(self.sizes, device=position_P.device, dtype=torch.int64)
        return position_P - sizes[self.step[position_P] - 1]

    def select(self, row_R: Tensor) -> tuple["Packing", Tensor]:
        """The packing of the named rows, repeats allowed, and the place here of each of its positions."""
        length_B = torch.bincount(self.row, minlength=self.shape[0])
        chosen = packing(length_B[row_R], self.shape[1])
        position_BT = self.unpack(torch.arange(len(self.row), device=self.row.device))
        return chosen, position_BT[row_R[chosen.row], chosen.step]

    def mean(self, value_ND: Tensor) -> Tensor:
        """Mean over each row's steps, [B,D]; zeros for an empty row."""
        total = kernels.row_sums(_at_least_float32(value_ND), self.sizes)
        return self._by_row((total / (self.step[self.last] + 1)[:, None]).to(value_ND.dtype))

    def final(self, value_ND: Tensor) -> Tensor:
        """Value at each row's last step, [B,D]; zeros for an empty row."""
        return self._by_row(value_ND.index_select(0, self.last))

    def _by_row(self, value: Tensor) -> Tensor:
        """From the non-empty rows, longest first, to all rows in the batch's order."""
        return value.new_zeros(self.shape[0], value.shape[1]).index_copy(0, self.filled, value)


def packing(length_B: Tensor, num_steps: int) -> Packing:
    """Lay out rows of the given lengths (0 is legal) in a batch padded to ``num_steps``."""
    device = length_B.device
    order = torch.argsort(length_B, descending=True, stable=True)
    alive_TB = torch.arange(num_steps, device=device)[:, None] < length_B[order][None, :]
    step, rank = alive_TB.nonzero(as_tuple=True)
    num_alive = alive_TB.sum(1)
    starts = num_alive.cumsum(0) - num_alive
    num_filled = int((length_B > 0).sum())
    filled = order[:num_filled]
    last = starts[length_B[filled] - 1] + torch.arange(num_filled, device=device)
    sizes = tuple(size for size in num_alive.tolist() if size)
    return Packing(order[rank], step, sizes, last, filled, (length_B.shape[0], num_steps))


# -------------------------------------------------------------------------------------------- recurrent cells
class GruCell(nn.Module):
    """A GRU and its four attentional relatives over one parameter set.

    u = sig(W_u x + U_u h + b_u), r = sig(W_r x + U_r h + b_r), c = tanh(W_c x + b_c + r (U_c h + b'_c)),
    h <- h + w (c - h) with write weight w:

        gru  u        aigru  u, with input a x        agru  a
        augru_paper  a u        augru_official  1 - (1 - a)(1 - u)

    ``torch.nn.GRU`` keeps with z = 1 - u: its weights fit after flipping the sign of the z block. The paper
    form writes at most sum(a) <= 1 in all; the official one is close to a plain GRU on long histories.
    Source: DIEN, arXiv 1809.03672, section "interest evolving layer".
    """

    def __init__(self, input_dim: int, hidden_dim: int, cell: Cell = "gru") -> None:
        """Weights uniform in +-1/sqrt(H), biases 0."""
        super().__init__()
        self.cell = cell
        bound = 1 / math.sqrt(hidden_dim)
        self.weight_input = nn.Parameter(torch.empty(3 * hidden_dim, input_dim).uniform_(-bound, bound))
        self.weight_state = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim).uniform_(-bound, bound))
        self.bias_input = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.bias_state = nn.Parameter(torch.zeros(hidden_dim))  # b'_c, inside the reset product

    def step(self, x_BD: Tensor, state_BH: Tensor, attention_B: Tensor | None = None) -> Tensor:
        """One step, written as in the class docstring; ``forward`` is its fast form over whole histories."""
        a = x_BD.new_ones(len(x_BD), 1) if attention_B is None else attention_B[:, None]
        x = a * x_BD if self.cell == "aigru" else x_BD
        x_u, x_r, x_c = F.linear(x, self.weight_input, self.bias_input).chunk(3, -1)
        h_u, h_r, h_c = F.linear(state_BH, self.weight_state).chunk(3, -1)
        u, r = torch.sigmoid(x_u + h_u), torch.sigmoid(x_r + h_r)
        c = torch.tanh(x_c + r * (h_c + self.bias_state))
        return state_BH + _write_weight(self.cell, u, a) * (c - state_BH)

    def forward(self, x_ND: Tensor, layout: Packing, attention_N: Tensor | None = None) -> Tensor:
        """States after every real step, [N,H]; a history starts from zeros and ends at its length.

        ``x_ND`` and ``attention_N`` are packed by ``layout``; cells other than ``gru`` need attention that is
        normalised (raw scores multiply gates and diverge).
        """
        a_N1 = attention_N[:, None] if attention_N is not None and self.cell != "gru" else None
        if a_N1 is None and self.cell != "gru":
            raise ValueError(f"cell {self.cell} needs attention")
        x = x_ND * a_N1 if self.cell == "aigru" and a_N1 is not None else x_ND
        with torch.autocast(x_ND.device.type, enabled=False):  # long products of gates need float32
            dtype = self.weight_state.dtype
            return kernels.gru_states(
                x.to(dtype),
                self.weight_input,
                self.bias_input,
                self.weight_state,
                self.bias_state,
                None if a_N1 is None or self.cell == "aigru" else a_N1.to(dtype),
                layout.sizes,
                self.cell,
            )


def _write_weight(cell: str, u: Tensor, a: Tensor | None) -> Tensor:
    if a is None or cell in ("gru", "aigru"):
        return u
    if cell == "agru":
        return a.expand_as(u)
    return a * u if cell == "augru_paper" else 1 - (1 - a) * (1 - u)


# ---------------------------------------------------------------------------------------------------- scorers
class ScoreMlp(nn.Module):
    """Linear layers with one output, after a first layer given as pre-activation."""

    def __init__(
        self, dims: Sequence[int], last_bias: bool = True, activation: Activation = "sigmoid"
    ) -> None:
        """``dims`` are the hidden widths."""
        super().__init__()
        hidden = [nn.Linear(before, after) for before, after in pairwise(dims)]
        self.layers = nn.ModuleList([*hidden, nn.Linear(dims[-1], 1, bias=last_bias)])
        self.activations = nn.ModuleList(make_activation(activation, width) for width in dims)

    def forward(self, first_NW: Tensor) -> Tensor:
        """Scores [N] of the first layer's pre-activations [N, dims[0]]."""
        value = first_NW
        for activate, layer in zip(self.activations, self.layers, strict=True):
            value = layer(activate(value))
        return value[:, 0]

    def tail(self) -> list[Tensor | None]:
        """Weight and bias, or None, of each layer, as the kernels take them."""
        layers = cast(Sequence[nn.Linear], self.layers)
        return [value for layer in layers for value in (layer.weight, layer.bias)]


class PairScorer(Protocol):
    """Sum of the losses of pairs: half of softplus(-f(h, e)) + softplus(f(h, n)), with logits f."""

    def __call__(
        self, state_NH: Tensor, behaviour_NE: Tensor, negative_NE: Tensor, before_P: Tensor, after_P: Tensor
    ) -> Tensor:
        """Pair p meets the state at ``before_P[p]`` with behaviour and negative at ``after_P[p]``."""
        ...


class MlpScorer(nn.Module):
    """f(h, e) = MLP([h, e]), sigmoid hidden units; the state's share of the first layer is computed once."""

    def __init__(self, state_dim: int, behaviour_dim: int, dims: Sequence[int]) -> None:
        """``dims`` are the hidden widths."""
        super().__init__()
        self.first_state = nn.Linear(state_dim, dims[0])
        self.first_behaviour = nn.Linear(behaviour_dim, dims[0], bias=False)
        self.rest = ScoreMlp(dims)

    def forward(
        self, state_NH: Tensor, behaviour_NE: Tensor, negative_NE: Tensor, before_P: Tensor, after_P: Tensor
    ) -> Tensor:
        """Sum of the losses, as in ``PairScorer``."""
        with torch.autocast(state_NH.device.type, enabled=False):
            dtype = self.first_state.weight.dtype
            state, behaviour, negative = (value.to(dtype) for value in (state_NH, behaviour_NE, negative_NE))
            return kernels.pair_losses(
                state,
                behaviour,
                negative,
                before_P,
                after_P,
                self.first_state.weight,
                self.first_state.bias,
                self.first_behaviour.weight,
                self.rest.tail(),
            )


class DotScorer(nn.Module):
    """f(h, e) = P h . e (the paper's form); P is the identity when the widths agree."""

    def __init__(self, state_dim: int, behaviour_dim: int) -> None:
        """States and behaviours of these widths."""
        super().__init__()
        same = state_dim == behaviour_dim
        self.project = nn.Identity() if same else nn.Linear(state_dim, behaviour_dim, bias=False)

    def forward(
        self, state_NH: Tensor, behaviour_NE: Tensor, negative_NE: Tensor, before_P: Tensor, after_P: Tensor
    ) -> Tensor:
        """Sum of the losses, as in ``PairScorer``."""
        projected = self.project(state_NH.index_select(0, before_P))
        positive, negative = (
            _at_least_float32((projected * value.index_select(0, after_P)).sum(-1))
            for value in (behaviour_NE, negative_NE)
        )
        return 0.5 * (F.softplus(-positive) + F.softplus(negative)).sum()


def auxiliary_sum(
    scorer: PairScorer,
    layout: Packing,
    state_NH: Tensor,
    behaviour_NE: Tensor,
    negative_NE: Tensor,
    drawn_N: Tensor,
) -> Tensor:
    """Score how well each state tells the next behaviour from a sampled negative.

    Shapes: all packed by ``layout``; ``state_NH`` state after each step; ``behaviour_NE``, ``negative_NE``
        embeddings of the true and the sampled item of each step; ``drawn_N`` true where a negative was drawn.
        Returns the sum of losses, a scalar: the mean over ``Batch.num_pairs`` is taken after the
        all-reduce, because a mean of rank means is another number.
    Rule: state t meets step t+1; a pair costs half of (cross entropy of the positive as 1 + of the negative
        as 0) and counts iff ``drawn_N`` holds at t+1.
    Empty: no valid pair gives sum 0 with a gradient path.
    Numerics: logits throughout; a negative with logit 40 costs 20, not infinity.
    Source: DIEN, arXiv 1809.03672; the half is ours.

    H = 1, inner product, two users with 3 and 2 real steps (``.`` is padding or unused)::

        state [1 2 .]  behaviour [. 1 1]  negative [. -1 0]    logits + [1 2]  - [-1 0]
        state [1 . .]  behaviour [. 2 .]  negative [.  0 .]    logits + [2]    - [0]    -> 1.133337, 3 pairs
    """
    after_P = (drawn_N & (layout.step > 0)).nonzero()[:, 0]
    return scorer(state_NH, behaviour_NE, negative_NE, layout.previous(after_P), after_P)


# ------------------------------------------------------------------------------------------------- embeddings
class Embedding(nn.Embedding):
    """``nn.Embedding`` with a faster backward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed ids of any shape, [..., width]."""
        return kernels.lookup(self.weight, input, self.padding_idx)


class GapEmbedding(nn.Module):
    """Embeds the age of an event, bucketed at ``GAP_EDGES_DAYS`` (an edge belongs to the older bucket)."""

    edges: Tensor

    def __init__(self, width: int) -> None:
        """Embeddings of ``width``, one per bucket."""
        super().__init__()
        self.embedding = Embedding(len(GAP_EDGES_DAYS) + 1, width)
        edges = torch.log1p(torch.tensor(GAP_EDGES_DAYS, dtype=torch.float64)).float()
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, gap_N: Tensor) -> Tensor:
        """Embed log1p(age in days), [N, width]."""
        return cast(Tensor, self.embedding(torch.bucketize(gap_N, self.edges.to(gap_N.dtype), right=True)))


def embed_set(embedding: nn.Embedding, ids_BK: Tensor) -> Tensor:
    """Sum of the members' embeddings, [B, width]; id 0 contributes nothing, whatever row 0 holds.

    A bag, because a campaign may name thousands of items: no [B,K,width] tensor is built.
    """
    if ids_BK.numel() == 0:  # a bag needs a member; this keeps the gradient path
        return cast(Tensor, embedding(ids_BK).sum(1))
    return F.embedding_bag(ids_BK, embedding.weight, mode="sum", padding_idx=0)
