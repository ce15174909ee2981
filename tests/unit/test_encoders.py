"""Every encoder against its equations written out row by row and step by step."""

import math
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from couponflow.modelling import ModelConfig
from couponflow.models.attention import Attention, AttentionScorer, BilinearScorer
from couponflow.models.encoders import Encoded, Encoder, build_encoder, recurrent
from couponflow.models.layers import Cell, GruCell, packing

CELLS: tuple[Cell, ...] = get_args(Cell)
CANDIDATE, STEP, HIDDEN = 3, 5, 4
LENGTHS = [3, 0, 5, 1, 5]

VARIANTS: dict[str, dict[str, Any]] = {
    "mean_pool": {"encoder": "mean_pool"},
    "static": {"encoder": "static"},
    "din": {"encoder": "din"},
    "din_sum": {"encoder": "din", "normalise": "sum"},
    "din_sigmoid": {"encoder": "din", "normalise": "sigmoid", "match_features": True},
    "din_prelu": {"encoder": "din", "attention_activation": "prelu"},
    "din_dice": {"encoder": "din", "attention_activation": "dice"},
    "din_bilinear": {"encoder": "din", "attention": "bilinear", "match_features": True},
    "gru": {"encoder": "gru"},
    "gru_att": {"encoder": "gru_att"},
    "gru_att_sum": {"encoder": "gru_att", "normalise": "sum", "match_features": True},
    **{cell: {"cell": cell} for cell in CELLS},
    "dien_sigmoid": {"normalise": "sigmoid", "attention": "bilinear", "match_features": True},
    "dien_dice": {"attention_activation": "dice", "match_features": True},
    "dien_no_norm": {"final_norm": False},
}


def make(**over: Any) -> Encoder:
    """In float64 and eval mode, with no parameter or statistic at its start."""
    config = ModelConfig(**({"hidden_dim": HIDDEN, "attention_dims": (6, 5)} | over))
    torch.manual_seed(0)
    made = build_encoder(config, HIDDEN if recurrent(config) else STEP, CANDIDATE).double()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.3 * torch.randn_like(value))
        for name, value in made.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                value.add_(torch.rand_like(value))
    return made.eval()


