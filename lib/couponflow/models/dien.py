"""The network: embedded histories, an encoder of ``models.encoders``, and a head beside the aggregates.

DIEN, the default, extracts interests by a GRU with an auxiliary loss and lets them evolve in an attentional
GRU; the simpler encoders share all of it but what ``model.encoder`` names.

Legend: ``B`` rows, ``N`` real steps of the batch (packed), ``H`` hidden width, ``D`` width of a step's input,
``E`` content part (item and category), ``V`` candidate, ``F`` wide features. Only real steps are computed.
Source: arXiv 1809.03672; target sets, aggregates beside the sequence and the wide term are ours.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from couponflow.errors import ConfigError
from couponflow.lake import layouts
from couponflow.modelling import ModelConfig
from couponflow.models.batch import Batch, Targets
from couponflow.models.encoders import build_encoder, recurrent
from couponflow.models.layers import (
    MOMENTUM,
    Dice,
    DotScorer,
    Embedding,
    GapEmbedding,
    GruCell,
    MlpScorer,
    Packing,
    auxiliary_sum,
    embed_set,
    packing,
)

_EMBEDDING_SD = 0.05
_LAST_GAIN = 0.1
#: Places with an embedding of their own, counted from the newest event; older ones share the last.
_NUM_POSITIONS = 128


class Output(NamedTuple):
    """What a forward pass returns; means are taken by the caller after summing over ranks.

    ``logits`` float32 [B]; ``aux_sum`` scalar sum of auxiliary losses over ``Batch.num_pairs`` pairs.
    """

    logits: Tensor
    aux_sum: Tensor


class Histories(NamedTuple):
    """What the network makes of histories before it knows what they are asked.

    ``layout`` and ``mask`` [B,T] of the real steps, ``states`` [N,S] what the encoder reads, ``mean`` [B,D]
    of the steps' inputs.
    """

    layout: Packing
    mask: Tensor
    states: Tensor
    mean: Tensor

    def select(self, row_R: Tensor) -> "Histories":
        """The histories of the named rows, repeats allowed."""
        layout, position_N = self.layout.select(row_R)
        return Histories(layout, self.mask[row_R], self.states[position_N], self.mean[row_R])


class Dien(nn.Module):
    """The network of one ``ModelConfig``.

    Input of a step: item, category, shop, event type and gap bucket embeddings, and one of its place if
    ``position_dim``. Candidate: masked mean over the members of the target of item, category and shop
    embeddings, shared with the history; an absent field contributes zero. The auxiliary loss belongs to the
    first GRU, so encoders without one have none.

    Head: the concatenation is not normalised. Aggregates are standardised already, and batch normalisation
    would lift the still meaningless embeddings to their size.

    Initialisation: embeddings N(0, .05) with row 0 zero, linear layers Xavier-uniform with zero bias, the
    last layer a tenth of that, the linear term of the aggregates zero.
    """

    wide_mean: Tensor
    wide_sd: Tensor

    def __init__(self, config: ModelConfig, vocabulary_sizes: Mapping[str, int], num_wide: int) -> None:
        """Build the network.

        ``vocabulary_sizes`` is the number of ids per field of ``layouts.VOCABULARY_FIELDS``, PAD and OOV
        included; ``num_wide`` the number of aggregates.
        """
        super().__init__()
        self.config = config
        sizes = {name: vocabulary_sizes[name] for name in layouts.VOCABULARY_FIELDS}
        content, hidden = config.item_dim + config.category_dim, config.hidden_dim
        candidate = content + config.shop_dim
        step = candidate + config.type_dim + config.gap_dim + config.position_dim

        self.item = Embedding(sizes["item"], config.item_dim, padding_idx=0)
        self.category = Embedding(sizes["category"], config.category_dim, padding_idx=0)
        self.shop = Embedding(sizes["shop"], config.shop_dim, padding_idx=0)
        self.event_type = Embedding(sizes["event_type"], config.type_dim, padding_idx=0)
        self.gap = GapEmbedding(config.gap_dim)

        self.position: nn.Embedding | None = None
        if config.position_dim:
            self.position = Embedding(_NUM_POSITIONS, config.position_dim)

        self.extraction: GruCell | None = None
        self.auxiliary: MlpScorer | DotScorer | None = None
        if recurrent(config):
            self.extraction = GruCell(step, hidden, "gru")
            if config.auxiliary_weight > 0 and config.auxiliary_scorer == "mlp":
                self.auxiliary = MlpScorer(hidden, content, config.auxiliary_dims)
            elif config.auxiliary_weight > 0:
                self.auxiliary = DotScorer(hidden, content)
        self.encoder = build_encoder(config, step if self.extraction is None else hidden, candidate)

        self.project_interest = nn.Linear(self.encoder.width, candidate, bias=False)
        self.project_mean = nn.Linear(step, candidate, bias=False)
        self.register_buffer("wide_mean", torch.zeros(num_wide))
        self.register_buffer("wide_sd", torch.ones(num_wide))
        width = 3 * candidate + self.encoder.width + self.encoder.num_matches + step + num_wide
        layers: list[nn.Module] = []
        for after in config.head_dims:
            layers += [nn.Linear(width, after), Dice(after, momentum=MOMENTUM), nn.Dropout(config.dropout)]
            width = after
        self.head = nn.Sequential(*layers)
        self.last = nn.Linear(width, 1)
        self.wide_linear = nn.Linear(num_wide, 1, bias=False) if config.wide_skip else None
        self._initialise()

    def forward(self, batch: Batch) -> Output:
        """Logits of P(conversion given send), and the auxiliary loss while training.

        A row's logit does not depend on padding or, in eval mode, on other rows. Empty histories, targets
        without members and batches of zero or one row are legal; zero rows give zero sums with a gradient
        path to every parameter. In eval mode the auxiliary sum is 0.
        """
        histories, content = self._read(batch)
        aux_sum = histories.states.new_zeros(())
        if self.training and self.auxiliary is not None:
            aux_sum = self._auxiliary(batch, histories, content)
        return Output(self.judge(histories, batch.targets), aux_sum)

    def read(self, batch: Batch) -> Histories:
        """What every target of a user shares: only the histories of the batch are looked at."""
        return self._read(batch)[0]

    def judge(self, histories: Histories, targets: Targets) -> Tensor:
        """Logits [B] of each row's target for the history of the same row."""
        layout, mean = histories.layout, histories.mean
        candidate = self._candidate(targets)
        interest, match = self.encoder(histories.states, candidate, layout, histories.mask)
        wide = (targets.wide.to(self.wide_mean.dtype) - self.wide_mean) / self.wide_sd
        features = [
            candidate,
            interest,
            candidate * self.project_interest(interest),
            mean,
            candidate * self.project_mean(mean),
            wide,
            match,
        ]
        logits = cast(Tensor, self.last(self.head(torch.cat(features, dim=1)))[:, 0])
        if self.wide_linear is not None:
            logits = logits + self.wide_linear(wide)[:, 0]
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.inference_mode()
    def attention(self, batch: Batch) -> Tensor | None:
        """How much each step counts for the candidate, [B,T], 0 on padding; None without an attention.

        The weights that scoring uses: with ``model.normalise = "softmax"`` those of a row add up to 1.
        """
        attention = getattr(self.encoder, "attention", None)
        if attention is None:
            return None
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Any, ...], found: tuple[Tensor, Tensor]) -> None:
            seen.append(given[2].unpack(found[0]))

        handle, was_training = attention.register_forward_hook(keep), self.training
        self.eval()
        try:
            self(batch)
        finally:
            handle.remove()
            self.train(was_training)
        return seen[0]

    def embeddings(self) -> dict[str, nn.Embedding]:
        """The table of each field of the vocabulary."""
        return {
            "item": self.item,
            "category": self.category,
            "shop": self.shop,
            "event_type": self.event_type,
        }

    def set_wide_statistics(self, mean: Tensor, sd: Tensor) -> None:
        """Store mean and standard deviation of the aggregates of the training rows; sd 0 counts as 1."""
        with torch.no_grad():
            self.wide_mean.copy_(mean)
            self.wide_sd.copy_(torch.where(sd == 0, torch.ones_like(sd), sd))

    def set_base_rate(self, rate: float) -> None:
        """Start the last bias at the logit of the training base rate; 0 and 1 are moved inside."""
        inside = min(max(rate, 1e-6), 1 - 1e-6)
        nn.init.constant_(self.last.bias, math.log(inside / (1 - inside)))

    def set_wide_linear(self, coef: Tensor, intercept: float) -> None:
        """Start at a logistic regression on the standardised aggregates, so that the sequence adds to it.

        ``coef`` [F] belongs to aggregates standardised with the stored statistics; ``intercept`` replaces the
        base rate. On a few thousand rows the linear term would need many epochs to get there by itself.

        Raises:
            ConfigError: the model has no linear term.
        """
        if self.wide_linear is None:
            raise ConfigError("a network without model.wide_skip has no linear term to start; set it to true")
        with torch.no_grad():
            self.wide_linear.weight.copy_(coef[None, :])
        nn.init.constant_(self.last.bias, intercept)

    def _candidate(self, targets: Targets) -> Tensor:
        is_member = (targets.cand_item > 0) | (targets.cand_category > 0) | (targets.cand_shop > 0)
        parts = [
            embed_set(self.item, targets.cand_item),
            embed_set(self.category, targets.cand_category),
            embed_set(self.shop, targets.cand_shop),
        ]
        return torch.cat(parts, dim=1) / is_member.sum(1, keepdim=True).clamp_min(1)

    def _read(self, batch: Batch) -> tuple[Histories, Tensor]:
        """The histories, and the content part [N,E] of their steps."""
        layout = packing(batch.length, batch.hist_item.shape[1])
        content, steps = self._steps(batch, layout)
        states = steps if self.extraction is None else self.extraction(steps, layout)
        return Histories(layout, batch.mask, states, layout.mean(steps)), content

    def _steps(self, batch: Batch, layout: Packing) -> tuple[Tensor, Tensor]:
        """Content part [N,E] and full input [N,D] of every real step."""
        content = self._content(layout.pack(batch.hist_item), layout.pack(batch.hist_category))
        parts = [
            content,
            self.shop(layout.pack(batch.hist_shop)),
            self.event_type(layout.pack(batch.hist_type)),
            self.gap(layout.pack(batch.hist_gap)),
        ]
        if self.position is not None:
            place = batch.length[layout.row] - 1 - layout.step
            parts.append(self.position(place.clamp_max(_NUM_POSITIONS - 1)))
        return content, torch.cat(parts, dim=1)

    def _content(self, item: Tensor, category: Tensor) -> Tensor:
        return torch.cat([self.item(item), self.category(category)], dim=-1)

    def _auxiliary(self, batch: Batch, histories: Histories, content_NE: Tensor) -> Tensor:
        assert self.auxiliary is not None
        layout = histories.layout
        item_N, category_N = layout.pack(batch.neg_item), layout.pack(batch.neg_category)
        negative_NE = self._content(item_N, category_N)
        drawn_N = (item_N > 0) | (category_N > 0)
        return auxiliary_sum(self.auxiliary, layout, histories.states, content_NE, negative_NE, drawn_N)

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_EMBEDDING_SD)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Training starts near the linear model of the aggregates: the deep part begins small.
        nn.init.xavier_uniform_(self.last.weight, gain=_LAST_GAIN)
        if self.wide_linear is not None:
            nn.init.zeros_(self.wide_linear.weight)
