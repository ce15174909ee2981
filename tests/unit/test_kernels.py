"""Kernels against plain autograd, over several blocks; the cells themselves are compared in test_layers."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from couponflow.models import kernels
from couponflow.models.attention import AttentionScorer
from couponflow.models.layers import Cell, GruCell, MlpScorer, packing


@pytest.fixture(params=[1, 3, 1000])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions of a block: fewer than a step, several steps, everything at once."""
    monkeypatch.setattr(kernels, "_CPU_POSITIONS", request.param)
    return int(request.param)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients agree."""
    torch.testing.assert_close(found, expected)
    probe = torch.randn_like(expected)
    got = torch.autograd.grad((found * probe).sum(), inputs)
    want = torch.autograd.grad((expected * probe).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dims", [(6,), (6, 4), (6, 4, 3)], ids=str)
def test_attention_scores(dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scorer = AttentionScorer(3, dims).double()
    query, state, row = random(4, 3), random(11, 3), torch.randint(4, (11,))
    q = query[row]
    value = scorer.first(torch.cat([q, state, q - state, q * state], dim=1))
    for layer in scorer.rest.layers:
        value = layer(torch.sigmoid(value))
    assert_same(scorer(query, state, row), value[:, 0], [query, state, *scorer.parameters()])


def test_states_wider_than_the_query() -> None:
    torch.manual_seed(0)
    per_row, query, state, row = random(4, 6), random(4, 3), random(11, 5), torch.randint(4, (11,))
    by_state, by_product, last = random(6, 5), random(6, 3), random(1, 6)
    first = per_row[row] + F.linear(state, by_state) + F.linear(query[row] * state[:, :3], by_product)
    found = kernels.attention_scores(per_row, query, state, row, by_state, by_product, [last, None])
    assert_same(found, (torch.sigmoid(first) @ last.t())[:, 0], [per_row, query, state, by_state, last])


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dims", [(6,), (6, 4)], ids=str)
def test_pair_losses(dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scorer = MlpScorer(3, 2, dims).double()
    state, behaviour, negative = random(9, 3), random(9, 2), random(9, 2)
    after, before = torch.tensor([8, 2, 5, 7, 3]), torch.tensor([1, 0, 4, 2, 6])

    def logit(e: Tensor) -> Tensor:
        value = scorer.first_state(state[before]) + scorer.first_behaviour(e[after])
        for layer in scorer.rest.layers:
            value = layer(torch.sigmoid(value))
        return value[:, 0]

    expected = 0.5 * (F.softplus(-logit(behaviour)) + F.softplus(logit(negative))).sum()
    found = scorer(state, behaviour, negative, before, after)
    assert_same(found, expected, [state, behaviour, negative, *scorer.parameters()])
    assert torch.autograd.gradcheck(
        lambda *given: scorer(*given, before, after), (state, behaviour, negative)
    )
    with torch.no_grad():
        torch.testing.assert_close(scorer(state, behaviour, negative, before, after), expected)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("lengths", [[0, 1, 7, 2, 7], [0], []], ids=str)
@pytest.mark.parametrize("cell", get_args(Cell))
def test_states_over_blocks(cell: Cell, lengths: list[int]) -> None:
    torch.manual_seed(0)
    made = GruCell(3, 4, cell).double()
    layout = packing(torch.tensor(lengths, dtype=torch.int64), max(lengths, default=0))
    num = len(layout.row)
    x, attention = random(num, 3), torch.rand(num, dtype=torch.float64).requires_grad_()
    states: list[Tensor] = []
    state, place = x.new_zeros(layout.sizes[0] if num else 0, 4), 0
    for size in layout.sizes:
        now = slice(place, place + size)
        state = made.step(x[now], state[:size], attention[now])
        states.append(state)
        place += size
    expected = (
        torch.cat(states) if states else x.new_zeros(0, 4) + 0.0 * sum(p.sum() for p in made.parameters())
    )
    inputs: list[Any] = [x, *made.parameters()] if cell == "gru" else [x, attention, *made.parameters()]
    found = made(x, layout, attention)
    if states:
        assert_same(found, expected, inputs)
    else:
        assert found.shape == (0, 4)
        found.sum().backward()
        assert all(not value.grad.any() for value in made.parameters() if value.grad is not None)
    with torch.no_grad():
        assert torch.equal(made(x, layout, attention), found)  # nothing is kept, nothing differs


@pytest.mark.parametrize("sizes", [(), (5, 5, 2, 1)], ids=str)
def test_row_sums(sizes: tuple[int, ...]) -> None:
    value = random(sum(sizes), 3)
    rank = torch.tensor([place for size in sizes for place in range(size)], dtype=torch.int64)
    expected = value.new_zeros(sizes[0] if sizes else 0, 3).index_add(0, rank, value)
    assert_same(kernels.row_sums(value, sizes), expected, [value])


@pytest.mark.parametrize("shape", [(7,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("padding", [0, None])
def test_lookup(shape: tuple[int, ...], padding: int | None) -> None:
    torch.manual_seed(0)
    weight, ids = random(4, 3), torch.randint(4, shape)
    assert_same(kernels.lookup(weight, ids, padding), F.embedding(ids, weight, padding), [weight])


def test_blocks_cover_the_steps_in_order() -> None:
    assert kernels._blocks((4, 4, 2, 1, 1), 5) == [range(0, 2), range(2, 5)]
    assert kernels._blocks((4, 4), 1) == [range(0, 1), range(1, 2)]
    assert kernels._blocks((), 5) == []
