"""DIEN as most code writes it: padded tensors, ``torch.nn.GRU``, a masked loop; same weights, same numbers.

The rival of ``bench.scoring``. Scoring only, softmax attention by an MLP, the paper's AUGRU.

Legend: ``B`` rows, ``T`` padded steps, ``D`` width of a step's input, ``H`` hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from couponflow.models.attention import AttentionScorer
from couponflow.models.batch import Batch
from couponflow.models.dien import Dien
from couponflow.models.encoders import Evolution
from couponflow.models.layers import GruCell, masked_softmax


class PlainDien:
    """Scores with the weights of a network; nothing is packed, every padded step is computed."""

    def __init__(self, network: Dien) -> None:
        """Of a DIEN in its default form."""
        assert isinstance(network.encoder, Evolution), "only dien is written out"
        assert network.extraction is not None, "dien has a first GRU"
        self.network, self.encoder = network, network.encoder
        self.gru = _torch_gru(network.extraction)

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        net, mask = self.network, batch.mask
        x_BTD = torch.cat(
            [
                F.embedding(batch.hist_item, net.item.weight),
                F.embedding(batch.hist_category, net.category.weight),
                F.embedding(batch.hist_shop, net.shop.weight),
                F.embedding(batch.hist_type, net.event_type.weight),
                net.gap(batch.hist_gap),
            ],
            dim=2,
        )
        mean = (x_BTD * mask[:, :, None]).sum(1) / batch.length.clamp_min(1)[:, None]
        candidate = net._candidate(batch.targets)
        states_BTH, _ = self.gru(x_BTD)
        interest = self.encoder.final_norm(self._evolve(states_BTH, candidate, mask))
        wide = (batch.wide - net.wide_mean) / net.wide_sd
        features = [
            candidate,
            interest,
            candidate * net.project_interest(interest),
            mean,
            candidate * net.project_mean(mean),
            wide,
        ]
        logits: Tensor = net.last(net.head(torch.cat(features, dim=1)))[:, 0]
        return logits if net.wide_linear is None else logits + net.wide_linear(wide)[:, 0]

    def _evolve(self, states_BTH: Tensor, candidate: Tensor, mask: Tensor) -> Tensor:
        attention = self.encoder.attention
        assert attention is not None, "the cell reads attention"
        scorer = attention.scorer
        assert isinstance(scorer, AttentionScorer), "only the MLP is written out"
        query = attention.query(candidate)[:, None, :].expand_as(states_BTH)
        value = scorer.first(torch.cat([query, states_BTH, query - states_BTH, query * states_BTH], dim=2))
        for activate, layer in zip(scorer.rest.activations, scorer.rest.layers, strict=True):
            value = layer(activate(value))
        weight_BT = masked_softmax(value[:, :, 0], mask)
        state = states_BTH.new_zeros(len(states_BTH), states_BTH.shape[2])
        for step in range(states_BTH.shape[1]):
            moved = self.encoder.evolution.step(states_BTH[:, step], state, weight_BT[:, step])
            state = torch.where(mask[:, step, None], moved, state)
        return state


def _torch_gru(cell: GruCell) -> nn.GRU:
    """The same recurrence; torch keeps with z = 1 - u and orders its blocks r, z, n."""
    hidden = cell.weight_state.shape[1]
    gru = nn.GRU(cell.weight_input.shape[1], hidden, batch_first=True)

    def arranged(value: Tensor) -> Tensor:
        u, r, c = value[:hidden], value[hidden : 2 * hidden], value[2 * hidden :]
        return torch.cat([r, -u, c])

    bias_state = torch.zeros(3 * hidden)
    bias_state[2 * hidden :] = cell.bias_state.detach()
    gru.load_state_dict(
        {
            "weight_ih_l0": arranged(cell.weight_input),
            "weight_hh_l0": arranged(cell.weight_state),
            "bias_ih_l0": arranged(cell.bias_input),
            "bias_hh_l0": bias_state,
        }
    )
    return gru.eval()