def inputs(made: Encoder, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Padded states, garbage on padding, and candidates."""
    width = HIDDEN if any(isinstance(module, GruCell | nn.LayerNorm) for module in made.modules()) else STEP
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(lengths), max(lengths, default=0), width, generator=generator).double()
    return states, torch.randn(len(lengths), CANDIDATE, generator=generator).double()


def encode(made: Encoder, states: Tensor, candidate: Tensor, lengths: list[int]) -> Encoded:
    length = torch.tensor(lengths, dtype=torch.int64)
    layout = packing(length, states.shape[1])
    mask = torch.arange(states.shape[1]) < length[:, None]
    found: Encoded = made(layout.pack(states), candidate, layout, mask)
    return found


def naive_scores(attention: Attention, candidate: Tensor, states: Tensor) -> Tensor:
    """Scores [n] of one row."""
    q = attention.query(candidate[None])[0]
    if isinstance(attention.scorer, BilinearScorer):
        score = states @ q / math.sqrt(len(q))
    else:
        assert isinstance(attention.scorer, AttentionScorer)
        h, more, q = states[:, : len(q)], states[:, len(q) :], q.expand(len(states), -1)
        value = attention.scorer.first(torch.cat([q, h, q - h, q * h, more], dim=1))
        for activate, layer in zip(
            attention.scorer.rest.activations, attention.scorer.rest.layers, strict=True
        ):
            value = layer(activate(value))
        score = value[:, 0]
    return score if attention.offset is None else score + attention.offset


def naive_weights(attention: Attention, score: Tensor) -> Tensor:
    match attention.normalise:
        case "softmax":
            return torch.softmax(score, 0)
        case "sigmoid":
            return torch.sigmoid(score)
        case _:
            return score


def naive_states(cell: GruCell, x: Tensor, weights: Tensor | None = None) -> Tensor:
    state, states = x.new_zeros(1, HIDDEN), []
    for step in range(len(x)):
        state = cell.step(x[step : step + 1], state, None if weights is None else weights[step : step + 1])
        states.append(state)
    return torch.cat(states)


def naive(made: Any, states: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor | None]:
    """Interest of one row with its ``n`` real states, and its scores; n >= 1."""
    attention = getattr(made, "attention", None)
    match type(made).__name__:
        case "MeanPool":
            return states.mean(0), None
        case "Static":
            return made.mlp(states.mean(0)[None])[0], None
        case "LastState":
            return made.final_norm(states[-1]), None
        case "Din":
            score = naive_scores(attention, candidate, states)
            return naive_weights(attention, score) @ states, score
        case "GruAttention":
            second = naive_states(made.second, states)
            score = naive_scores(attention, candidate, second)
            return made.final_norm(naive_weights(attention, score) @ second), score
        case _:
            if attention is None:
                return made.final_norm(naive_states(made.evolution, states)[-1]), None
            score = naive_scores(attention, candidate, states)
            weights = naive_weights(attention, score)
            return made.final_norm(naive_states(made.evolution, states, weights)[-1]), score


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_equals_its_equations(variant: str) -> None:
    made = make(**VARIANTS[variant])
    states, candidate = inputs(made, LENGTHS)
    interest, match = encode(made, states, candidate, LENGTHS)
    assert interest.shape == (len(LENGTHS), made.width)
    assert match.shape == (len(LENGTHS), made.num_matches)
    for row, length in enumerate(LENGTHS):
        if not length:
            continue
        expected, score = naive(made, states[row, :length], candidate[row])
        torch.testing.assert_close(interest[row], expected)
        if made.num_matches:
            assert score is not None
            query = made.attention.query(candidate[row : row + 1])[0]
            product = query @ expected[: len(query)]
            torch.testing.assert_close(match[row], torch.stack([product, score.max()]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_history_has_no_interest(variant: str) -> None:
    made = make(**VARIANTS[variant])
    states, candidate = inputs(made, [0, 2, 0])
    interest, match = encode(made, states, candidate, [0, 2, 0])
    assert torch.isfinite(interest).all()
    assert torch.equal(interest[0], interest[2])  # no trace of the candidate or of padding
    if variant in ("mean_pool", "din", "din_sum", "din_sigmoid", "din_bilinear"):
        assert not interest[0].any()
    if made.num_matches:
        assert not match[[0, 2], 1].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 0]], ids=str)
def test_batches_of_no_row_and_of_one_row(variant: str, lengths: list[int]) -> None:
    made = make(**VARIANTS[variant]).train()
    states, candidate = inputs(made, lengths)
    interest, match = encode(made, states.requires_grad_(), candidate, lengths)
    (interest.sum() + match.sum()).backward()
    for name, value in made.named_parameters():
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        assert lengths or not value.grad.any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_attention_reads_the_candidate(variant: str) -> None:
    made = make(**VARIANTS[variant])
    states, candidate = inputs(made, LENGTHS)
    one = encode(made, states, candidate, LENGTHS).interest
    other = encode(made, states, candidate + 1.0, LENGTHS).interest
    assert torch.equal(one, other) == (
        variant in ("mean_pool", "static", "gru") or VARIANTS[variant].get("cell") == "gru"
    )


def test_a_sum_keeps_how_strongly_a_history_speaks_and_a_softmax_does_not() -> None:
    for normalise, factor in (("sum", 2.0), ("sigmoid", 2.0), ("softmax", 1.0)):
        made = make(encoder="din", normalise=normalise)
        states, candidate = inputs(made, [3])
        once = encode(made, states, candidate, [3]).interest
        twice = encode(made, states.repeat(1, 2, 1), candidate, [6]).interest
        torch.testing.assert_close(twice, factor * once)


def test_a_softmax_weighs_as_the_golden_scores_say() -> None:
    """Scores 0, ln 3 and, on padding, 5: weights 1/4, 3/4 and nothing."""
    made = make(encoder="din", attention="bilinear")
    with torch.no_grad():
        made.attention.query.weight.zero_()
        made.attention.query.weight[0, 0] = math.sqrt(STEP)
    states = torch.zeros(1, 3, STEP).double()
    states[0, :, 0] = torch.tensor([0.0, math.log(3), 5.0])
    states[0, :, 1:4] = torch.eye(3)
    candidate = torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert encode(made, states, candidate, [2]).interest[0, 1:4].tolist() == pytest.approx([0.25, 0.75, 0.0])


def test_dice_in_the_attention_learns_from_real_steps_only() -> None:
    """Running statistics of a batch do not depend on its padding."""
    wide, narrow = (make(encoder="din", attention_activation="dice").train() for _ in range(2))
    states, candidate = inputs(wide, LENGTHS)
    padded = torch.nn.functional.pad(states, (0, 0, 0, 3), value=9.0)
    one = encode(narrow, states, candidate, LENGTHS).interest
    torch.testing.assert_close(encode(wide, padded, candidate, LENGTHS).interest, one)
    for (name, left), (_, right) in zip(wide.named_buffers(), narrow.named_buffers(), strict=True):
        torch.testing.assert_close(left, right, msg=name)
    fresh = make(encoder="din", attention_activation="dice")
    moved = {name for name, value in wide.named_buffers() if not torch.equal(value, fresh.get_buffer(name))}
    assert any(name.endswith("running_mean") for name in moved)


def test_raw_scores_never_reach_a_gate() -> None:
    for cell in CELLS:
        if cell != "gru":
            with pytest.raises(ValidationError, match=f"multiply the gates of cell '{cell}'"):
                ModelConfig(cell=cell, normalise="sum")
    for over in ({"cell": "gru"}, {"encoder": "din"}, {"encoder": "gru_att"}):
        assert ModelConfig(normalise="sum", **over).normalise == "sum"


def test_sigmoid_weights_start_low() -> None:
    config = ModelConfig(encoder="din", normalise="sigmoid", attention="bilinear")
    made = build_encoder(config, STEP, CANDIDATE)
    assert made.attention.offset.item() == -1.0
