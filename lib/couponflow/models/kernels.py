"""Loops over packed histories whose backward passes are written by hand.

Under autograd each intermediate of every position is written to memory and read again; here a block of
positions at a time passes through all layers while it stays in the processor's cache. What is kept for the
backward pass is what costs more to compute again than to read. All of it is exact; nothing is approximated.

Legend: ``N`` real steps of the batch, packed as in ``layers.Packing`` (time-major, longest row first),
``sizes`` rows alive at each step, ``D`` input width, ``H`` hidden width, ``G`` = 3H gate blocks in the order
u, r, c, ``W`` first layer of a scorer, ``P`` pairs.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

#: Positions of a block, 0.8 MB with 100 channels; 1,024 and 4,096 took the same time within 5 %.
_CPU_POSITIONS = 2_048
#: An accelerator wants few, large launches.
_OTHER_POSITIONS = 131_072

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # from the sigmoid's own output, in one pass
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


# ------------------------------------------------------------------------------------------------- recurrence
def gru_states(
    x_ND: Tensor,
    weight_input_GD: Tensor,
    bias_input_G: Tensor,
    weight_state_GH: Tensor,
    bias_state_H: Tensor,
    attention_N1: Tensor | None,
    sizes: tuple[int, ...],
    cell: str,
) -> Tensor:
    """States after every real step, [N,H]; ``layers.GruCell`` has the equations.

    Without gradients nothing but the states is kept.
    """
    keep = torch.is_grad_enabled()
    made = _Recurrence.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        keep, x_ND, weight_input_GD, bias_input_G, weight_state_GH, bias_state_H, attention_N1, sizes, cell
    )
    return cast(Tensor, made)


class _Recurrence(torch.autograd.Function):
    """Only rows that are alive take part in a step; inputs are projected a block of steps at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        x_ND: Tensor,
        weight_GD: Tensor,
        bias_G: Tensor,
        weight_GH: Tensor,
        bias_H: Tensor,
        attention_N1: Tensor | None,
        sizes: tuple[int, ...],
        cell: str,
    ) -> Tensor:
        num, hidden = x_ND.shape[0], weight_GH.shape[1]
        most = sizes[0] if sizes else 0
        starts = list(accumulate(sizes, initial=0))
        blocks = _blocks(sizes, _positions(x_ND))
        states = x_ND.new_empty(num, hidden)
        inner, content = (x_ND.new_empty(num if keep else most, hidden) for _ in range(2))
        gates = x_ND.new_empty(num if keep else most, 2 * hidden)
        # One buffer for all steps each: a fresh one costs page faults.
        projected, written = x_ND.new_empty(most, 3 * hidden), x_ND.new_empty(most, hidden)
        longest = max((starts[steps.stop] - starts[steps.start] for steps in blocks), default=0)
        buffer = x_ND.new_empty(longest, 3 * hidden)
        state = x_ND.new_zeros(most, hidden)
        for steps in blocks:
            begin, end = starts[steps.start], starts[steps.stop]
            torch.addmm(bias_G, x_ND[begin:end], weight_GD.t(), out=buffer[: end - begin])
            for step in steps:
                size, now = sizes[step], slice(starts[step], starts[step + 1])
                here = now if keep else slice(0, size)
                pre = buffer[now.start - begin : now.stop - begin]
                state = state[:size]
                by_state = torch.mm(state, weight_GH.t(), out=projected[:size])
                both = torch.add(pre[:, : 2 * hidden], by_state[:, : 2 * hidden], out=gates[here]).sigmoid_()
                reset = torch.add(by_state[:, 2 * hidden :], bias_H, out=inner[here])
                c = torch.addcmul(pre[:, 2 * hidden :], both[:, hidden:], reset, out=content[here])
                c.mul_(2).sigmoid_().mul_(2).sub_(1)  # tanh, whose own kernel takes three times as long
                a = None if attention_N1 is None else attention_N1[now]
                w = _write_weight(cell, both[:, :hidden], a, written[:size])
                state = torch.lerp(state, c, w, out=states[now])
        if keep:
            ctx.save_for_backward(x_ND, weight_GD, weight_GH, attention_N1, states, inner, content, gates)
        ctx.sizes, ctx.cell = sizes, cell
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_ND, weight_GD, weight_GH, attention_N1, states, inner, content, gates = ctx.saved_tensors
        sizes, cell, hidden = ctx.sizes, ctx.cell, weight_GH.shape[1]
        most = sizes[0] if sizes else 0
        starts = list(accumulate(sizes, initial=0))
        blocks = _blocks(sizes, _positions(x_ND))
        # Gradients of a block's gates in columns c, u, r, r(Uh + b'): the input side reads the first three,
        # the state side the last three, and neither needs a copy.
        longest = max((starts[steps.stop] - starts[steps.start] for steps in blocks), default=0)
        buffer = states.new_empty(longest, 4 * hidden)
        weight_CD = torch.cat([weight_GD[2 * hidden :], weight_GD[: 2 * hidden]])
        grad_x = torch.empty_like(x_ND)
        grad_input, grad_state = torch.zeros_like(weight_GD), torch.zeros_like(weight_GH)
        grad_bias = states.new_zeros(4 * hidden)
        grad_a = None if attention_N1 is None else torch.empty_like(attention_N1)
        carried = states.new_zeros(most, hidden)  # gradient of the state that a step leaves behind
        written, by_weight, at_content = (states.new_empty(most, hidden) for _ in range(3))
        start = states.new_zeros(most, hidden)
        for steps in reversed(blocks):
            begin, end = starts[steps.start], starts[steps.stop]
            for step in reversed(steps):
                size, now = sizes[step], slice(starts[step], starts[step + 1])
                before = states[starts[step - 1] : starts[step - 1] + size] if step else start
                u, r, c = gates[now, :hidden], gates[now, hidden:], content[now]
                a = None if attention_N1 is None else attention_N1[now]
                w = _write_weight(cell, u, a, written[:size])
                d = carried[:size].add_(gradients[0][now])
                g_w = torch.sub(c, before, out=by_weight[:size]).mul_(d)
                g_c = torch.mul(d, w, out=at_content[:size])
                d.addcmul_(d, w, value=-1)
                made = buffer[now.start - begin : now.stop - begin]
                _tanh_backward(g_c, c, grad_input=made[:, :hidden])
                if grad_a is not None:
                    by_a = u if cell == "augru_paper" else 1 - u
                    torch.sum(g_w if cell == "agru" else g_w * by_a, dim=1, keepdim=True, out=grad_a[now])
                g_u = _by_update(cell, g_w, a)
                _sigmoid_backward(g_u, u, grad_input=made[:, hidden : 2 * hidden])
                g_r = torch.mul(made[:, :hidden], inner[now], out=at_content[:size])
                _sigmoid_backward(g_r, r, grad_input=made[:, 2 * hidden : 3 * hidden])
                torch.mul(made[:, :hidden], r, out=made[:, 3 * hidden :])
                grad_state.addmm_(made[:, hidden:].t(), before)
                d.addmm_(made[:, hidden:], weight_GH)
            made = buffer[: end - begin]
            torch.mm(made[:, : 3 * hidden], weight_CD, out=grad_x[begin:end])
            grad_input.addmm_(made[:, : 3 * hidden].t(), x_ND[begin:end])
            grad_bias += made.sum(0)
        grad_input = torch.cat([grad_input[hidden:], grad_input[:hidden]])
        grad_bias_input = torch.cat([grad_bias[hidden : 3 * hidden], grad_bias[:hidden]])
        grad_bias_state = grad_bias[3 * hidden :].clone()
        return None, grad_x, grad_input, grad_bias_input, grad_state, grad_bias_state, grad_a, None, None


