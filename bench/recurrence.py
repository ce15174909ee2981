"""AUGRU: packed loop with a hand-written backward against a masked loop under autograd."""

import numpy as np
import torch
from torch import Tensor

from bench.run import Claim, ratio
from couponflow.models.layers import GruCell, packing

CLAIMS = ("augru_full_histories", "augru_ragged_histories")
ROWS, STEPS, INPUT, HIDDEN, RUNS = 512, 100, 36, 36, 5


def masked_loop(cell: GruCell, x_BTD: Tensor, attention_BT: Tensor, length_B: Tensor) -> Tensor:
    """Step over every padded position and keep the old state beyond a row's length, [B,H]."""
    state = x_BTD.new_zeros(len(x_BTD), HIDDEN)
    for step, (x_BD, attention_B) in enumerate(zip(x_BTD.unbind(1), attention_BT.unbind(1), strict=True)):
        moved = cell.step(x_BD, state, attention_B)
        state = torch.where((step < length_B)[:, None], moved, state)
    return state


def compare(name: str, length_B: Tensor, bound: float) -> Claim:
    """Forward and backward to weights, inputs and attention, both ways, one thread."""
    torch.manual_seed(0)
    cell = GruCell(INPUT, HIDDEN, "augru_paper")
    x_BTD = torch.randn(ROWS, STEPS, INPUT, requires_grad=True)
    attention_BT = (torch.rand(ROWS, STEPS) / STEPS).requires_grad_()
    leaves = [*cell.parameters(), x_BTD, attention_BT]

    def ours() -> Tensor:
        layout = packing(length_B, STEPS)
        state = layout.final(cell(layout.pack(x_BTD), layout, layout.pack(attention_BT)))
        torch.autograd.grad(state.square().sum(), leaves)
        return state.detach()

    def rival() -> Tensor:
        state = masked_loop(cell, x_BTD, attention_BT, length_B)
        torch.autograd.grad(state.square().sum(), leaves)
        return state.detach()

    assert torch.allclose(ours(), rival(), atol=1e-5), "both ways must give one state"
    return Claim(name, ratio(rival, ours, RUNS), "x faster", bound, RUNS, "masked loop")


def measure(names: tuple[str, ...]) -> list[Claim]:
    """Full and ragged histories (geometric length, mean about a third of the cap)."""
    torch.set_num_threads(1)
    drawn = np.random.default_rng(0).geometric(3 / STEPS, ROWS)
    ragged = torch.from_numpy(drawn.clip(2, STEPS))
    full = torch.full((ROWS,), STEPS)
    both = {"augru_full_histories": (full, 0.9), "augru_ragged_histories": (ragged, 1.8)}
    return [compare(name, *both[name]) for name in names]
