import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from couponflow.models.attention import AttentionScorer
from couponflow.models.layers import (
    GAP_EDGES_DAYS,
    BatchNorm,
    Cell,
    Dice,
    DotScorer,
    GapEmbedding,
    GruCell,
    MlpScorer,
    auxiliary_sum,
    embed_set,
    masked_max,
    masked_softmax,
    packing,
)

CELLS: tuple[Cell, ...] = get_args(Cell)
TANH1 = math.tanh(1.0)


# ---------------------------------------------------------------------------------------- masked reductions
def mean_of(value: Tensor, mask: Tensor) -> Tensor:
    """Means of padded rows by way of packed steps."""
    layout = packing(mask.sum(1), mask.shape[1])
    return layout.mean(layout.pack(value))


def test_softmax_leaves_padding_out() -> None:
    score = torch.tensor([[0.0, math.log(3), 5.0]])
    weights = masked_softmax(score, torch.tensor([[True, True, False]]))
    assert weights[0].tolist() == pytest.approx([0.25, 0.75, 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_all_masked_rows_give_exact_zeros(dtype: torch.dtype) -> None:
    score = torch.tensor([[3.0, -60000.0, 60000.0], [1.0, 2.0, 3.0]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True, True, False]])
    weights = masked_softmax(score, mask)
    value = torch.full((2, 3, 2), 7.0, dtype=dtype)
    pooled = (weights[..., None] * value).sum(1)
    assert weights.dtype == dtype
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert pooled[0].tolist() == [0.0, 0.0]
    assert mean_of(value, mask)[0].tolist() == [0.0, 0.0]
    assert mean_of(value, mask)[1].tolist() == [7.0, 7.0]
    pooled.sum().backward()
    assert score.grad is not None
    assert torch.isfinite(score.grad).all()


def test_reductions_take_zero_steps() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.bool)
    assert masked_softmax(torch.zeros(2, 0), nothing).shape == (2, 0)
    assert mean_of(torch.zeros(2, 0, 3), nothing).tolist() == [[0.0] * 3] * 2
    assert masked_max(torch.zeros(2, 0), nothing).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_greatest_value_is_a_real_one(dtype: torch.dtype) -> None:
    value = torch.tensor([[-3.0, -2.0, 9.0], [5.0, 6.0, 7.0]], dtype=dtype, requires_grad=True)
    found = masked_max(value, torch.tensor([[True, True, False], [False] * 3]))
    assert found.tolist() == [-2.0, 0.0]
    found.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [[0.0, 1.0, 0.0], [0.0] * 3]


def test_mean_ignores_what_padding_holds() -> None:
    value = torch.tensor([[[1.0], [3.0], [math.nan]]])
    assert mean_of(value, torch.tensor([[True, True, False]])).tolist() == [[2.0]]


# ------------------------------------------------------------------------------------------------------ Dice
def test_dice_golden_values() -> None:
    dice = Dice(1, eps=1e-9)
    nn.init.constant_(dice.alpha, 0.1)
    x = torch.tensor([[1.0], [3.0]])
    assert dice(x)[:, 0].tolist() == pytest.approx([0.342047, 2.273858], abs=1e-5)
    assert dice.norm.running_mean.tolist() == pytest.approx([0.02], abs=1e-6)
    assert dice.norm.running_var.tolist() == pytest.approx([1.01], abs=1e-6)
    dice.eval()
    assert dice(x)[:, 0].tolist() == pytest.approx([0.753528, 2.867639], abs=1e-5)
    assert dice(x[1:])[0, 0].item() == pytest.approx(2.867639, abs=1e-5)  # a batch of one is the same row