def _write_weight(cell: str, u: Tensor, a: Tensor | None, out: Tensor) -> Tensor:
    if a is None:
        return u
    if cell == "agru":
        return a.expand_as(u)
    if cell == "augru_paper":
        return torch.mul(a, u, out=out)
    return torch.lerp(u, torch.ones_like(u), a.expand_as(u), out=out)  # 1 - (1 - a)(1 - u)


def _by_update(cell: str, by_weight: Tensor, a: Tensor | None) -> Tensor:
    """Gradient by u of the write weight's gradient; ``by_weight`` may be overwritten."""
    if a is None:
        return by_weight
    if cell == "agru":
        return by_weight.zero_()
    return by_weight.mul_(a if cell == "augru_paper" else 1 - a)


# ------------------------------------------------------------------------------------------------------- sums
def row_sums(value_ND: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum of each row's real steps, longest row first, [sizes[0], D]."""
    return cast(Tensor, _RowSums.apply(value_ND, sizes))  # type: ignore[no-untyped-call]  # untyped in torch


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_ND: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        total = value_ND.new_zeros(sizes[0] if sizes else 0, value_ND.shape[1])
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            total[:size] += value_ND[start : start + size]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if not ctx.sizes:
            return torch.zeros_like(gradients[0]), None
        return torch.cat([gradients[0][:size] for size in ctx.sizes]), None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VE: Tensor, ids_N: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids_N)
        ctx.shape, ctx.padding = weight_VE.shape, padding
        return weight_VE.index_select(0, ids_N)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad = gradients[0].new_zeros(ctx.shape).index_add_(0, ctx.saved_tensors[0], gradients[0])
        if ctx.padding is not None:
            grad[ctx.padding] = 0.0
        return grad, None, None


def lookup(weight_VE: Tensor, ids: Tensor, padding: int | None) -> Tensor:
    """Rows of a table, [..., E], as ``nn.Embedding`` gives; its backward pass takes half as long again."""
    rows = _Lookup.apply(weight_VE, ids.reshape(-1), padding)  # type: ignore[no-untyped-call]  # untyped in torch
    return cast(Tensor, rows).view(*ids.shape, weight_VE.shape[1])


# ---------------------------------------------------------------------------------------------------- scorers
def attention_scores(
    per_row_BW: Tensor,
    query_BQ: Tensor,
    state_NS: Tensor,
    row_N: Tensor,
    weight_state_WS: Tensor,
    weight_product_WQ: Tensor,
    tail: Sequence[Tensor | None],
) -> Tensor:
    """Scores [N] of an MLP whose first layer is ``per_row[row] + W_s s + W_p (q[row] s)``, sigmoid units.

    The product takes the first Q channels of a state. ``tail``: weight, bias or None of each later layer.
    The backward pass computes the hidden units again.
    """
    given = (per_row_BW, query_BQ, state_NS, row_N, weight_state_WS, weight_product_WQ, *tail)
    return cast(Tensor, _AttentionScores.apply(*given))  # type: ignore[no-untyped-call]  # untyped in torch