def test_dice_statistics_leave_padding_out() -> None:
    value = torch.tensor([[[1.0], [3.0]], [[5.0], [900.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    masked, flat = Dice(1), Dice(1)
    out = masked(value, mask)
    assert out[mask].tolist() == flat(torch.tensor([[1.0], [3.0], [5.0]])).tolist()
    assert out[1, 1].item() == 0.0
    assert masked.norm.running_mean.tolist() == flat.norm.running_mean.tolist()


@pytest.mark.parametrize("size", [0, 1])
def test_batch_norm_takes_one_row_and_none_while_training(size: int) -> None:
    norm = BatchNorm(2)
    value = torch.full((size, 2), 3.0, requires_grad=True)
    out = norm(value)
    out.sum().backward()
    assert out.shape == (size, 2)
    assert norm.running_mean.tolist() == [0.0, 0.0]  # one row teaches nothing
    assert norm.weight.grad is not None


# ----------------------------------------------------------------------------------------------------- cells
def scalar_cell(cell: Cell, write_bias: float = 0.0) -> GruCell:
    """All weights 0, candidate bias 1: u = sigmoid(write_bias), c = tanh 1."""
    made = GruCell(1, 1, cell).double()
    with torch.no_grad():
        made.weight_input.zero_()
        made.weight_state.zero_()
        made.bias_input.copy_(torch.tensor([write_bias, 0.0, 1.0]))
    return made


def one_step(cell: Cell, attention: float, write_bias: float = 0.0) -> float:
    half, one = torch.full((1, 1), 0.5).double(), torch.ones(1, 1).double()
    made = scalar_cell(cell, write_bias)
    return float(made.step(one, half, torch.tensor([attention]).double()).item())


@pytest.mark.parametrize(
    ("cell", "attention", "expected"),
    [
        ("augru_paper", 0.25, 0.532699),
        ("augru_official", 0.25, 0.663496),
        ("agru", 0.25, 0.565399),
        ("augru_paper", 0.0, 0.5),
        ("augru_paper", 1.0, 0.630797),
        ("augru_official", 0.0, 0.630797),
        ("augru_official", 1.0, TANH1),
        ("agru", 0.0, 0.5),
        ("agru", 1.0, TANH1),
    ],
)
def test_write_rules_golden_values(cell: Cell, attention: float, expected: float) -> None:
    assert one_step(cell, attention) == pytest.approx(expected, abs=1e-6)


def test_official_code_with_its_keep_bias() -> None:
    assert one_step("augru_official", 0.25, write_bias=-1.0) == pytest.approx(0.618164, abs=1e-6)


@pytest.mark.parametrize(("cell", "expected"), [("augru_paper", 0.345097), ("augru_official", 0.725894)])
def test_recurrence_stops_at_the_length(cell: Cell, expected: float) -> None:
    layout = packing(torch.tensor([2]), 4)
    attention = layout.pack(torch.tensor([[0.25, 0.75, 0.0, 0.0]]).double())
    states = scalar_cell(cell)(torch.ones(2, 1).double(), layout, attention)
    assert layout.final(states).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("keep", "expected"), [(100.0, 0.5), (-100.0, TANH1)])
def test_torch_keeps_where_we_write(keep: float, expected: float) -> None:
    theirs = nn.GRUCell(1, 1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
        theirs.bias_ih.copy_(torch.tensor([0.0, keep, 1.0]))  # blocks r, z, n
    half = torch.full((1, 1), 0.5)
    assert theirs(torch.ones(1, 1), half).item() == pytest.approx(expected, abs=1e-6)
    ours = scalar_cell("gru", write_bias=-keep)
    assert ours.step(torch.ones(1, 1).double(), half.double()).item() == pytest.approx(expected, abs=1e-6)


def test_gru_equals_torch_with_the_z_block_flipped() -> None:
    torch.manual_seed(0)
    ours, theirs = GruCell(3, 4, "gru"), nn.GRU(3, 4, batch_first=True)
    nn.init.normal_(ours.bias_input)
    nn.init.normal_(ours.bias_state)
    with torch.no_grad():
        for mine, (into, blocks) in {
            ours.weight_input: (theirs.weight_ih_l0, 3),
            ours.weight_state: (theirs.weight_hh_l0, 3),
            ours.bias_input: (theirs.bias_ih_l0, 3),
        }.items():
            u, r, c = mine.chunk(blocks)
            into.copy_(torch.cat([r, -u, c]))
        theirs.bias_hh_l0.copy_(torch.cat([torch.zeros(8), ours.bias_state]))
    x = torch.randn(2, 5, 3)
    layout = packing(torch.tensor([5, 5]), 5)
    torch.testing.assert_close(layout.unpack(ours(layout.pack(x), layout)), theirs(x)[0])


def random_cell(cell: Cell, dtype: torch.dtype = torch.float64) -> GruCell:
    torch.manual_seed(1)
    made = GruCell(3, 4, cell).to(dtype)
    nn.init.normal_(made.bias_input)
    nn.init.normal_(made.bias_state)
    return made


def naive(cell: GruCell, x: Tensor, attention: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """States [B,T,H] and final states, one row and one step at a time."""
    hidden = len(cell.bias_state)
    states = x.new_zeros(*x.shape[:2], hidden)
    final = x.new_zeros(len(lengths), hidden)
    for row, length in enumerate(lengths):
        state = x.new_zeros(1, hidden)
        for step in range(length):
            state = cell.step(x[row : row + 1, step], state, attention[row : row + 1, step])
            states[row, step] = state[0]
        final[row] = state[0]
    return states, final


@pytest.mark.parametrize("lengths", [[0, 1, 5, 2, 5], [1], [0, 0], [3]], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_fast_cell_equals_the_naive_loop(cell: Cell, lengths: list[int]) -> None:
    made = random_cell(cell)
    num_steps = max(lengths) + 1
    x = torch.randn(len(lengths), num_steps, 3).double().requires_grad_()
    attention = torch.rand(len(lengths), num_steps).double().requires_grad_()
    layout = packing(torch.tensor(lengths), num_steps)
    fast = made(layout.pack(x), layout, layout.pack(attention))
    states, final = naive(made, x, attention, lengths)
    torch.testing.assert_close(layout.unpack(fast), states)
    torch.testing.assert_close(layout.final(fast), final)

    inputs = [x, attention, *made.parameters()]
    probe = torch.randn_like(states)
    fast_loss = (layout.unpack(fast) * probe).sum() + layout.final(fast).pow(2).sum()
    nothing = sum((0.0 * value.sum() for value in inputs), torch.zeros(()))  # a path where no step is real
    naive_loss = (states * probe).sum() + final.pow(2).sum() + nothing
    found = torch.autograd.grad(fast_loss, inputs, allow_unused=True)
    expected = torch.autograd.grad(naive_loss, inputs, allow_unused=True)
    for got, want, value in zip(found, expected, inputs, strict=True):
        zeros = torch.zeros_like(value)
        torch.testing.assert_close(zeros if got is None else got, zeros if want is None else want)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: Cell) -> None:
    made = random_cell(cell)
    layout = packing(torch.tensor([0, 3, 1]), 3)
    x = torch.randn(4, 3).double().requires_grad_()
    attention = torch.rand(4).double().requires_grad_()

    def run(x: Tensor, attention: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in made.named_parameters()]
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(made, values, (x, layout, attention))  # type: ignore[no-any-return]  # untyped in torch

    inputs = (x, attention, *(parameter.detach().requires_grad_() for parameter in made.parameters()))
    assert torch.autograd.gradcheck(run, inputs)


def test_attentional_cells_refuse_to_run_without_attention() -> None:
    with pytest.raises(ValueError, match="augru_paper needs attention"):
        GruCell(1, 1, "augru_paper")(torch.ones(1, 1), packing(torch.tensor([1]), 1))


def test_packing_round_trip() -> None:
    length = torch.tensor([2, 0, 4, 1])
    mask = torch.arange(5) < length[:, None]
    value = torch.randn(4, 5, 2) * mask[..., None]
    layout = packing(length, 5)
    assert layout.sizes == (3, 2, 1, 1)
    assert torch.equal(layout.unpack(layout.pack(value)), value)
    final = layout.final(layout.pack(value))
    assert torch.equal(final, torch.stack([value[0, 1], torch.zeros(2), value[2, 3], value[3, 0]]))
    padded = (value * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(layout.mean(layout.pack(value)), padded)
    later = (layout.step > 0).nonzero()[:, 0]
    assert torch.equal(layout.row[layout.previous(later)], layout.row[later])
    assert torch.equal(layout.step[layout.previous(later)], layout.step[later] - 1)


def test_packing_of_nothing() -> None:
    for length in (torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        layout = packing(length, 3)
        nothing = torch.zeros(0, 2, requires_grad=True)
        assert layout.unpack(nothing).shape == (len(length), 3, 2)
        assert layout.previous(torch.zeros(0, dtype=torch.int64)).tolist() == []
        for found in (layout.mean(nothing), layout.final(nothing)):
            assert found.tolist() == [[0.0, 0.0]] * len(length)
            found.sum().backward()


# --------------------------------------------------------------------------------------------------- scorers
def test_split_attention_equals_the_concatenated_form() -> None:
    torch.manual_seed(0)
    scorer = AttentionScorer(3, (6, 4))
    query, state, row = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    q = query[row]
    value = torch.sigmoid(scorer.first(torch.cat([q, state, q - state, q * state], dim=1)))
    value = torch.sigmoid(scorer.rest.layers[0](value))
    torch.testing.assert_close(scorer(query, state, row), scorer.rest.layers[1](value)[:, 0])


def test_mlp_scorer_equals_the_concatenated_form() -> None:
    torch.manual_seed(0)
    scorer = MlpScorer(3, 2, (6, 4))
    state, behaviour, negative = torch.randn(5, 3), torch.randn(5, 2), torch.randn(5, 2)
    before, after = torch.tensor([0, 3, 1]), torch.tensor([2, 4, 3])
    weight = torch.cat([scorer.first_state.weight, scorer.first_behaviour.weight], dim=1)

    def logit(e: Tensor) -> Tensor:
        given = torch.cat([state[before], e[after]], dim=1)
        first = nn.functional.linear(given, weight, scorer.first_state.bias)
        value = torch.sigmoid(scorer.rest.layers[0](torch.sigmoid(first)))
        return scorer.rest.layers[1](value)[:, 0]  # type: ignore[no-any-return]  # a module of a list

    expected = nn.functional.softplus(-logit(behaviour)) + nn.functional.softplus(logit(negative))
    found = scorer(state, behaviour, negative, before, after)
    torch.testing.assert_close(found, 0.5 * expected.sum())


def test_dot_scorer_projects_only_when_widths_differ() -> None:
    assert list(DotScorer(3, 3).parameters()) == []
    assert [tuple(p.shape) for p in DotScorer(3, 2).parameters()] == [(2, 3)]


# -------------------------------------------------------------------------------------------- auxiliary loss
STATE = [[1.0, 2.0, 9.0], [1.0, 9.0, 9.0]]
BEHAVIOUR = [[7.0, 1.0, 1.0], [7.0, 2.0, 5.0]]
NEGATIVE = [[7.0, -1.0, 0.0], [7.0, 0.0, 5.0]]


def auxiliary(lengths: list[int], num_steps: int = 3, drawn: Tensor | None = None) -> Tensor:
    layout = packing(torch.tensor(lengths), num_steps)
    packed = [
        layout.pack(
            torch.nn.functional.pad(torch.tensor(rows, requires_grad=True), (0, num_steps - 3), value=4.0)
        )[:, None]
        for rows in (STATE, BEHAVIOUR, NEGATIVE)
    ]
    of_steps = torch.ones(len(layout.row), dtype=torch.bool) if drawn is None else layout.pack(drawn)
    return auxiliary_sum(DotScorer(1, 1), layout, *packed, of_steps)


@pytest.mark.parametrize("num_steps", [3, 5])
def test_auxiliary_loss_golden_value(num_steps: int) -> None:
    total = auxiliary([3, 2], num_steps)
    assert 2 * total.item() == pytest.approx(2.266674, abs=1e-5)
    assert total.item() / 3 == pytest.approx(0.377779, abs=1e-5)  # three pairs


def test_auxiliary_loss_without_pairs_is_zero_with_a_gradient_path() -> None:
    total = auxiliary([1, 0])
    assert total.item() == 0.0
    total.backward()


def test_pairs_without_a_negative_do_not_count() -> None:
    drawn = torch.tensor([[True, False, True], [True, True, True]])
    total = auxiliary([3, 2], drawn=drawn)
    softplus = [math.log1p(math.exp(x)) for x in (-2, 0, -2, 0)]  # logits + 2 - 0, and + 2 - 0
    assert total.item() == pytest.approx(sum(softplus) / 2, abs=1e-6)


def test_a_confident_mistake_costs_its_logit() -> None:
    state, behaviour, negative = (torch.tensor(v)[:, None] for v in ([1.0, 0.0], [0.0, 900.0], [0.0, 40.0]))
    layout, drawn = packing(torch.tensor([2]), 2), torch.ones(2).bool()
    total = auxiliary_sum(DotScorer(1, 1), layout, state, behaviour, negative, drawn)
    assert 2 * total.item() == pytest.approx(40.0)


# ------------------------------------------------------------------------------------------------ embeddings
def test_gap_edges_belong_to_the_older_bucket() -> None:
    embedding = GapEmbedding(1)
    with torch.no_grad():
        embedding.embedding.weight.copy_(torch.arange(len(GAP_EDGES_DAYS) + 1.0)[:, None])
    minutes = torch.tensor([0, 1439, 1440, 2879, 2880, 7 * 1440, 182 * 1440, 9999 * 1440]).double()
    gap = torch.log1p(minutes / 1440).float()
    assert embedding(gap)[:, 0].tolist() == [0, 0, 1, 1, 2, 4, 9, 9]


def test_absent_fields_add_nothing_whatever_the_padding_row_holds() -> None:
    embedding = nn.Embedding(4, 2, padding_idx=0)
    nn.init.constant_(embedding.weight, 0.3)
    found = embed_set(embedding, torch.tensor([[0, 2, 3], [0, 0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.6], [0.0, 0.0]]))
    assert embed_set(embedding, torch.zeros(2, 0, dtype=torch.int64)).tolist() == [[0.0, 0.0]] * 2