class _AttentionScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given)
        per_row, query, state, row, by_state, by_product, *tail = given
        mlp = _SigmoidTail(tail)
        scores = state.new_empty(len(state), 1)
        for now in _slices(state):
            _, _, pre = _first_layer(per_row, query, state[now], row[now], by_state, by_product)
            scores[now] = mlp.forward(pre)
        return scores[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        per_row, query, state, row, by_state, by_product, *tail = ctx.saved_tensors
        mlp = _SigmoidTail(tail)
        grad_row, grad_query = torch.zeros_like(per_row), torch.zeros_like(query)
        grad_state = torch.empty_like(state)
        grad_by_state, grad_by_product = torch.zeros_like(by_state), torch.zeros_like(by_product)
        width = query.shape[1]
        for now in _slices(state):
            s, rows = state[now], row[now]
            q, product, pre = _first_layer(per_row, query, s, rows, by_state, by_product)
            mlp.forward(pre)
            g = mlp.backward(gradients[0][now, None])
            grad_by_state.addmm_(g.t(), s)
            grad_by_product.addmm_(g.t(), product)
            torch.mm(g, by_state, out=grad_state[now])
            g_product = torch.mm(g, by_product)
            grad_state[now, :width].addcmul_(g_product, q)
            grad_query.index_add_(0, rows, g_product.mul_(s[:, :width]))
            grad_row.index_add_(0, rows, g)
        return grad_row, grad_query, grad_state, None, grad_by_state, grad_by_product, *mlp.gradients


def _first_layer(
    per_row: Tensor, query: Tensor, state: Tensor, row: Tensor, by_state: Tensor, by_product: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and product of each position, and the first layer's pre-activation."""
    q = query.index_select(0, row)
    product = q * state[:, : q.shape[1]]
    pre = per_row.index_select(0, row).addmm_(state, by_state.t()).addmm_(product, by_product.t())
    return q, product, pre


def pair_losses(
    state_NH: Tensor,
    behaviour_NE: Tensor,
    negative_NE: Tensor,
    before_P: Tensor,
    after_P: Tensor,
    weight_state_WH: Tensor,
    bias_W: Tensor,
    weight_behaviour_WE: Tensor,
    tail: Sequence[Tensor | None],
) -> Tensor:
    """Sum over pairs of half of softplus(-f(h, e)) + softplus(f(h, n)), a scalar; f is an MLP of [h, e].

    Pair p meets the state at ``before_P[p]`` with behaviour and negative at ``after_P[p]``; no position
    occurs twice in either. ``tail`` as in ``attention_scores``. The sum is linear in its gradient, so that is
    computed right away, block by block, and only scaled in the backward pass.
    """
    keep = torch.is_grad_enabled()
    given = (state_NH, behaviour_NE, negative_NE, before_P, after_P)
    weights = (weight_state_WH, bias_W, weight_behaviour_WE, *tail)
    return cast(Tensor, _PairLosses.apply(keep, *given, *weights))  # type: ignore[no-untyped-call]  # untyped in torch


class _PairLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, *given: Tensor) -> Tensor:
        state, behaviour, negative, before, after, by_state, bias, by_behaviour, *tail = given
        mlp = _SigmoidTail(tail)
        grads = [torch.zeros_like(tensor) for tensor in (state, behaviour, negative)] if keep else []
        grad_by_state, grad_bias, grad_by_behaviour = (
            torch.zeros_like(tensor) for tensor in (by_state, bias, by_behaviour)
        )
        total = state.new_zeros(())
        for now in _slices(before):
            earlier, later = before[now], after[now]
            h = state.index_select(0, earlier)
            num = len(h)
            e = torch.cat([behaviour.index_select(0, later), negative.index_select(0, later)])
            pre = torch.mm(e, by_behaviour.t())
            pre.view(2, num, -1).add_(torch.addmm(bias, h, by_state.t()))
            logits = mlp.forward(pre)
            logits[:num].neg_()  # both halves now cost softplus
            total += F.softplus(logits).sum()
            if not keep:
                continue
            g = torch.sigmoid(logits).mul_(0.5)
            g[:num].neg_()
            g = mlp.backward(g)
            grad_by_behaviour.addmm_(g.t(), e)
            g_e = torch.mm(g, by_behaviour)
            grads[1].index_copy_(0, later, g_e[:num])
            grads[2].index_copy_(0, later, g_e[num:])
            g = g[:num].add_(g[num:])
            grad_by_state.addmm_(g.t(), h)
            grad_bias += g.sum(0)
            grads[0].index_copy_(0, earlier, torch.mm(g, by_state))
        if keep:
            ctx.save_for_backward(*grads, grad_by_state, grad_bias, grad_by_behaviour, *mlp.gradients)
        return total.mul_(0.5)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scaled = [None if grad is None else grad * gradients[0] for grad in ctx.saved_tensors]
        return None, *scaled[:3], None, None, *scaled[3:]


class _SigmoidTail:
    """Layers after a first pre-activation on one block at a time; weight gradients add up over blocks."""

    def __init__(self, tail: Sequence[Tensor | None]) -> None:
        self.weights, self.biases = cast(list[Tensor], list(tail[::2])), list(tail[1::2])
        self.gradients = [None if tensor is None else torch.zeros_like(tensor) for tensor in tail]
        self.held: list[Tensor] = []

    def forward(self, pre: Tensor) -> Tensor:
        """Scores [n,1]; ``pre`` is overwritten."""
        self.held, value = [], pre
        for weight, bias in zip(self.weights, self.biases, strict=True):
            self.held.append(value.sigmoid_())
            turned = weight.t()
            value = (
                torch.mm(self.held[-1], turned) if bias is None else torch.addmm(bias, self.held[-1], turned)
            )
        return value

    def backward(self, grad: Tensor) -> Tensor:
        """Gradient of the pre-activation of the last ``forward``."""
        for number in reversed(range(len(self.weights))):
            value = self.held[number]
            cast(Tensor, self.gradients[2 * number]).addmm_(grad.t(), value)
            if (by_bias := self.gradients[2 * number + 1]) is not None:
                by_bias += grad.sum(0)
            grad = torch.mm(grad, self.weights[number])
            _sigmoid_backward(grad, value, grad_input=grad)
        return grad


# ----------------------------------------------------------------------------------------------------- blocks
def _positions(value: Tensor) -> int:
    return _CPU_POSITIONS if value.device.type == "cpu" else _OTHER_POSITIONS


def _blocks(sizes: Sequence[int], positions: int) -> list[range]:
    """Runs of steps that hold at least ``positions`` positions, the last maybe fewer."""
    blocks, first, held = [], 0, 0
    for step, size in enumerate(sizes):
        held += size
        if held >= positions or step == len(sizes) - 1:
            blocks.append(range(first, step + 1))
            first, held = step + 1, 0
    return blocks


def _slices(value: Tensor) -> Iterator[slice]:
    size = _positions(value)
    return (slice(first, first + size) for first in range(0, len(value), size))
